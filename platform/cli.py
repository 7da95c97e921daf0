"""The command line: one command for each file of `lamina.platform.commands`.

Only what a command needs is imported: `lamina --help` loads neither jax nor ml_collections.
"""

import atexit
import contextlib
import gc
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from lamina.platform.errors import LaminaError, blaming_files

COMMANDS = {
    "run": ("lamina.platform.commands.run", "trains, or goes on with a run that was stopped"),
    "fork": ("lamina.platform.commands.fork", "goes on from a checkpoint with another config"),
    "check": ("lamina.platform.commands.check", "builds everything without computing anything"),
    "compile": ("lamina.platform.commands.compile", "compiles for a TPU pod, without one"),
    "plan": ("lamina.platform.commands.plan", "ranks layouts for a TPU pod, without one"),
    "list": ("lamina.platform.commands.list", "shows shipped experiments and finished runs"),
    "compare": ("lamina.platform.commands.compare", "puts runs side by side in one HTML file"),
    "report": ("lamina.platform.commands.report", "writes a run's report.html again"),
    "merge": ("lamina.platform.commands.merge", "makes one model of several"),
    "export": ("lamina.platform.commands.export", "writes a trained model to one file"),
}
"""Command to (module with `main(arguments)` and `USAGE`, one-line description)."""

USAGE = """Lamina: experiments in JAX, from a config to a report.

  lamina run --config=quickstart --workdir=runs/quickstart
  lamina check --config=PATH_OR_NAME[:ARG] [--config.key=value ...]

Commands (lamina COMMAND --help tells more):
{commands}

Exit codes: 0 done, 2 your mistake, 3 diverged, 75 interrupted and resumable, 1 our bug."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: without the program's name; default: the process's.

    Returns:
        The exit code.
    """
    # Imports and tracing make very many objects that stay: looking for garbage among them again and
    # again takes a tenth of a short run.
    gc.set_threshold(500_000, 20, 100)
    atexit.register(gc.freeze)  # nor does the interpreter at its end, which takes another tenth
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("--help", "-h", "help", "--helpfull"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib import metadata

        print(f"lamina {metadata.version('lamina')}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        print(f"lamina: there is no command {name!r}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    # Names such as "my_package.my_module:factory" are looked for here too, after all else.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(COMMANDS[name][0])
        if "--help" in rest or "-h" in rest:
            print(module.USAGE)
            return 0
        with blaming_files("a file can't be used"):
            return module.main(rest)
    except LaminaError as error:
        with contextlib.suppress(BrokenPipeError):
            print(f"lamina {name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output has gone, as in `lamina list | head`
        return 0
    finally:
        _flush()


def _flush() -> None:
    """Writes out what is printed; what nobody reads any more is dropped, without a complaint."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def usage() -> str:
    """Returns the help text."""
    lines = [f"  {name:<8} {about}" for name, (_, about) in COMMANDS.items()]
    return USAGE.format(commands="\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
