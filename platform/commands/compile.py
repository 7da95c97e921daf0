"""`lamina compile`: what the training step would be on a TPU pod, which needn't be here."""

from collections.abc import Sequence
from pathlib import Path

from lamina.platform.commands import arguments as parsing
from lamina.platform.commands.arguments import CONFIG_FLAGS, Flag
from lamina.platform.errors import UserError, writing

FLAGS = {
    **CONFIG_FLAGS,
    "topology": Flag("", "a slice of a pod: v4, v5e, v5p or v6e and its chips, as v5e:16x16"),
    "slices": Flag(1, "how many slices, joined by the data-centre network"),
    "out": Flag("", "a file for the whole report, as JSON"),
    "full": Flag(False, "whether to compile to the end (minutes), for the code's size too"),
    "dump": Flag("", "a new folder for what the compiler writes, the scheduled program included"),
}

USAGE = f"""lamina compile --config=PATH_OR_NAME[:ARG] --topology=v5e:16x16 [--config.key=value ...]

Compiles the training step with the TPU compiler (extra `tpu-aot`), and reports whether it fits,
bytes per device, collectives, FLOPs, and an estimate of step time and MFU with its bounds. No TPU
is needed. Where the data set isn't on this machine, its `stand_in` is taken.

{parsing.describe_flags(FLAGS)}"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    given = parsing.parse("compile", arguments, FLAGS)
    parsing.no_positional("compile", given)
    config, _, trust = parsing.load_config(given)

    import json

    from lamina.platform.planning import analysis, compiling, tables
    from lamina.platform.programs import table as programs
    from lamina.platform.reporting import tables as printed

    wanted = compiling.topology(given.flags["topology"], given.flags["slices"])
    resolved = programs.find(config).resolve(config, trust)
    compiling.require_compiler()
    if given.flags["out"]:
        with writing(given.flags["out"]):
            Path(given.flags["out"]).touch()
    folder = _folder(given.flags["dump"])
    outcome = compiling.compile_step(resolved, trust, wanted, given.flags["full"], folder)
    found = analysis.analyse(outcome, wanted)
    print(tables.summary(found) + "\n")
    printed.show(tables.memory(found))
    if found.estimate is not None:
        print()
        printed.show(tables.collectives(found))
        print()
        printed.show(tables.times(found))
    for note in tables.notes(found):
        print(note)
    for warning in found.warnings:
        print(f"\nWarning: {warning}.")
    if given.flags["out"]:
        text = json.dumps(analysis.to_json(found), indent=2)
        with writing(given.flags["out"]):
            Path(given.flags["out"]).write_text(text + "\n")
    return 0


def _folder(name: str) -> Path | None:
    if not name:
        return None
    folder = Path(name)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"--dump={name} should be a new or empty folder")
    return folder
