"""Signals that ask a run to stop: they set a flag, which the loop reads between dispatches."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lamina.platform.errors import InterruptedRun


class StopRequest:
    """Whether a signal has asked the run to stop.

    Attributes:
        signal: the signal's name, or "" as long as there was none.
    """

    def __init__(self) -> None:
        self.signal = ""

    def agreed(self, dispatch: int) -> bool:
        """Returns whether to stop after this dispatch; all processes get the same answer.

        Args:
            dispatch: counts up by 1 from call to call: the processes agree on one of these numbers.
        """
        import jax

        if jax.process_count() == 1:
            return bool(self.signal)
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(dispatch)

    def before(self, what: str, number: int = 0) -> None:
        """Ends the run if it was asked to stop, before something that it hasn't begun.

        Args:
            what: for the message.
            number: as `agreed` wants it.

        Raises:
            InterruptedRun: a signal asked to stop.
        """
        if self.agreed(number):
            raise InterruptedRun(
                f"stopped by {self.signal or 'another process'} before {what}: the same command "
                "resumes"
            )


@contextmanager
def catch() -> Iterator[StopRequest]:
    """Catches SIGTERM and SIGINT while the body runs; a second SIGINT interrupts at once."""
    import jax

    request = StopRequest()

    def handle(number: int, frame: object) -> None:
        del frame
        if request.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number).name
        if jax.process_count() > 1:  # jax tells the other processes of a SIGTERM, and only of that
            os.kill(os.getpid(), signal.SIGTERM)

    numbers = [signal.SIGINT]
    if jax.process_count() == 1:  # otherwise jax's coordination service spreads SIGTERM
        numbers.append(signal.SIGTERM)
    with handled(numbers, handle):
        yield request


@contextmanager
def handled(numbers: Sequence[int], handle: Callable[[int, object], None]) -> Iterator[None]:
    """Calls `handle(number, frame)` for these signals while the body runs.

    Outside of the main thread Python delivers no signals, so nothing is handled there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
