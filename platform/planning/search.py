"""Search of layouts: mesh shapes, presets, remat policies and accumulation, ranked by the estimate.

The search is a short list in two rounds. The first compiles layouts that are known to be good or
are good to know (plain data parallelism among them) with the config's remat policy and
accumulation; the second changes these two for the best of the first. Each compilation ends after
buffer assignment. When the time is up, what is there is ranked.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lamina.platform.errors import UserError
from lamina.platform.planning import analysis, compiling
from lamina.platform.planning.analysis import Analysis
from lamina.sharding.pods.topologies import Topology
from lamina.sharding.rules import PRESETS

AXES = ("data", "fsdp", "tensor")
"""Mesh axes over which the search distributes the devices."""
REMAT = ("full", "dots", "none")
"""Remat policies of `lamina.models.stack`, the one that keeps least first."""


class Candidate(NamedTuple):
    """A layout to try.

    Attributes:
        sizes: of the mesh axes `AXES`.
        rules: preset of the sharding rules.
        remat: policy; "" leaves the model as it is.
        accumulation: parts of a batch.
    """

    sizes: tuple[int, int, int]
    rules: str
    remat: str
    accumulation: int

    @property
    def overrides(self) -> dict[str, Any]:
        """Config keys to values."""
        keys: dict[str, Any] = {
            f"mesh.{name}": size for name, size in zip(AXES, self.sizes, strict=True)
        }
        keys["sharding.rules"] = self.rules
        if self.remat:
            keys["model.remat"] = self.remat
        return {**keys, "accumulation": self.accumulation}

    @property
    def flags(self) -> str:
        """The overrides for a command line."""
        return " ".join(f"--config.{key}={value}" for key, value in self.overrides.items())


class Tried(NamedTuple):
    """A layout and what came of it.

    Attributes:
        candidate: the layout.
        found: its analysis; None if it couldn't be compiled.
        reason: why it couldn't.
    """

    candidate: Candidate
    found: Analysis | None
    reason: str

    @property
    def order(self) -> tuple[int, float]:
        """Sorts what fits by its time, then what doesn't by its size, then what failed."""
        if self.found is None:
            return 2, 0.0
        if not self.found.fits or self.found.estimate is None:
            return 1, self.found.needed
        return 0, self.found.estimate.estimate


def layouts(devices: int, slices: int = 1) -> list[tuple[tuple[int, int, int], str]]:
    """Returns (mesh sizes, preset) pairs worth trying, the most promising first.

    Args:
        devices: how many there are.
        slices: over which `data` has to go where there are several.
    """
    within = devices // slices

    def hybrid(part: int) -> tuple[tuple[int, int, int], str]:
        part = max(part, 1)
        return (devices // part, part, 1), "fsdp"

    def split(ways: int, rules: str) -> tuple[tuple[int, int, int], str]:
        return (slices, within // ways, ways), rules

    def whole(ways: int, rules: str) -> tuple[tuple[int, int, int], str]:
        return (devices // ways, 1, ways), rules

    wanted = [
        hybrid(within),
        hybrid(within // 4),
        hybrid(within // 16),
        whole(1, "data"),
        whole(1, "zero1"),
        split(4, "fsdp+tensor"),
        split(2, "fsdp+tensor"),
        split(8, "fsdp+tensor"),
        whole(8, "sequence"),
        whole(4, "tensor"),
        hybrid(within // 2),
        hybrid(within // 8),
    ]
    found = []
    for sizes, rules in wanted:
        right = sizes[0] * sizes[1] * sizes[2] == devices
        split_at_all = rules != "fsdp" or sizes[1] > 1
        if right and split_at_all and rules in PRESETS and (sizes, rules) not in found:
            found.append((sizes, rules))
    return found


def first_round(config: Any, devices: int, slices: int = 1) -> list[Candidate]:
    """Returns the layouts with the config's own remat policy and, where it can be, accumulation.

    Args:
        config: resolved.
        devices: how many there are.
        slices: of them.
    """
    remat = config.model.get("remat", "")
    return [
        Candidate(sizes, rules, remat, parts)
        for sizes, rules in layouts(devices, slices)
        if (parts := _accumulation(config, sizes, config.accumulation))
    ]


def second_round(config: Any, best: Sequence[Tried]) -> list[Candidate]:
    """Returns the best layouts with other remat policies and accumulations, in turns.

    Args:
        config: resolved.
        best: of the first round, best first.
    """
    return [
        candidate
        for choices in zip(*(_variations(config, tried) for tried in best), strict=False)
        for candidate in choices
        if candidate is not None
    ]


def _variations(config: Any, tried: Tried) -> list[Candidate | None]:
    base = tried.candidate
    policies = [p for p in REMAT if base.remat and p != base.remat]
    found = [base._replace(remat=policy) for policy in policies]
    for parts in (base.accumulation * 2, base.accumulation // 2):
        if parts >= 1 and _accumulation(config, base.sizes, parts) == parts:
            found.append(base._replace(accumulation=parts))
    return [*found, *[None] * (4 - len(found))]


def _accumulation(config: Any, sizes: Sequence[int], wanted: int) -> int:
    """Returns the largest number of parts up to `wanted` that a batch can be cut into; or 0."""
    rows, rest = divmod(config.data.batch_size, sizes[0] * sizes[1])
    if rest:
        return 0
    return max((n for n in range(1, wanted + 1) if rows % n == 0), default=0)


def search(
    resolve: Callable[[dict[str, Any]], Any],
    trust: Sequence[str],
    wanted: Topology,
    seconds: float,
    most: int,
) -> Iterator[Tried]:
    """Yields layouts as they are tried; at the end of the time, or of the list, it ends.

    Args:
        resolve: overrides to the resolved config.
        trust: packages whose factories the config may name.
        wanted: the topology.
        seconds: after which no other compilation begins.
        most: layouts to try.

    Raises:
        UserError: there is no layout to try.
    """
    compiling.require_compiler()
    start, config = time.monotonic(), resolve({})
    waiting = first_round(config, wanted.chips, wanted.slices)
    if not waiting:
        raise UserError(
            f"data.batch_size = {config.data.batch_size} doesn't divide over any layout of "
            f"{wanted.chips} chips: use a multiple of {wanted.chips}"
        )
    done: list[Tried] = []
    longest = 0.0
    again = True
    with tempfile.TemporaryDirectory(prefix="lamina-plan-") as folder:
        while len(done) < most and time.monotonic() - start + longest < seconds:
            if not waiting and again:
                again = False
                fitting = [t for t in sorted(done, key=lambda t: t.order) if t.order[0] == 0]
                waiting = second_round(config, fitting[:2])
            if not waiting:
                break
            candidate, begun = waiting.pop(0), time.monotonic()
            place = Path(folder) / str(len(done))
            place.mkdir()
            tried = attempt(candidate, resolve, trust, wanted, place)
            longest = max(longest, time.monotonic() - begun)
            done.append(tried)
            yield tried


def attempt(
    candidate: Candidate,
    resolve: Callable[[dict[str, Any]], Any],
    trust: Sequence[str],
    wanted: Topology,
    folder: Path,
) -> Tried:
    """Compiles one layout."""
    try:
        outcome = compiling.compile_step(resolve(candidate.overrides), trust, wanted, folder=folder)
        return Tried(candidate, analysis.analyse(outcome, wanted), "")
    except (UserError, RuntimeError) as error:
        return Tried(candidate, None, " ".join(str(error).split())[:300])
