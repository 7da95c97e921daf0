"""Joint training: all data at once, the upper baseline of equal steps."""

from typing import Any

import numpy as np

from lamina.platform.incremental.stream import parts_of, rescheduled, shuffled
from lamina.platform.training.learners import Learner


def joint() -> Learner:
    """Trains on the data of all experiences, shuffled together.

    It takes the stream's passes over them, and is evaluated where the experiences would end (after
    equal shares of the data), so that its last row is the model trained on everything. Every class
    counts as seen from the beginning.
    """

    def arrange(stream: Any) -> Any:
        parts = parts_of(stream)
        examples = shuffled(np.concatenate(parts), stream)
        shares = np.array_split(examples, len(parts))
        everything = np.broadcast_to(stream.classes.any(0), stream.classes.shape)
        return rescheduled(stream, shares)._replace(classes=everything)

    return Learner(arrange=arrange)
