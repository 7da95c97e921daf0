"""A small vision transformer to start from: pre-trained on half of Fashion-MNIST's classes.

Four blocks of width 64 on patches of 7x7 pixels, on the 30,000 images of classes 0 to 4, three
epochs, AdamW 1e-3. `incremental/prompts` starts from it.

    lamina run --config=incremental/backbone --workdir=runs/backbone
"""

from ml_collections import ConfigDict

MODEL = dict(name="vit", patch=7, depth=4, embed=64, heads=4)  # pixels; blocks; units


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.program = "incremental"
    config.seeds = (0,)  # values
    config.stream = ConfigDict(
        dict(
            name="class_incremental",
            experiences=1,
            classes=5,  # the first ones
            epochs=3,
            train_on="train+validation",
        )
    )
    config.learner = ConfigDict(dict(name="finetune"))
    config.data = ConfigDict(dict(name="fashion_mnist", batch_size=128))  # images
    config.model = ConfigDict(MODEL)
    config.task = ConfigDict(dict(name="classification"))
    config.optimizer = ConfigDict(dict(name="adamw", learning_rate=1e-3, weight_decay=0.01))
    config.schedule = ConfigDict(dict(name="cosine", warmup_steps=50))
    config.log_every = 47  # steps
    config.steps_per_call = 47  # steps in one dispatch
    config.checkpoint = ConfigDict(dict(every=235, keep=1))  # steps
    return config
