"""Split Fashion-MNIST on a pre-trained vision transformer: prompts, prototypes, and fine-tuning.

The stream of `incremental/split_fashion_mnist`, one pass over the training split, on the backbone
of `incremental/backbone` (which knows half of the classes, as backbones often do). `l2p` (Wang et
al. 2022, arXiv 2112.08654) trains a pool of ten prompts and the head, with all else frozen; `slda`
(Hayes and Kanan 2020, arXiv 1909.01520) trains nothing; other learners fine-tune everything.

    lamina run --config=incremental/backbone --workdir=runs/backbone
    lamina run --config=incremental/prompts:l2p --workdir=runs/l2p
"""

from ml_collections import ConfigDict

from lamina.experiments.incremental import backbone


def get_config(learner: str = "l2p") -> ConfigDict:
    """Returns the config.

    Args:
        learner: a learner's name.
    """
    config = ConfigDict()
    config.program = "incremental"
    config.seeds = (0,)  # values
    config.stream = ConfigDict(dict(name="class_incremental", experiences=5, epochs=1))
    config.learner = ConfigDict(dict(name=learner))
    config.data = ConfigDict(dict(name="fashion_mnist", batch_size=128))  # images
    config.model = ConfigDict(backbone.MODEL)
    config.init_from = "runs/backbone"
    config.init_from_rules = ConfigDict(dict(exclude=("^head",)))
    config.task = ConfigDict(dict(name="classification"))
    config.optimizer = ConfigDict(dict(name="adam", learning_rate=1e-3))
    if learner == "l2p":
        config.model.prompts = 10  # in the pool; each example takes five, of five tokens
        config.init_from_rules.exclude = ("^head", "^prompts")
        config.init_from_rules.freeze = ("^(?!prompts|head)",)
        config.optimizer.learning_rate = 0.01
    config.schedule = ConfigDict(dict(name="constant"))
    config.log_every = 85  # steps: an experience
    config.steps_per_call = 85  # steps in one dispatch
    config.checkpoint = ConfigDict(dict(every=85, keep=1))  # steps
    return config
