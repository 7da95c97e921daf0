"""Learners x streams x 5 seeds on the digits, with standard errors and paired tests, in minutes.

The digits, an MLP 64-100-100-10, Adam 1e-3, five experiences of ten epochs in batches of 32: by
class without and with task labels, and by domain (permuted pixels). Twelve learners, with a memory
of 100 rows where they have one.

    lamina run --config=incremental/benchmark --workdir=runs/benchmark

Every cell is a run in `cells/STREAM/LEARNER`; those that are done aren't done again. The pages in
`comparisons/` have curves, all metrics and paired tests against fine-tuning.
"""

from ml_collections import ConfigDict

LEARNERS = {
    "finetune": dict(),
    "ewc": dict(strength=100.0),
    "si": dict(strength=1.0),
    "lwf": dict(),
    "er": dict(memory=100, past_only=True),
    "agem": dict(per_task=20, sample=32),
    "gem": dict(per_task=20),
    "der": dict(memory=100),
    "derpp": dict(memory=100),
    "icarl": dict(memory=100),
    "joint": dict(),
    "cumulative": dict(),
}
"""Learner to its keys."""

STREAMS = {
    "class_incremental": dict(),
    "task_incremental": dict(),
    "domain_incremental": dict(transform="permuted"),
}
"""Stream to its keys."""


def get_config(learners: str = "") -> ConfigDict:
    """Returns the config.

    Args:
        learners: names with "+" between them, such as "finetune+er"; default: all of `LEARNERS`.
    """
    chosen = tuple(learners.split("+")) if learners else tuple(LEARNERS)
    config = ConfigDict()
    config.program = "benchmark"
    config.seeds = (0, 1, 2, 3, 4)  # values; each has its own order and initial weights
    config.benchmark = ConfigDict(
        dict(
            learners=chosen,
            streams=tuple(STREAMS),
            learner_options={name: LEARNERS[name] for name in chosen if LEARNERS.get(name)},
            stream_options={name: keys for name, keys in STREAMS.items() if keys},
        )
    )
    config.stream = ConfigDict(dict(name="class_incremental", experiences=5, epochs=10))
    config.learner = ConfigDict(dict(name="finetune"))  # the cells have their own
    config.data = ConfigDict(dict(name="digits", batch_size=32, seed=0, order="per_seed"))
    config.model = ConfigDict(dict(name="mlp", widths=(100, 100)))
    config.task = ConfigDict(dict(name="classification"))
    config.optimizer = ConfigDict(dict(name="adam", learning_rate=1e-3))
    config.schedule = ConfigDict(dict(name="constant"))
    config.log_every = 34  # steps
    config.steps_per_call = 0  # steps in one dispatch: all
    config.checkpoint = ConfigDict(dict(every=0, keep=1))
    config.trackers = ()
    return config
