"""Records: the numbers a run logs, one JSON object a line in `metrics.jsonl`."""

import json
import math
import os
import statistics
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from lamina.platform.errors import UserError
from lamina.platform.reporting import storage
from lamina.platform.reporting.storage import PathLike


class Record(NamedTuple):
    """One logged number.

    Attributes:
        step: training steps done when it was measured.
        split: "train", "validation", "test", or a name of the program's own.
        name: the metric, for instance "loss".
        value: the number; None where it was not finite.
        seed: the seed's value (not its place in `config.seeds`).
        time: seconds since the run began, over all its sessions.
    """

    step: int
    split: str
    name: str
    value: float | None
    seed: int = 0
    time: float = 0.0


class Summary(NamedTuple):
    """Mean and sample standard deviation over seeds; see `summary`."""

    mean: float | None
    std: float | None
    values: list[float | None]


def record(
    step: int, split: str, name: str, value: Any, seed: int = 0, time: float = 0.0
) -> Record:
    """Makes a record of any number (numpy and jax scalars too); None where it isn't finite."""
    return Record(int(step), split, name, finite(value), int(seed), float(time))


def finite(value: Any) -> float | None:
    """A Python float, or None for None and for what is infinite or not a number."""
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def encode(record: Record) -> str:
    """A record as one line of JSON, without the newline.

    Example:
        >>> encode(Record(10, "train", "loss", 0.5, seed=1, time=2.0))
        '{"step": 10, "split": "train", "name": "loss", "value": 0.5, "seed": 1, "time": 2.0}'
    """
    fields = record._replace(value=finite(record.value), time=round(record.time, 3))
    return json.dumps(fields._asdict(), allow_nan=False)


def decode(line: str | bytes) -> Record:
    """The record that a line holds.

    Raises:
        ValueError: the line is not JSON, or a field is missing or of another type.
    """
    data = json.loads(line)
    if not isinstance(data, dict):
        raise ValueError(f"expected an object, found {type(data).__name__}")
    try:
        return record(
            data["step"],
            str(data["split"]),
            str(data["name"]),
            data["value"],
            data.get("seed", 0),
            data.get("time", 0.0),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"bad or missing field: {error}") from error


def read(path: PathLike) -> list[Record]:
    """Reads a `metrics.jsonl`; an empty list where there is none.

    A last line without its newline is what a kill leaves of a write, and is dropped.

    Args:
        path: the file.

    Returns:
        The records in the file's order.

    Raises:
        UserError: a whole line is not a record; the message names file and line.
    """
    records = []
    for number, line in enumerate(_whole_lines(storage.read_bytes(path) or b""), start=1):
        if not line.strip():
            continue
        try:
            records.append(decode(line))
        except ValueError as error:
            raise UserError(
                f"{os.fspath(path)}, line {number}, is not a record ({error}). A record is a JSON "
                'object like {"step": 10, "split": "train", "name": "loss", "value": 0.5, '
                '"seed": 0, "time": 2.0}; remove the line to go on without it.'
            ) from error
    return records


def cut(path: PathLike, step: int, seeds: Collection[int] | None = None) -> list[Record]:
    """Takes a `metrics.jsonl` back to a checkpoint's step, so that a resumed run repeats nothing.

    Args:
        path: the file; nothing happens where there is none.
        step: the checkpoint's step; records up to and with it stay.
        seeds: the seeds that resume; records of other seeds stay whole. None: all seeds.

    Returns:
        The records that stay.

    Raises:
        UserError: a whole line is not a record.
    """
    data = storage.read_bytes(path)
    if data is None:
        return []
    kept = [
        entry
        for entry in read(path)
        if entry.step <= step or (seeds is not None and entry.seed not in seeds)
    ]
    text = lines(kept)
    if text != data:
        storage.write_bytes(path, text)
    return kept


def summary(values: Iterable[Any]) -> Summary:
    """Mean and spread of one number over seeds.

    The spread is the sample standard deviation (divided by n - 1), and 0.0 for one seed. Where one
    value is missing or not finite, mean and spread are None: a mean over the seeds that survived
    would flatter the method.

    Example:
        >>> summary([1.0, 3.0])
        Summary(mean=2.0, std=1.4142135623730951, values=[1.0, 3.0])
    """
    numbers = [finite(value) for value in values]
    known = [number for number in numbers if number is not None]
    if not known or len(known) < len(numbers):
        return Summary(None, None, numbers)
    spread = statistics.stdev(known) if len(known) > 1 else 0.0
    return Summary(statistics.fmean(known), spread, numbers)


def summarise(
    records: Iterable[Record], split: str = "", seeds: Sequence[int] = ()
) -> dict[str, dict[str, Any]]:
    """The latest value of every metric, over seeds.

    Args:
        records: the run's records.
        split: only this split, its metrics under their bare names; "" is all splits, as
            "split/name".
        seeds: the order of `values`; a seed without a record gives None. By default the order in
            which seeds first appear in the records.

    Returns:
        {name: {"mean", "std", "values"}}, as `summary` defines them.
    """
    latest: dict[str, dict[int, Record]] = {}
    order: dict[int, None] = dict.fromkeys(seeds)
    for entry in records:
        if split and entry.split != split:
            continue
        if not seeds:
            order.setdefault(entry.seed)
        name = entry.name if split else f"{entry.split}/{entry.name}"
        found = latest.setdefault(name, {}).get(entry.seed)
        if found is None or entry.step >= found.step:
            latest[name][entry.seed] = entry
    result = {}
    for name, by_seed in latest.items():
        values = [by_seed[seed].value if seed in by_seed else None for seed in order]
        result[name] = summary(values)._asdict()
    return result


def lines(records: Iterable[Record]) -> bytes:
    """Records as the bytes of a `metrics.jsonl`."""
    return "".join(encode(entry) + "\n" for entry in records).encode("ascii")


def whole_size(data: bytes) -> int:
    """Bytes up to and with the last newline; what follows is a torn line."""
    return data.rfind(b"\n") + 1


def _whole_lines(data: bytes) -> list[bytes]:
    return data[: whole_size(data)].splitlines()
