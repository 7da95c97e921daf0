"""Several runs side by side in one HTML file: curves, final numbers with paired tests, configs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lamina.platform.errors import UserError
from lamina.platform.reporting import curves, folder, formats, page, records, storage
from lamina.platform.reporting.charts import Line, chart
from lamina.platform.reporting.drawing import COLOURS
from lamina.platform.reporting.report import CHART_BYTES, SPEED, speed
from lamina.platform.reporting.storage import PathLike


class Run(NamedTuple):
    """What a comparison knows of one run: its label, files and colour."""

    label: str
    state: str
    config: dict[str, Any]
    entries: list[records.Record]
    result: Mapping[str, Any]
    final: Mapping[str, Any]
    seeds: list[int]
    slot: int


class Paired(NamedTuple):
    """A paired t-test of two runs.

    Attributes:
        n: seeds that both runs have a finite value for.
        difference: mean of (run - baseline); None where n is 0.
        error: the standard error of that mean; None where n < 2.
        p: the two-sided p value of "no difference"; None where n < 2 or all differences are equal.
    """

    n: int
    difference: float | None
    error: float | None
    p: float | None


def compare(workdirs: Sequence[PathLike], out: PathLike) -> Any:
    """Writes a page that compares runs; the first one is the baseline of the paired tests.

    Args:
        workdirs: two or more run folders.
        out: the HTML file to write.

    Returns:
        Its path.

    Raises:
        UserError: fewer than two runs, a folder that isn't one, or a corrupt file.
    """
    storage.write_text(out, build(workdirs))
    return storage.as_path(out)


def build(workdirs: Sequence[PathLike]) -> str:
    """The comparison as HTML; see `compare`."""
    runs = _load(workdirs)
    drawn, undrawn = _draw(runs)
    return page.render(
        "compare.html",
        runs=[
            {"label": run.label, "state": run.state, "slot": run.slot, "seeds": len(run.seeds)}
            for run in runs
        ],
        rows=_table(runs),
        charts=drawn,
        undrawn=undrawn,
        bands=any(len(run.seeds) > 1 for run in runs),
        speeds=_speeds(runs),
        differences=differences({run.label: run.config for run in runs}),
    )


def paired(run: Mapping[int, float | None], baseline: Mapping[int, float | None]) -> Paired:
    """Compares two runs by the seeds that they share (same order of data, same initialisation).

    Args:
        run: seed to value.
        baseline: seed to value.

    Returns:
        Mean difference, its standard error, and the p value of Student's t with n - 1 degrees of
        freedom.

    References:
        Student, "The probable error of a mean", Biometrika 6 (1908).
    """
    gaps = [
        float(run[seed]) - float(baseline[seed])  # type: ignore[arg-type]
        for seed in run
        if run[seed] is not None and baseline.get(seed) is not None
    ]
    mean, std, _ = records.summary(gaps)
    if mean is None or std is None or len(gaps) < 2:
        return Paired(len(gaps), mean, None, None)
    error = std / math.sqrt(len(gaps))
    # Differences that are equal but for rounding have no spread to test against.
    if error <= 1e-12 * max(abs(mean), 1e-300):
        return Paired(len(gaps), mean, error, None)
    from scipy import special

    return Paired(
        len(gaps), mean, error, 2 * float(special.stdtr(len(gaps) - 1, -abs(mean / error)))
    )


def differences(configs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The config keys in which runs differ.

    Args:
        configs: label to resolved config.

    Returns:
        Rows of "key" and "values" (texts, one per run; "" where a run has no such key).
    """
    flat = [storage.flatten(config) for config in configs.values()]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    rows = []
    for key in keys:
        values = [page.value(config[key]) if key in config else "" for config in flat]
        if len(set(values)) > 1:
            rows.append({"key": key, "values": values})
    return rows


