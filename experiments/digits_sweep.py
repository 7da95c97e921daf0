"""A sweep of the quickstart's MLP: 8 learning rates x 4 seeds, trained in one compiled program.

Claim: rates from 1e-3 to 1e-2 reach 97% validation accuracy and more; in about ten seconds on two
CPU cores.

    lamina run --config=digits_sweep --workdir=runs/digits_sweep
    lamina run --config=runs/digits_sweep/best.json --workdir=runs/digits_best
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.program = "sweep"
    config.seeds = (0, 1, 2, 3)  # every trial has all of them
    config.steps = 600
    config.data = ConfigDict(dict(name="digits", batch_size=64, seed=0))
    config.model = ConfigDict(dict(name="mlp", widths=(256, 256), dropout=0.2))
    config.task = ConfigDict(dict(name="classification", label_smoothing=0.05))
    config.optimizer = ConfigDict(dict(name="adamw", learning_rate=2e-3, weight_decay=1e-3))
    config.schedule = ConfigDict(dict(name="cosine", warmup_steps=50))
    config.evaluation = ConfigDict(dict(every=100))
    config.log_every = 50
    config.steps_per_call = 50
    config.sweep = ConfigDict(
        dict(
            space=dict(
                optimizer=dict(learning_rate=dict(low=1e-4, high=1e-1, scale="log", points=8))
            ),
            method="grid",
        )
    )
    return config
