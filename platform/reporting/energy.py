"""Joules that this machine's processors used, where Linux tells (powercap RAPL counters).

The counters cover whole processor packages, with whatever else runs on the machine, and not
accelerators. Most systems let only root read them.
"""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

from lamina.platform.reporting.storage import PathLike

ROOT = "/sys/class/powercap"


class Counter(NamedTuple):
    """One energy counter: microjoules, and the value after which it starts again at zero."""

    microjoules: int
    range_microjoules: int


def read(root: PathLike = ROOT) -> dict[str, Counter] | None:
    """Reads the counter of each processor package.

    Zones within a package ("intel-rapl:0:1") are part of its counter, "psys" is a sum over the
    whole board, and "intel-rapl-mmio" repeats the package's: none of these is read, so nothing
    counts twice.

    Args:
        root: the powercap folder.

    Returns:
        Zone name to counter; None where the machine doesn't tell (another system, a virtual
        machine, no permission).
    """
    counters = {}
    try:
        zones = sorted(pathlib.Path(root).iterdir())
    except OSError:
        return None
    for zone in zones:
        if zone.name.count(":") != 1 or "mmio" in zone.name:
            continue
        try:
            if (zone / "name").read_text().strip() == "psys":
                continue
            counters[zone.name] = Counter(
                int((zone / "energy_uj").read_text()),
                int((zone / "max_energy_range_uj").read_text()),
            )
        except (OSError, ValueError):
            continue
    return counters or None


def joules(
    before: Mapping[str, Counter] | None, after: Mapping[str, Counter] | None
) -> float | None:
    """Joules between two readings; a counter that is lower than before has wrapped around once.

    A package at 100 W wraps around in about 40 minutes, so read more often than that (`Meter`).

    Args:
        before: the earlier reading.
        after: the later reading.

    Returns:
        Joules summed over the zones of both readings, or None where there are none.
    """
    shared = sorted(set(before or {}) & set(after or {}))
    if not before or not after or not shared:
        return None
    total = 0
    for zone in shared:
        used = after[zone].microjoules - before[zone].microjoules
        total += used if used >= 0 else used + after[zone].range_microjoules
    return total / 1e6


class Meter:
    """Adds up joules over a run; call `update` every few minutes at the latest.

    Args:
        saved: joules of the sessions before (None where unknown or none).
        root: the powercap folder.
    """

    def __init__(self, saved: float | None = None, root: PathLike = ROOT):
        self._root = root
        self._last = read(root)
        self._total = saved

    def update(self) -> float | None:
        """Joules until now, earlier sessions included; None where the machine doesn't tell."""
        current = read(self._root)
        used = joules(self._last, current)
        if used is not None:
            self._total = (self._total or 0.0) + used
        self._last = current
        return self._total
