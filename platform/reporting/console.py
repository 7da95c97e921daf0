"""The console writer: plain lines in a log file, a progress bar on a terminal."""

import collections
import math
import os
import sys
from collections.abc import Sequence
from typing import TextIO

from lamina.platform.reporting import formats
from lamina.platform.reporting.protocol import NULL, RunInfo, Writer
from lamina.platform.reporting.records import Record, summary

WINDOW = 20
"""Moments over which the rate of steps is taken (our choice: follows changes, rides out one slow
checkpoint)."""


SECONDS_BETWEEN_LINES = 1.0
"""Training values are printed this far apart at least; other splits and the last step always."""

DETAILS = ("gradient_norm", "update_norm")
"""Metrics that are recorded but not printed."""


def console(run: RunInfo, *, progress: bool = True) -> Writer:
    """Prints what is recorded, with the rate and the time that is left; only on process 0.

    On a terminal a bar shows the newest training values, and the other splits are printed above it.
    Elsewhere there are plain lines: training values once a second at most, other splits always.

    Args:
        run: what to print for.
        progress: whether to draw the bar on a terminal.
    """
    if run.process_index != 0:
        return NULL
    stream = run.stream or sys.stdout
    if progress and is_terminal(stream):
        return _bar(run, stream)
    return _lines(run, stream)


def is_terminal(stream: TextIO) -> bool:
    """Tells whether a stream is a terminal that can redraw a line."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


class Pace:
    """Steps per second over the last records, from the records' own times.

    Evaluation and checkpoints are in it, compilation of the first step is not: this is what the
    remaining time depends on.
    """

    def __init__(self) -> None:
        self._moments: collections.deque[tuple[int, float]] = collections.deque(maxlen=WINDOW)

    def add(self, records: Sequence[Record]) -> None:
        """Takes note of the steps and times of records."""
        for record in records:
            if self._moments and self._moments[-1][0] == record.step:
                continue
            self._moments.append((record.step, record.time))

    def rate(self) -> float | None:
        """Steps per second, or None before two moments are known."""
        if len(self._moments) < 2:
            return None
        (first, begin), (last, end) = self._moments[0], self._moments[-1]
        return (last - first) / (end - begin) if end > begin and last > first else None

    def describe(self, run: RunInfo, step: int) -> str:
        """The rate, the throughput and the remaining time as words; "" before they are known."""
        rate = self.rate()
        if rate is None:
            return ""
        words = [f"{formats.compact(rate)} steps/s"]
        if run.examples_per_step:
            words.append(f"{formats.compact(rate * run.examples_per_step)} examples/s")
        if run.steps > step:
            words.append(f"{formats.duration((run.steps - step) / rate)} left")
        return ", ".join(words)


def describe(records: Sequence[Record]) -> str:
    """Records of one step and split as words; several seeds as mean ± standard deviation.

    Example:
        >>> describe([Record(1, "train", "loss", 0.5, 0), Record(1, "train", "loss", 0.7, 1)])
        'loss 0.6000 ±0.1414'
    """
    values: dict[str, list[float | None]] = {}
    for record in records:
        if not record.name.startswith(DETAILS):
            values.setdefault(record.name, []).append(record.value)
    words = []
    for name, over_seeds in values.items():
        mean, std, _ = summary(over_seeds)
        text = f"{name} {formats.number(mean, missing='not finite')}"
        words.append(f"{text} ±{formats.number(std)}" if std is not None and std > 0 else text)
    return "  ".join(words)


def _groups(records: Sequence[Record]) -> dict[tuple[int, str], list[Record]]:
    groups: dict[tuple[int, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.step, record.split), []).append(record)
    return groups


def _where(run: RunInfo, step: int) -> str:
    width = len(str(run.steps))
    return f"step {step:>{width}}/{run.steps}" if run.steps else f"step {step}"


def _lines(run: RunInfo, stream: TextIO) -> Writer:
    pace = Pace()
    told = -1
    last_time = -math.inf

    def write(records: Sequence[Record]) -> None:
        nonlocal told, last_time
        pace.add(records)
        for (step, split), group in _groups(records).items():
            if split == "train" and step != run.steps:
                if group[0].time - last_time < SECONDS_BETWEEN_LINES:
                    continue
                last_time = group[0].time
            line = f"{_where(run, step)}  {split:<10}  {describe(group)}"
            speed = pace.describe(run, step)
            if speed and step != told:  # once for every step, not again for each split
                told = step
                line += f"  ({speed})"
            print(line, file=stream, flush=True)

    return Writer(write, stream.flush, stream.flush)


def _bar(run: RunInfo, stream: TextIO) -> Writer:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    pace = Pace()
    bar = Progress(
        TextColumn("{task.fields[where]}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[values]}", markup=False),
        TextColumn("{task.fields[speed]}", markup=False, style="dim"),
        console=Console(file=stream),
        refresh_per_second=4,
    )
    task = bar.add_task(
        "",
        total=run.steps or None,
        completed=run.start_step,
        where=_where(run, run.start_step),
        values="",
        speed="compiling",
    )
    bar.start()

    def write(records: Sequence[Record]) -> None:
        pace.add(records)
        for (step, split), group in _groups(records).items():
            words = describe(group)
            if split == "train":
                bar.update(task, values=words)
            else:
                line = f"{_where(run, step)}  {split:<10}  {words}"
                bar.console.print(line, markup=False, highlight=False)
            bar.update(
                task,
                completed=step,
                where=_where(run, step),
                speed=pace.describe(run, step),
            )

    return Writer(write, lambda: None, bar.stop)
