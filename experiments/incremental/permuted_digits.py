"""Permuted digits, domain-incremental: the smoke benchmark of incremental learning, in seconds.

Five experiences with the same ten classes, each with its own fixed permutation of the 64 pixels; an
MLP 64-100-100-10, Adam 1e-3, ten epochs of batches of 32. Fine-tuning forgets the old permutations
slowly, replay hardly.

    lamina run --config=incremental/permuted_digits:er --workdir=runs/permuted
"""

from ml_collections import ConfigDict


def get_config(learner: str = "er") -> ConfigDict:
    """Returns the config.

    Args:
        learner: a learner's name.
    """
    config = ConfigDict()
    config.program = "incremental"
    config.seeds = (0, 1, 2)  # values; each has its own permutations, order and initial weights
    config.stream = ConfigDict(
        dict(name="domain_incremental", experiences=5, epochs=10, transform="permuted")
    )
    config.learner = ConfigDict(dict(name=learner))
    config.data = ConfigDict(dict(name="digits", batch_size=32, seed=0, order="per_seed"))
    config.model = ConfigDict(dict(name="mlp", widths=(100, 100)))
    config.task = ConfigDict(dict(name="classification"))
    config.optimizer = ConfigDict(dict(name="adam", learning_rate=1e-3))
    config.schedule = ConfigDict(dict(name="constant"))
    config.log_every = 34  # steps: an epoch
    config.steps_per_call = 340  # steps in one dispatch: an experience
    config.checkpoint = ConfigDict(dict(every=340, keep=1))  # steps
    return config
