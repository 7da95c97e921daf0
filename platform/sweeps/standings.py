"""The standings of a shoot-out: what its cells say, as plain numbers for the result and report."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lamina.platform.reporting import records
from lamina.platform.sweeps import cells, scoring
from lamina.platform.sweeps.cells import Cell
from lamina.platform.sweeps.pairs import Pair
from lamina.platform.training import layout

CLOCKS = ("steps", "seconds")


def by_pair(pairs: Sequence[Pair], value: Callable[[Pair], Any]) -> dict[str, dict[str, Any]]:
    """Returns optimizer to workload to `value(pair)`."""
    found: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        found.setdefault(pair.optimizer, {})[pair.workload] = value(pair)
    return found


def build(
    pairs: Sequence[Pair],
    studies: Mapping[tuple[str, str], Sequence[Cell]],
    fresh: Mapping[tuple[str, str], Cell],
    clock: str,
    ranking: bool,
) -> dict[str, Any]:
    """Returns the standings; infinite times become null when they are written.

    Args:
        pairs: every optimizer on every workload.
        studies: (workload, optimizer) to the cells of its studies.
        fresh: to the cell of its best point under fresh seeds.
        clock: "steps" or "seconds": what the ranking goes by.
        ranking: whether to rank.
    """
    key = lambda pair: (pair.workload, pair.optimizer)
    again = lambda pair: fresh[key(pair)]["trials"][0]
    tuned = lambda pair: [trial for cell in studies[key(pair)] for trial in cell["trials"]]

    def study_time(which: str) -> Callable[[Pair], float]:
        first = lambda cell: [cells.times(trial, which)[0] for trial in cell["trials"]]
        return lambda pair: scoring.study_score([first(cell) for cell in studies[key(pair)]])

    times = {which: by_pair(pairs, study_time(which)) for which in CLOCKS}
    seeds = {which: by_pair(pairs, lambda p, w=which: cells.times(again(p), w)) for which in CLOCKS}
    medians = {
        which: {o: {w: median(t) for w, t in own.items()} for o, own in seeds[which].items()}
        for which in CLOCKS
    }
    workloads = {pair.workload: pair for pair in pairs}
    found: dict[str, Any] = {
        "clock": clock,
        "targets": {
            name: {
                "metric": p.metric,
                "mode": p.mode,
                "target": p.target,
                "steps": p.parts.steps,
                "early": early(p, pairs, fresh),
            }
            for name, p in workloads.items()
        },
        "tuning": {
            p.optimizer: {
                "keys": list(p.studies[0][0].values),
                "trials": len(p.studies[0]),
                "studies": len(p.studies),
            }
            for p in pairs
        },
        "times": times,
        "fresh": by_pair(pairs, lambda p: fresh_numbers(again(p))),
        "winners": {
            name: scoring.winner({o: own[name] for o, own in seeds[clock].items()})
            for name in workloads
        },
        "sensitivity": by_pair(pairs, lambda p: share(tuned(p))),
        "diverged": by_pair(pairs, lambda p: sum(bool(t["diverged"]) for t in tuned(p))),
        "best_points": by_pair(pairs, lambda p: again(p)["values"]),
        "cost": by_pair(pairs, lambda p: cost(p, again(p))),
        "curves": {
            name: {p.optimizer: median_curve(again(p), p.mode) for p in pairs if p.workload == name}
            for name in workloads
        },
    }
    if ranking:
        score = {which: scoring.scores(times[which]) for which in CLOCKS}
        found |= {
            "ranked": sorted(score[clock], key=lambda name: -score[clock][name]),
            "score": score,
            "fresh_score": {which: scoring.scores(medians[which]) for which in CLOCKS},
            "fresh_score_interval": scoring.bootstrap_scores(seeds[clock]),
            "ratios": scoring.ratios(times[clock]),
            "without": scoring.without_each(times[clock]),
        }
    return found


def median(times: Sequence[float]) -> float:
    """Returns the median time; infinity counts as slowest."""
    return scoring.study_score([[time] for time in times])


def share(trials: Sequence[Mapping[str, Any]]) -> float:
    """Returns the share of trials that have reached the target."""
    return sum(cells.times(trial, "steps")[0] < math.inf for trial in trials) / len(trials)


def fresh_numbers(trial: Mapping[str, Any]) -> dict[str, Any]:
    """Returns times to the target of fresh seeds, their medians and intervals, and the metric."""
    found: dict[str, Any] = {"last": trial["last"]}
    for which in CLOCKS:
        times = cells.times(trial, which)
        found[which] = {
            "values": times,
            "median": median(times),
            "interval": scoring.bootstrap(times),
        }
    return found


def cost(pair: Pair, trial: Mapping[str, Any]) -> dict[str, float]:
    """Returns the time of a step, and the bytes of the optimizer's state."""
    seconds = statistics.median(trial["training_seconds"]) / pair.parts.steps
    state = layout.bytes_per_device(pair.parts.state.optimizer_state)
    return {
        "step_milliseconds": 1e3 * seconds,
        "state_bytes": state // pair.parts.seeds.number,
    }


def early(
    workload: Pair, pairs: Sequence[Pair], fresh: Mapping[tuple[str, str], Cell]
) -> dict[str, float | None]:
    """Returns what each optimizer reached in three quarters of the steps: what targets are made of.

    It is the median over fresh seeds of the best value. AlgoPerf makes its targets of that of
    AdamW, NAdamW, Nesterov and heavy ball (Dahl et al. 2023, arXiv 2306.07179, section 4).

    Args:
        workload: a pair of the workload.
        pairs: all pairs.
        fresh: their cells of fresh seeds.
    """
    found = {}
    for pair in pairs:
        if pair.workload == workload.workload:
            values = fresh[pair.workload, pair.optimizer]["trials"][0]["best_early"]
            known = all(value is not None for value in values)
            found[pair.optimizer] = statistics.median(values) if known else None
    return found


def median_curve(trial: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """Returns the median of the metric over the seeds, at each evaluation.

    A seed that has diverged counts as worse than all others; where the median has, it is None.
    """
    worst = -math.inf if mode == "max" else math.inf
    columns = zip(*trial["curve"]["values"], strict=True)
    middle = [statistics.median([worst if v is None else v for v in c]) for c in columns]
    return {"steps": trial["curve"]["steps"], "values": [records.finite(v) for v in middle]}


def final(pairs: Sequence[Pair], fresh: Mapping[tuple[str, str], Cell]) -> dict[str, Any]:
    """Returns the last value of each pair's metric, over the fresh seeds, as results have it."""
    found = {}
    for pair in pairs:
        last = fresh[pair.workload, pair.optimizer]["trials"][0]["last"]
        name = pair.metric.rpartition("/")[2]
        found[f"{pair.workload}/{pair.optimizer} {name}"] = records.summary(last)._asdict()
    return found
