"""Four islands that rarely meet, against one run that exchanges whole gradients, on Fashion-MNIST.

Claim: an MLP of 269,322 parameters that AdamW trains to 87.4% on the test split in 1,000 steps
comes to 86.7% with DiLoCo (Douillard et al. 2023, arXiv 2311.08105), whose islands send a fiftieth
of the bytes, to 86.6% with int8 (1/198), and to 86.2% with DeMo (Peng et al. 2024, arXiv
2411.19870; 1/36): three seeds, standard deviations of 0.1. Seconds on two cores, DeMo 40.

    lamina run --config=optimizers/islands:diloco --workdir=runs/islands_diloco

The guide docs/islands.md has the table. Learning rates were chosen on the validation split.
"""

from ml_collections import ConfigDict

METHODS = {
    "synchronous": dict(name="none"),
    "diloco": dict(name="diloco", number=4, every=50),
    "diloco_float16": dict(name="diloco", number=4, every=50, compression="float16"),
    "diloco_int8": dict(name="diloco", number=4, every=50, compression="int8"),
    "local_sgd": dict(name="local_sgd", number=4, every=50),
    "demo": dict(name="demo", number=4, topk=16, chunk=32),
}
"""Name to what the islands exchange, and how often."""


def get_config(method: str = "diloco") -> ConfigDict:
    """Returns the config.

    Args:
        method: one of `METHODS`.
    """
    if method not in METHODS:
        raise ValueError(f"{method!r} should be one of {', '.join(METHODS)}")
    config = ConfigDict()
    config.program = "train"
    config.seeds = (0,)  # values
    config.steps = 1000  # 2.4 passes over the 54,000 training images
    config.data = ConfigDict(dict(name="fashion_mnist", batch_size=128, seed=0))
    config.model = ConfigDict(dict(name="mlp", widths=(256, 256)))
    config.task = ConfigDict(dict(name="classification"))
    config.optimizer = ConfigDict(dict(name="adamw", learning_rate=2e-3, weight_decay=1e-2))
    config.schedule = ConfigDict(dict(name="cosine", warmup_steps=50))
    config.islands = ConfigDict(METHODS[method])
    if method == "demo":
        config.optimizer = ConfigDict(
            dict(name="lion", learning_rate=1e-3, b1=0.0, weight_decay=1e-2)
        )
    config.evaluation = ConfigDict(dict(every=500, batch_size=1000))
    config.log_every = 50
    config.steps_per_call = 50
    config.trackers = ()
    return config
