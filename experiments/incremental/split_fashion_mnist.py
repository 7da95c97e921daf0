"""Split Fashion-MNIST, class-incremental: five pairs of classes, one after the other.

The acceptance protocol of our learners: tasks {0,1}, {2,3}, {4,5}, {6,7}, {8,9} in this order, with
12,000 training and 2,000 test images each and no task label; an MLP 784-400-400-10 with ReLU, all
weights and biases uniform between +-fan_in^-1/2; Adam 1e-3, its state kept across tasks;
cross-entropy over all ten logits; batches of 128, one epoch a task (94 steps).

    lamina run --config=incremental/split_fashion_mnist:er --workdir=runs/er

The guide docs/incremental.md has the table of all learners.
"""

from ml_collections import ConfigDict

SETTINGS = {
    "finetune": dict(),
    "joint": dict(),
    "cumulative": dict(),
    "ewc": dict(strength=100.0),
    "si": dict(strength=0.1, damping=0.1),
    "lwf": dict(alpha=1.0, temperature=2.0),
    "ema_merge": dict(decay=0.5),
    "er": dict(memory=500, replay=128, past_only=True),
    "icarl": dict(memory=500, replay=128),
    "agem": dict(per_task=100, sample=128),
    "gem": dict(per_task=100, strength=0.5),
    "der": dict(memory=500, replay=128, alpha=0.3),
    "derpp": dict(memory=500, replay=128, alpha=0.3, beta=0.5),
}
"""Learner to its keys in the protocol; other learners take their own defaults."""


def get_config(learner: str = "er") -> ConfigDict:
    """Returns the config.

    Args:
        learner: a learner's name, or "online_er": batches of 10 + 10 rows, 6,000 steps.
    """
    config = ConfigDict()
    config.program = "incremental"
    config.seeds = (0, 1, 2, 3, 4)  # values; each has its own order and initial weights
    config.stream = ConfigDict(
        dict(
            name="class_incremental",
            experiences=5,
            epochs=1,  # passes over each experience
            train_on="train+validation",  # 60,000 images
            evaluate_on="test",
        )
    )
    config.data = ConfigDict(
        dict(name="fashion_mnist", batch_size=128, seed=0, order="per_seed")  # images
    )
    config.model = ConfigDict(dict(name="mlp", widths=(400, 400), init="uniform"))
    config.task = ConfigDict(dict(name="classification"))
    config.optimizer = ConfigDict(dict(name="adam", learning_rate=1e-3))
    config.schedule = ConfigDict(dict(name="constant"))
    config.log_every = 47  # steps: two records a task
    config.steps_per_call = 94  # steps in one dispatch: a task
    config.checkpoint = ConfigDict(dict(every=188, keep=1))  # steps: two tasks
    if learner == "online_er":
        config.stream.name = "online"
        config.data.batch_size = 10
        config.learner = ConfigDict(dict(name="er", memory=500, replay=10))
        config.log_every = 300
        config.steps_per_call = 1200
        config.checkpoint.every = 1200
    else:
        config.learner = ConfigDict(dict(name=learner, **SETTINGS.get(learner, {})))
    return config
