"""Data of the user's own that a stream can't be made from."""

import jax
import numpy as np
import pytest

from lamina.platform.data.arrays import from_arrays
from lamina.platform.errors import UserError
from lamina.platform.programs import incremental


def data(test_labels=(0, 1, 2, 3), **train):
    labels = np.arange(40) % 4
    rows = lambda labels: {"inputs": np.ones((len(labels), 3), np.float32), "labels": labels}
    splits = {name: rows(labels) for name in ("train", "validation")}
    splits["test"] = rows(np.asarray(test_labels))
    splits["train"] |= train
    for fields in splits.values():
        fields |= {name: np.ones(len(fields["labels"]), np.float32) for name in train}
    return from_arrays(splits)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (data(test_labels=(0, 1, 2)), r"'test' has no example of task 4 \(classes \[3\]\)"),
        (data(weights=np.ones(40, np.float32)), "has weights of its examples"),
    ],
)
def test_what_is_wrong_with_the_data_is_named(dataset, message):
    config = incremental.resolve(
        {
            "stream": {"name": "class_incremental", "experiences": 4},
            "learner": {"name": "finetune"},
            "data": {"name": "digits", "batch_size": 8},
            "model": {"name": "mlp", "widths": (4,)},
            "task": {"name": "classification"},
            "optimizer": {"name": "adam", "learning_rate": 1e-2},
            "schedule": {"name": "constant"},
        }
    )
    with pytest.raises(UserError, match=message):
        incremental.prepare(config, ("*",), jax.devices()[:1], True, dataset)
