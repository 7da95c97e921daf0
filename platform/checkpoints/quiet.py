"""Keeps Orbax's threads from printing the errors that reach us as exceptions anyway."""

import logging
import os
import sys

ORBAX = f"{os.sep}orbax{os.sep}checkpoint{os.sep}"


def down() -> None:
    """Filters what a failed save would print besides its exception; calling it again is free."""
    for name in ("absl", "asyncio"):
        logger = logging.getLogger(name)
        if _worth_logging not in logger.filters:
            logger.addFilter(_worth_logging)
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)


def _worth_logging(record: logging.LogRecord) -> bool:
    if record.levelno != logging.ERROR:
        return True
    if record.name == "asyncio":  # of a task that failed after another one had
        text = record.getMessage()
        return ORBAX not in text and ".orbax-checkpoint-tmp" not in text
    return ORBAX not in record.pathname


class _Hook:
    """An unraisablehook that passes over TensorStore's writes that end after their event loop."""

    def __init__(self, hook):
        self._hook = hook

    def __call__(self, unraisable) -> None:
        error = unraisable.exc_value
        if not isinstance(error, RuntimeError) or str(error) != "Event loop is closed":
            self._hook(unraisable)
