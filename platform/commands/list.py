"""`lamina list`: shows the shipped experiments, or the runs below a folder."""

import ast
import os
from collections.abc import Sequence
from pathlib import Path

from lamina.platform.commands import arguments as parsing
from lamina.platform.errors import UserError

USAGE = """lamina list [DIR ...]

Without a folder: the shipped experiments. With folders: the runs in and below them, with their
status and final numbers."""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    given = parsing.parse("list", arguments, {})
    if not given.positional:
        print("\n".join(experiment_lines()))
        if os.path.isdir("runs"):
            print("\nRuns are shown by `lamina list runs`.")
        return 0
    from lamina.platform.reporting import folder, tables

    for root in given.positional:
        if not os.path.isdir(root) and "://" not in root:
            raise UserError(f"there is no folder {root}")
        found = folder.list_runs(root)
        if found:
            tables.show(tables.runs_table(found))
        else:
            print(f"There are no runs in {root}.")
    return 0


def experiment_lines() -> list[str]:
    """Returns one line per shipped experiment: its name and its file's first docstring line."""
    from lamina.platform import config as configs

    shipped = configs.shipped_experiments()
    width = max(map(len, shipped), default=0)
    return [f"{name:<{width}}  {first_line(path)}" for name, path in shipped.items()]


def first_line(path: Path) -> str:
    """Returns the first line of a Python file's docstring, without running it."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
