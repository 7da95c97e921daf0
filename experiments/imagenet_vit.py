"""ViT-S/16 on ImageNet-1k, after "Better plain ViT baselines" (Beyer et al. 2022, 2205.01580).

Claim of the reference: 76.5% top-1 accuracy on the validation split after 90 epochs at batch size
1024, in 6 to 7 hours on a TPU v3-8: Adam with decoupled weight decay, gradients clipped at norm 1,
10,000 steps of warm-up and a cosine, mixup 0.2, the mean over patches instead of a class token.

What differs here, and costs accuracy: images are resized and cropped at the centre (the paper:
random "Inception" crops and RandAugment), positions are learned (the paper: fixed sines), the decay
reaches biases and norms too, mixup draws one share per image. Its decay of 1e-4 a step is not
multiplied by the learning rate; ours is, so it is 0.1. As in the paper 1% of the training images is
held out; here it is the split "test", and ImageNet's validation split is "validation".

Expected: below 76.5%; not measured by us, for lack of the data and a TPU. Cost: 28 GFLOP per image
and step, 3.2 EFLOP in all.

    tfds build imagenet2012 --file_format=array_record --data_dir=DATA   # without the test archive:
                                                                         # its images have no labels
    lamina run --config=imagenet_vit --config.data.data_dir=DATA --workdir=gs://BUCKET/imagenet_vit
    lamina run --config=imagenet_vit:synthetic --workdir=runs/try        # random images, 2 steps
    lamina run --config=imagenet_vit:tiny --workdir=runs/try             # and 2 blocks of width 64
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    """Returns the config.

    Args:
        variant: "", or "synthetic" (two steps of the whole model on 16 random images each), or
            "tiny" (the same with a small model).
    """
    if variant not in ("", "synthetic", "tiny"):
        raise ValueError(f"{variant!r} should be synthetic or tiny, or left out")
    config = ConfigDict()
    config.program = "train"
    config.seeds = (0,)  # values
    config.steps = 111_477  # optimizer steps: 90 passes over 99% of the 1,281,167 training images
    config.data = ConfigDict(
        dict(
            name="tfds",
            dataset="imagenet2012",
            data_dir="",  # folder; empty: $TFDS_DATA_DIR, then ~/tensorflow_datasets
            image_size=224,  # pixels: the shorter side before the crop, and both after it
            test_fraction=0.01,  # of the training images
            batch_size=1024,  # images, over all devices
            seed=0,  # of the order
            augmentations=("flip", "mixup"),
            augmentation_options=dict(mixup=dict(alpha=0.2)),  # of the Beta distribution
            placement="grain",
            workers=32,  # processes on each host that decode images
            stand_in=dict(
                name="synthetic_images",
                shape=(224, 224, 3),  # pixels, channels
                classes=1000,
                examples=64,
                held_out=16,
            ),
        )
    )
    config.model = ConfigDict(dict(name="vit", preset="s", patch=16, pool="gap"))  # pixels
    config.task = ConfigDict(dict(name="classification", label_smoothing=0.0))
    config.optimizer = ConfigDict(
        dict(
            name="adamw",
            learning_rate=1e-3,  # peak
            weight_decay=0.1,  # share of a weight lost in a step, per unit of learning rate
            mu_dtype="bfloat16",  # of the first moment
        )
    )
    config.schedule = ConfigDict(dict(name="cosine", warmup_steps=10_000))  # to zero at the end
    config.clip_norm = 1.0  # largest norm of the gradient
    config.mesh = ConfigDict(dict(data=-1))  # all devices split the batch
    config.sharding = ConfigDict(dict(rules="data"))  # 22 million parameters fit any device
    config.precision = "bfloat16"  # of the computation; parameters stay float32
    config.evaluation = ConfigDict(dict(every=2_500))  # steps
    config.checkpoint = ConfigDict(
        dict(
            every=2_500,  # steps
            keep=2,  # newest
            best="validation/accuracy",  # kept besides
        )
    )
    config.log_every = 50  # steps
    config.steps_per_call = 1  # steps in one dispatch: one batch is 154 MB and a device's 0.1 s
    if variant:
        shared = dict(batch_size=16, augmentations=("flip", "mixup"))
        config.data = ConfigDict({**config.data.stand_in.to_dict(), **shared})
        config.steps = 2
        config.schedule.warmup_steps = 1
        config.evaluation = ConfigDict(dict(every=0))
        config.checkpoint = ConfigDict(dict(every=0))
        config.log_every = 1
    if variant == "tiny":
        config.model.update(dict(depth=2, embed=64, heads=2))
    return config
