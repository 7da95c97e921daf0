"""`lamina plan`: ranks the layouts of a training step on a TPU pod, which needn't be here."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.platform.commands import arguments as parsing
from lamina.platform.commands.arguments import CONFIG_FLAGS, Flag
from lamina.platform.errors import UserError, writing

if TYPE_CHECKING:
    from lamina.platform.planning.search import Tried

FLAGS = {
    **CONFIG_FLAGS,
    "topology": Flag("", "a slice of a pod: v4, v5e, v5p or v6e and its chips, as v5e:16x16"),
    "slices": Flag(1, "how many slices, joined by the data-centre network"),
    "seconds": Flag(200, "after which no other layout is tried"),
    "layouts": Flag(20, "how many layouts are tried at most"),
    "out": Flag("", "a file for the reports on all layouts, as JSON"),
}

USAGE = f"""lamina plan --config=PATH_OR_NAME[:ARG] --topology=v5e:16x16 [--config.key=value ...]

Compiles the training step in several layouts (mesh shapes, presets, remat policies, accumulation)
with the TPU compiler (extra `tpu-aot`), ranks them by the estimated time of a step, and prints the
overrides of the best. The batch stays as it is. No TPU is needed.

{parsing.describe_flags(FLAGS)}"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    given = parsing.parse("plan", arguments, FLAGS)
    parsing.no_positional("plan", given)
    config, _, trust = parsing.load_config(given)

    import sys
    import time

    from ml_collections import ConfigDict

    from lamina.platform import config as configs
    from lamina.platform.planning import compiling, search, tables
    from lamina.platform.programs import table as programs
    from lamina.platform.reporting import tables as printed

    wanted = compiling.topology(given.flags["topology"], given.flags["slices"])
    for name in ("seconds", "layouts"):
        if given.flags[name] < 1:
            raise UserError(f"--{name}={given.flags[name]} should be at least 1")
    program = programs.find(config)

    def resolve(overrides: dict[str, Any]) -> Any:
        changed = ConfigDict(config.to_dict())
        for key, value in overrides.items():
            configs.override(changed, key, str(value))
        return program.resolve(changed, trust)

    resolve({})
    compiling.require_compiler()
    if given.flags["out"]:
        with writing(given.flags["out"]):
            Path(given.flags["out"]).touch()
    start, done = time.monotonic(), []
    for tried in search.search(
        resolve, trust, wanted, given.flags["seconds"], given.flags["layouts"]
    ):
        done.append(tried)
        print(f"{time.monotonic() - start:6.1f} s  {tried.candidate.flags}", file=sys.stderr)
    done.sort(key=lambda tried: tried.order)
    chips = f"{wanted.chips} chips of {wanted.name}"
    print(f"{len(done)} layouts on {chips}, in {time.monotonic() - start:.0f} s\n")
    printed.show(tables.ranking(done))
    _print_best(done[0])
    if given.flags["out"]:
        _write_reports(given.flags["out"], done)
    return 0


def _print_best(best: "Tried") -> None:
    if best.order[0]:
        print("\nNone of them fits.")
    else:
        print(f"\nThe best:\n\n  {best.candidate.flags}\n")
        for warning in best.found.warnings if best.found else ():
            print(f"Warning: {warning}.")
    print("Estimates from data sheets, not calibrated on a TPU: layouts whose bounds overlap tie.")


def _write_reports(path: str, done: Sequence["Tried"]) -> None:
    import json

    from lamina.platform.planning import analysis

    reports = [
        {
            "overrides": tried.candidate.overrides,
            "reason": tried.reason,
            "report": analysis.to_json(tried.found) if tried.found else None,
        }
        for tried in done
    ]
    with writing(path):
        Path(path).write_text(json.dumps(reports, indent=2) + "\n")
