"""Language domains, one after the other: a byte-level transformer reads the standard library.

Five domains of Python's own library (encoding tables, network, concurrency, testing, numbers), each
with 200,000 bytes; a transformer of two blocks of width 64, AdamW 1e-3, batches of 32 rows of 64
bytes, one pass (98 steps a domain). Accuracies are those of the next byte on each domain's held-out
text.

    lamina run --config=incremental/python_domains:er --workdir=runs/domains
"""

from ml_collections import ConfigDict


def get_config(learner: str = "er") -> ConfigDict:
    """Returns the config.

    Args:
        learner: a learner that needs no classes: finetune, joint, cumulative, er, agem, gem, si or
            ema_merge.
    """
    config = ConfigDict()
    config.program = "incremental"
    config.seeds = (0, 1, 2)  # values; each has its own order and initial weights
    config.stream = ConfigDict(dict(name="domains", experiences=5, epochs=1))
    config.learner = ConfigDict(dict(name=learner))
    if learner == "er":
        config.learner.update(dict(memory=500, replay=32, policy="reservoir"))  # rows
    config.data = ConfigDict(
        dict(name="python_domains", context=64, budget=200_000, batch_size=32, order="per_seed")
    )
    config.model = ConfigDict(dict(name="transformer", depth=2, embed=64, heads=4))
    config.task = ConfigDict(dict(name="language_modeling"))
    config.optimizer = ConfigDict(dict(name="adamw", learning_rate=1e-3))
    config.schedule = ConfigDict(dict(name="constant"))
    config.evaluation = ConfigDict(dict(batch_size=256))  # rows
    config.log_every = 49  # steps: two records a domain
    config.steps_per_call = 98  # steps in one dispatch: a domain
    config.checkpoint = ConfigDict(dict(every=98, keep=1))  # steps
    return config
