"""Networks trained apart, matched unit by unit: Git Re-Basin on Fashion-MNIST.

lamina run --config=merging/rebasin --workdir=runs/rebasin
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.program = "rebasin"
    config.seeds = (0, 1, 2, 3, 4, 5)  # pairs: 0 and 1, 2 and 3, 4 and 5
    config.epochs = 4  # passes over the 54,000 training images, of 106 steps each
    config.data = ConfigDict(
        dict(
            name="fashion_mnist",
            batch_size=512,  # images
            seed=0,
            order="per_seed",  # each model sees the images in an order of its own
        )
    )
    config.model = ConfigDict(dict(name="mlp", widths=(512, 512)))  # units
    config.task = ConfigDict(dict(name="classification"))
    config.optimizer = ConfigDict(
        dict(
            name="adamw",
            learning_rate=3e-3,  # peak
            weight_decay=0.5,  # enough that little is left of the weights' random start
        )
    )
    config.schedule = ConfigDict(dict(name="cosine", warmup_steps=50))
    config.evaluation = ConfigDict(dict(every=0, batch_size=1000))  # at the end; images
    config.checkpoint = ConfigDict(dict(every=106, keep=1))  # steps, newest
    config.log_every = 53  # steps
    config.steps_per_call = 53  # steps in one dispatch
    config.rebasin = ConfigDict(dict(points=25, split="test", repair=True))
    return config
