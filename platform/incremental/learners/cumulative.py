"""Cumulative training: each experience with all data so far, the usual upper baseline."""

from typing import Any

import numpy as np

from lamina.platform.incremental.stream import parts_of, rescheduled
from lamina.platform.training.learners import Learner


def cumulative() -> Learner:
    """Trains in experience t on the data of experiences 1 to t, from the current parameters.

    It takes as many passes over them as the stream takes over an experience, so its steps grow with
    t. The diagonal of its accuracies is the reference of `metrics.intransigence`.
    """

    def arrange(stream: Any) -> Any:
        parts = parts_of(stream)
        grown = [np.concatenate(parts[: number + 1]) for number in range(len(parts))]
        return rescheduled(stream, grown)

    return Learner(arrange=arrange, needs=frozenset({"boundaries"}))