def _load(workdirs: Sequence[PathLike]) -> list[Run]:
    if len(workdirs) < 2:
        raise UserError("A comparison needs two runs or more.")
    runs = []
    for place, (workdir, label) in enumerate(zip(workdirs, labels(workdirs), strict=True)):
        if not storage.as_path(workdir).is_dir():
            raise UserError(f"There is no run folder {workdir} to compare.")
        config, entries = folder.read_config(workdir), folder.read_metrics(workdir)
        seeds = list(config.get("seeds") or sorted({entry.seed for entry in entries}) or [0])
        result = folder.read_result(workdir) or {}
        final = result.get("final")
        if not isinstance(final, Mapping):
            final = records.summarise(entries, seeds=seeds)
        state = str(folder.read_status(workdir).get("state", ""))
        runs.append(Run(label, state, config, entries, result, final, seeds, place % COLOURS))
    return runs


def labels(workdirs: Sequence[PathLike]) -> list[str]:
    """The shortest ends of paths that tell the runs apart.

    Example:
        >>> labels(["runs/a/digits", "runs/b/digits", "runs/b/text"])
        ['a/digits', 'b/digits', 'b/text']
    """
    parts = [storage.as_path(workdir).parts for workdir in workdirs]
    for length in range(1, max(len(path) for path in parts) + 1):
        found = ["/".join(path[-length:]) for path in parts]
        if len(set(found)) == len(found):
            return found
    return [f"{'/'.join(path[-1:])} ({place})" for place, path in enumerate(parts, start=1)]


def _table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A group of rows per metric, a row per run."""
    width = max(len(run.seeds) for run in runs)
    found = [
        {(row["split"], row["metric"]): row for row in page.final_rows(run.final, width)}
        for run in runs
    ]
    names = dict.fromkeys(name for rows in found for name in rows)
    groups = []
    for name in sorted(names, key=lambda name: page.rank(name[0])):
        values = [_values(run, rows.get(name)) for run, rows in zip(runs, found, strict=True)]
        cells = []
        for place, run in enumerate(runs):
            mean, std, numbers = records.summary(values[place].values())
            n = len(numbers)
            test = paired(values[place], values[0]) if place else None
            cells.append(
                {
                    "label": run.label,
                    "slot": run.slot,
                    "mean": mean,
                    "error": std / math.sqrt(n) if std is not None and n > 1 else None,
                    "n": n,
                    "test": test,
                    "p": p_value(test.p) if test else "",
                }
            )
        groups.append({"split": name[0], "metric": name[1], "runs": cells})
    return groups


def _speeds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row per figure of speed, a cell per run."""
    found = [{figure["label"]: figure["value"] for figure in speed(run.result)} for run in runs]
    names = dict.fromkeys(label for _, label, _ in SPEED)
    return [
        {"label": name, "values": [figures.get(name, "") for figures in found]}
        for name in names
        if any(name in figures for figures in found)
    ]


def p_value(p: float | None) -> str:
    """A p value in two digits, or as a bound where more would pretend."""
    if p is None:
        return formats.DASH
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def _values(run: Run, row: Mapping[str, Any] | None) -> dict[int, float | None]:
    return dict(zip(run.seeds, row["values"], strict=False)) if row else {}


def _draw(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[str]]:
    """One chart per metric and split, with a line per run."""
    collected: dict[tuple[str, str], list[Line]] = {}
    for run in runs:
        for name, splits in curves.collect(run.entries).items():
            for split, curve in splits.items():
                collected.setdefault((split, name), []).append(Line(run.label, run.slot, curve))
    drawn: list[dict[str, Any]] = []
    undrawn: list[str] = []
    used = 0
    for split, name in sorted(collected, key=lambda key: page.rank(key[0])):
        lines = collected[split, name]
        title = f"{split} {name}"
        if all(len(line.curve.steps) < 2 for line in lines):
            continue
        if used >= CHART_BYTES:
            undrawn.append(title)
            continue
        svg = chart(lines, f"{title} over steps: {', '.join(line.label for line in lines)}")
        if svg:
            used += len(svg)
            log = curves.wants_log([line.curve for line in lines])
            drawn.append({"name": title, "svg": page.markup(svg), "log": log, "notes": []})
    return drawn, undrawn
