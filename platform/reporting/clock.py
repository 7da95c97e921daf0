"""Wall-clock accounting of a run by phases, over all the sessions that it took."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping


class Clock:
    """Seconds per phase. Its totals go into a checkpoint and come back when the run resumes.

    A phase inside a phase stops the outer one, so that phases never overlap and their sum is the
    time that passed. Time after the last checkpoint of a killed session is in no total: that work
    is done again, and counted then.

    Args:
        saved: `totals()` of the session before, from the checkpoint's metadata.
        now: the clock, in seconds.

    Example:
        >>> ticks = iter([0.0, 1.0, 4.0, 10.0])
        >>> clock = Clock({"train": 100.0}, now=lambda: next(ticks))
        >>> with clock.phase("train"):
        ...     pass
        >>> clock.totals()
        {'train': 103.0, 'other': 7.0}
    """

    def __init__(
        self, saved: Mapping[str, float] | None = None, now: Callable[[], float] = time.monotonic
    ):
        self._now = now
        self._seconds = {str(name): float(value) for name, value in (saved or {}).items()}
        self._open = ["other"]
        self._since = now()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time of a `with` block as this phase."""
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def totals(self) -> dict[str, float]:
        """Seconds per phase until now, earlier sessions included; JSON can hold it."""
        self._settle()
        return dict(self._seconds)

    def elapsed(self) -> float:
        """Seconds of the whole run until now, earlier sessions included (`Record.time`)."""
        return sum(self.totals().values())

    def _settle(self) -> None:
        """Books the time since the last change to the phase that is open."""
        now = self._now()
        name = self._open[-1]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now
