"""The error of a checkpoint that could not be written, and its cause in plain words."""

import logging

from lamina.platform.errors import UserError


class CheckpointError(UserError):
    """A checkpoint could not be written; earlier ones are intact, and the run may go on."""


# What the layers below (the kernel, TensorStore, Orbax) say, and what it means for the user.
_CAUSES = (
    ("No space left on device", "the disk is full"),
    ("Disk quota exceeded", "the disk quota is used up"),
    ("File too large", "a file would exceed the size limit of this process"),
    ("Read-only file system", "the file system is read-only"),
    ("Permission denied", "permission denied"),
    ("Operation not permitted", "operation not permitted"),
    ("Not a directory", "a part of the path is not a folder"),
)


def cause(error: BaseException) -> str:
    """One line on why an operation failed, found anywhere in the chain of its causes."""
    link: BaseException | None = error
    while link is not None:
        for sign, meaning in _CAUSES:
            if sign in str(link):
                return f"{meaning} ({sign})" if meaning.lower() != sign.lower() else meaning
        link = link.__cause__ or link.__context__
    text, _, _ = str(error).strip().partition(". See full TensorStore")
    lines = text.splitlines()
    return lines[0] if lines else type(error).__name__


def quieten() -> None:
    """Keeps asyncio from printing a traceback for a failed write of Orbax, which is told anyway."""
    logging.getLogger("asyncio").addFilter(_tells_more)


def _tells_more(record: logging.LogRecord) -> bool:
    failed = record.exc_info[1] if record.exc_info else None
    return not isinstance(failed, OSError)
