"""`lamina merge`: makes one model of several, from files of any size or from runs."""

import ast
import contextlib
import signal
import time
from collections.abc import Sequence
from typing import Any

from lamina.platform.commands import arguments as parsing
from lamina.platform.commands.arguments import Flag
from lamina.platform.errors import InterruptedRun, UserError

FLAGS = {
    "method": Flag("", "such as linear, slerp, task_arithmetic, ties, ties_per_tensor, dare"),
    "models": Flag((), "the models, with commas: *.safetensors, Hugging Face folders, or runs"),
    "base": Flag("", "what the models were fine-tuned from, for methods that need it"),
    "out": Flag("", "a file that ends in .safetensors, or a folder"),
    "set": Flag((), "the method's keys: --set=density=0.2,scale=0.7"),
    "weights": Flag((), "a number for each model"),
    "dtype": Flag("", "float32, float16 or bfloat16; default: as the base or the first model"),
    "statistics": Flag((), "for method fisher: a file of each model's, as statistics.save writes"),
    "align": Flag(
        False, "match the units of all to the base's or the first's before (runs, or files of such)"
    ),
    "dry_run": Flag(False, "check everything that headers tell, and write nothing"),
    "trust": Flag((), "packages whose factories the runs' configs may name"),
}

USAGE = f"""lamina merge --method=NAME --models=A,B[,...] --out=PATH [--base=C]

Merges models that have the same tensors. Files are read and written in pieces, whatever their
size; the output appears whole or not at all, and has a manifest with a hash of each input. The
other files of a Hugging Face folder are carried over from the base, or from the first model.

{parsing.describe_flags(FLAGS)}"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    given = parsing.parse("merge", [_dashes(argument) for argument in arguments], FLAGS)
    parsing.no_positional("merge", given)
    flags = given.flags
    for needed in ("method", "models", "out"):
        if not flags[needed]:
            raise UserError(f"--{needed} is missing: {FLAGS[needed].help}")

    from lamina.platform.merging import files
    from lamina.platform.programs import merge
    from lamina.platform.training import signals

    prepared = merge.prepare(
        flags["method"],
        _settings(flags["set"]),
        models=flags["models"],
        base=flags["base"],
        weights=[_number(text) for text in flags["weights"]],
        dtype=flags["dtype"],
        out=flags["out"],
        trust=tuple(flags["trust"]),
        align=flags["align"],
        statistics=flags["statistics"],
    )
    layouts = prepared.layouts.values()
    size = sum(layout.nbytes for layout in layouts)
    what = f"{len(layouts)} tensors, {size / 1e9:.3g} GB, to {flags['out']}"
    if flags["dry_run"]:
        print(f"would merge {what}")
        return 0
    start = time.monotonic()
    stops = signals.handled((signal.SIGTERM, signal.SIGINT), _stop)
    with stops, contextlib.closing(merge.Progress(prepared.elements)) as progress:
        files.run(prepared, progress)
    print(f"merged {what} in {time.monotonic() - start:.1f} s")
    return 0


def _stop(number: int, frame: object) -> None:
    """Ends a merge for a signal as an error does, so that it cleans up."""
    del frame
    raise InterruptedRun(
        f"stopped by {signal.Signals(number).name}: nothing was written, the same command merges "
        "again"
    )


def _dashes(argument: str) -> str:
    """`--dry-run` as absl would have it, `--dry_run`."""
    name, given, value = argument.partition("=")
    return name.replace("--dry-run", "--dry_run") + given + value


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for key, value in map(_setting, texts):
        if key in settings:
            raise UserError(f"--set gives {key} twice: {settings[key]!r} and {value!r}")
        settings[key] = value
    return settings


def _setting(text: str) -> tuple[str, Any]:
    key, given, value = text.partition("=")
    if not given:
        raise UserError(f"--set={text!r} should be key=value, such as density=0.2")
    try:
        return key.strip(), ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
    except (ValueError, SyntaxError):
        return key.strip(), value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"--weights: {text!r} is no number") from error
