"""Si-Blurry Fashion-MNIST (Moon et al. 2023, arXiv 2308.09303): online, without boundaries.

Half of the classes come in one of five experiences each, of the others a tenth is spread over all;
the sizes are random. One pass, batches of 32 with 32 rows of a memory of 500 beside them, three
updates each, Adam 1e-3; evaluated every 600 steps on the classes seen so far.

    lamina run --config=incremental/si_blurry_fashion --workdir=runs/blurry
"""

from ml_collections import ConfigDict


def get_config(learner: str = "er") -> ConfigDict:
    """Returns the config.

    Args:
        learner: a learner that needs no boundaries: finetune, er, der or derpp.
    """
    config = ConfigDict()
    config.program = "incremental"
    config.seeds = (1, 2, 3)  # values; each has its own split, order and initial weights
    config.stream = ConfigDict(
        dict(name="si_blurry", experiences=5, repeats=3, disjoint=50, blurry=10)  # percent
    )
    config.learner = ConfigDict(dict(name=learner))
    if learner in ("er", "der", "derpp"):
        config.learner.memory = 500  # rows
    config.data = ConfigDict(dict(name="fashion_mnist", batch_size=32, order="per_seed"))
    config.model = ConfigDict(dict(name="mlp", widths=(400, 400), init="uniform"))
    config.task = ConfigDict(dict(name="classification"))
    config.optimizer = ConfigDict(dict(name="adam", learning_rate=1e-3))
    config.schedule = ConfigDict(dict(name="constant"))
    config.evaluation = ConfigDict(dict(every=600))  # steps
    config.log_every = 100  # steps
    config.steps_per_call = 600  # steps in one dispatch
    config.checkpoint = ConfigDict(dict(every=600, keep=1))  # steps
    return config
