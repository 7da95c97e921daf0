"""A decoder of a billion parameters on C4, byte by byte, its parameters split over all devices.

The sizes and the optimizer's settings are those of TinyLlama (Zhang et al. 2024, arXiv
2401.02385): 22 blocks of width 2048 with 32 query heads in 4 groups, AdamW with b2 = 0.95 and decay
0.1, a peak of 4e-4 after 2,000 steps, a cosine to a tenth of it, two million tokens a step,
clipping at norm 1. It trains on about 20 tokens per parameter, which Hoffmann et al. 2022 (arXiv
2203.15556) find the best use of the compute. Tokens are bytes: TFDS keeps C4 (Raffel et al. 2020,
arXiv 1910.10683) as text, of which each document gives its first 2,048 bytes. The embedding of
bytes is small, which leaves 0.97 billion parameters.

Expected: not measured by us, for lack of the data and a cluster. Cost: 1.7e16 FLOP a step, 1.7e20
in all (`lamina check` counts them): 30 hours of 16 TPU v5e, if they ran at half of their peak. Each
of N devices holds 1/N of the 11.6 GB of parameters and moments.

    tfds build c4/en --file_format=array_record --data_dir=DATA    # where TensorFlow is installed
    lamina run --config=c4_transformer --config.data.data_dir=DATA --workdir=gs://BUCKET/c4
    lamina run --config=c4_transformer:synthetic --workdir=runs/try    # random bytes, 2 steps
    lamina run --config=c4_transformer:tiny --workdir=runs/try         # and 2 blocks of width 64
    lamina compile --config=c4_transformer --topology=v5e:16x16       # what a pod would make of it
    lamina plan --config=c4_transformer:8b --topology=v5e:16x16        # layouts of a larger one

The variant "8b" has blocks of the sizes of LLaMA 3 8B (Grattafiori et al. 2024, arXiv 2407.21783,
table 3), and 36 instead of 32 of them, since bytes need no embeddings of 128,256 tokens: 7.9
billion parameters, on rows of 4,096 bytes.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    """Returns the config.

    Args:
        variant: "", or "synthetic" (two steps of the whole model on two documents of random bytes;
            one device needs 20 GB for it), "tiny" (eight documents and a small model), or "8b" (7.9
            billion parameters, for a pod).
    """
    if variant not in ("", "synthetic", "tiny", "8b"):
        raise ValueError(f"{variant!r} should be synthetic, tiny or 8b, or left out")
    config = ConfigDict()
    config.program = "train"
    config.seeds = (0,)  # values
    config.steps = 10_000  # optimizer steps: 21 billion bytes, of 10 million documents
    config.data = ConfigDict(
        dict(
            name="tfds",
            dataset="c4/en",
            data_dir="",  # folder; empty: $TFDS_DATA_DIR, then ~/tensorflow_datasets
            inputs="text",
            labels="",  # none: the next byte
            context=2048,  # bytes of a document
            test_fraction=1e-4,  # of the 365 million training documents
            batch_size=1024,  # documents, over all devices
            seed=0,  # of the order
            placement="grain",
            workers=8,  # processes on each host that read
            stand_in=dict(
                name="synthetic_tokens",
                vocabulary=256,
                context=2048,  # tokens
                examples=64,
                held_out=4,
            ),
        )
    )
    config.model = ConfigDict(
        dict(
            name="transformer",
            depth=22,  # blocks
            embed=2048,  # width
            heads=32,  # query heads, of 64 units
            kv_heads=4,  # key and value heads
            mlp=5632,  # hidden units
            scan=True,  # one compiled block for all 22
            remat="full",  # the backward pass keeps nothing but the inputs of the blocks
        )
    )
    config.task = ConfigDict(dict(name="language_modeling"))
    config.optimizer = ConfigDict(
        dict(
            name="adamw",
            learning_rate=4e-4,  # peak
            b2=0.95,  # of the second moment
            weight_decay=0.1,  # share of a weight lost in a step, per unit of learning rate
        )
    )
    config.schedule = ConfigDict(dict(name="cosine", warmup_steps=2_000, final_factor=0.1))
    config.accumulation = 2  # parts of a batch: each of 16 devices computes on 32 documents at once
    config.clip_norm = 1.0  # largest norm of the gradient
    # Ways: the parameters are split over a slice, and only gradients go from slice to slice.
    config.mesh = ConfigDict(dict(data=-1, fsdp=-1, tensor=1, dcn=dict(data=-1)))
    config.sharding = ConfigDict(dict(rules="fsdp"))
    config.precision = "bfloat16"  # of the computation; parameters stay float32
    config.evaluation = ConfigDict(dict(every=2_500))  # steps; validation is 0.75 billion bytes
    config.checkpoint = ConfigDict(dict(every=500, keep=2))  # steps, newest
    config.log_every = 10  # steps
    config.steps_per_call = 1  # steps in one dispatch
    if variant == "8b":
        config.steps = 160_000  # of a million bytes: 20 bytes for each parameter
        config.data.update(dict(context=4096, batch_size=256))
        config.data.stand_in.update(dict(context=4096, examples=8))
        config.model = ConfigDict(
            dict(
                name="transformer",
                preset="llama3-8b",
                depth=36,  # blocks
                tied=False,
                rope_theta=500_000.0,
                remat="full",
            )
        )
        config.optimizer.learning_rate = 3e-4  # peak, as LLaMA 3 8B has it
        config.accumulation = 1
    elif variant:
        config.data = ConfigDict({**config.data.stand_in.to_dict(), "batch_size": 2})
        config.accumulation = 1
        config.steps = 2
        config.schedule.warmup_steps = 1
        config.evaluation = ConfigDict(dict(every=0))
        config.checkpoint = ConfigDict(dict(every=0))
        config.log_every = 1
    if variant == "tiny":
        config.data.batch_size = 8
        config.model.update(dict(depth=2, embed=64, heads=4, kv_heads=2, mlp=192))
    return config
