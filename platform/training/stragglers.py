"""Tells when one of several processes keeps the others waiting."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lamina.platform.reporting.clock import Clock

SHARE = 0.2
"""How far processes may be apart, as a share of a step's time, before it is worth a line."""


class Pace(NamedTuple):
    """How one process spends a step.

    Attributes:
        step: seconds of a step.
        data: seconds of them that it waits for its rows of the batch.
    """

    step: float
    data: float


def describe(paces: Sequence[Pace]) -> str:
    """Returns a line about the process that is more than `SHARE` of a step behind, or "".

    In a step the devices of all processes wait for each other, so that its time is about the same
    in all of them, whoever is slow. What a process does on its own is to wait for its data: that
    differs, and where it doesn't, the times of whole steps are compared.

    Args:
        paces: of each process.

    Example:
        >>> describe([Pace(0.050, 0.002), Pace(0.051, 0.031)])
        'process 1 is slow: it waits 31.0 ms of a step for its data, process 0 2.0 ms'
    """
    step = max(pace.step for pace in paces)
    for name, what in (("data", "waits {:.1f} ms of a step for its data"), ("step", "{:.1f} ms")):
        seconds = [getattr(pace, name) for pace in paces]
        slow, fast = int(np.argmax(seconds)), int(np.argmin(seconds))
        if seconds[slow] - seconds[fast] > SHARE * step:
            verb = "it " if name == "data" else "a step takes it "
            told = what.format(1000 * seconds[slow])
            other = f"process {fast} {1000 * seconds[fast]:.1f} ms"
            return f"process {slow} is slow: {verb}{told}, {other}"
    return ""


class Watch:
    """Compares the processes from checkpoint to checkpoint, where they wait for each other anyway.

    Args:
        clock: this process's.
        step: steps done.

    Attributes:
        paces: of each process, at the last look; nothing with a single process.
        line: about a slow process, at the last look; or "".
    """

    def __init__(self, clock: Clock, step: int):
        self.paces: list[Pace] = []
        self.line = ""
        self._clock = clock
        self._step, self._before = step, clock.totals()

    def look(self, step: int) -> bool:
        """Compares the processes since the last look; all of them must call it at the same step.

        Args:
            step: steps done.

        Returns:
            Whether there is something new to tell.
        """
        steps, self._step = step - self._step, step
        if jax.process_count() == 1 or steps <= 0:
            return False
        from jax.experimental import multihost_utils

        now, before = self._clock.totals(), self._before
        self._before = now
        train, data = (
            (now.get(name, 0.0) - before.get(name, 0.0)) / steps for name in ("train", "data")
        )
        mine = np.asarray([train + data, data], np.float32)
        with jax.transfer_guard("allow"):
            gathered = multihost_utils.process_allgather(mine)
        self.paces = [Pace(float(step), float(data)) for step, data in gathered]
        self.line = describe(self.paces)
        return bool(self.line)
