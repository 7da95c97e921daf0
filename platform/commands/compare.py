"""`lamina compare`: puts runs side by side in one HTML file."""

from collections.abc import Sequence

from lamina.platform.commands import arguments as parsing
from lamina.platform.commands.arguments import Flag
from lamina.platform.errors import UserError, writing

FLAGS = {"out": Flag("", "the HTML file to write")}

USAGE = f"""lamina compare DIR DIR ... --out=FILE.html

Writes curves, final numbers, paired tests and differences of configs into one file.

{parsing.describe_flags(FLAGS)}"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    given = parsing.parse("compare", arguments, FLAGS)
    if not given.positional:
        raise UserError("give the folders of the runs to compare")
    if not given.flags["out"]:
        raise UserError("--out is missing: the HTML file to write")

    from lamina.platform.reporting import compare, folder

    for workdir in given.positional:
        folder.check_run(workdir)
    with writing(given.flags["out"]):
        print(compare.compare(given.positional, given.flags["out"]))
    return 0
