"""The ways in which a run can end badly, with the exit code that each one means."""

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from types import MappingProxyType


class LaminaError(Exception):
    """Base of the errors that Lamina raises on purpose; `exit_code` is the process's exit code."""

    exit_code = 1


class UserError(LaminaError):
    """Something that the user can put right: a config, a path, a file (exit code 2).

    The message says what was wrong, where, and what would be right.
    """

    exit_code = 2


class DivergedError(LaminaError):
    """The loss became infinite or not a number (exit code 3).

    Attributes:
        steps: seed to the first step whose loss was not finite, where that is known.
    """

    exit_code = 3

    def __init__(self, message: str, steps: Mapping[int, int] = MappingProxyType({})):
        super().__init__(message)
        self.steps = steps


class InterruptedRun(LaminaError):
    """The run was asked to stop; the same command resumes it (exit code 75, EX_TEMPFAIL)."""

    exit_code = 75


OUTSIDE = frozenset(
    {
        errno.EACCES,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
        errno.ESTALE,
    }
)
"""What the system says of files when a disk, a path or a permission is to blame, and not we."""


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns whatever keeps a file or folder of the user's choice from being written into words.

    Raises:
        UserError: the path can't be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{os.fspath(path)} can't be written: {error}") from error


@contextlib.contextmanager
def blaming_files(where: str) -> Iterator[None]:
    """Turns what a disk, a path or a permission is to blame for into a `UserError`.

    Args:
        where: what was being done, for the message; the file is named where it is known.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in OUTSIDE:
            raise
        file = f"{error.filename}: " if isinstance(error.filename, str) else ""
        raise UserError(f"{where}: {file}{error.strerror}") from error
