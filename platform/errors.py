"""The ways in which a run can end badly, with the exit code that each one means."""


class LaminaError(Exception):
    """Base of the errors that Lamina raises on purpose; `exit_code` is the process's exit code."""

    exit_code = 1


class UserError(LaminaError):
    """Something that the user can put right: a config, a path, a file (exit code 2).

    The message says what was wrong, where, and what would be right.
    """

    exit_code = 2


class DivergedError(LaminaError):
    """The loss became infinite or not a number (exit code 3)."""

    exit_code = 3


class InterruptedRun(LaminaError):
    """The run was asked to stop; the same command resumes it (exit code 75, EX_TEMPFAIL)."""

    exit_code = 75
