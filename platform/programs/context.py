"""What a program is given besides its config, and what it gives back."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lamina.platform.training.signals import StopRequest


class Context(NamedTuple):
    """What a program is given besides its config.

    Attributes:
        workdir: the run folder; it exists and is locked.
        trust: packages whose factories the config may name.
        stop: whether a signal has asked the run to stop.
        say: tells the user something that is no record.
        console: whether to print records.
    """

    workdir: str
    trust: Sequence[str]
    stop: StopRequest
    say: Callable[[str], None]
    console: bool = True


class Outcome(NamedTuple):
    """What a program gives back.

    Attributes:
        result: what `result.json` holds.
        state: the final train state, or None.
        stopped: why the run ended before its end, or "".
    """

    result: dict[str, Any]
    state: Any = None
    stopped: str = ""
