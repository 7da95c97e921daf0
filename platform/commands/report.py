"""`lamina report`: writes a run's report.html again."""

from collections.abc import Sequence

from lamina.platform.commands import arguments as parsing
from lamina.platform.errors import UserError

USAGE = """lamina report DIR

Writes DIR/report.html from what the run has recorded so far, and prints its path."""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    given = parsing.parse("report", arguments, {})
    if len(given.positional) != 1:
        raise UserError("give one run folder")
    workdir = given.positional[0]

    from lamina.platform.reporting import folder, report

    folder.check_run(workdir)
    print(report.render(workdir))
    return 0
