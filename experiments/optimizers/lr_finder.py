"""Which learning rate? A range test of the quickstart's MLP on handwritten digits.

Claim: a suggestion between 1e-4 and 1e-2 for AdamW, and the largest stable rate above it, in a few
seconds on two CPU cores. The program runs on any training config: `--config.program=lr_finder`.

    lamina run --config=optimizers/lr_finder --workdir=runs/lr_finder
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.program = "lr_finder"
    config.seeds = (0, 1, 2)  # each has a suggestion; the result's is their median
    config.steps = 600  # those of the training: a range test doesn't use them
    config.data = ConfigDict(dict(name="digits", batch_size=64, seed=0))
    config.model = ConfigDict(dict(name="mlp", widths=(256, 256), dropout=0.2))
    config.task = ConfigDict(dict(name="classification", label_smoothing=0.05))
    config.optimizer = ConfigDict(dict(name="adamw", learning_rate=2e-3, weight_decay=1e-3))
    config.schedule = ConfigDict(dict(name="constant"))  # not used either: the rate grows
    config.lr_finder = ConfigDict(dict(low=1e-6, high=10.0, steps=200))
    return config
