"""Times the acceptance protocol beside Avalanche's, in one go.

    python tests/benchmarks/incremental.py --peer=<python of an environment with avalanche-lib>

The peer runs `tests/references/avalanche_split_fashion.py`, which says what its environment needs.
Both sides learn the same five tasks on the same two cores with two threads, and evaluate all tasks
after each; they take turns, `--repeats` times, and the fastest of each counts. Wall and CPU
seconds:

- learning alone: without imports, compilation and the reading of data; ER with batches of 128, one
  seed and five seeds (Avalanche: one after the other), GEM, and ER with batches of 10, three ways:
  - `online_er_reservoir`, `online_er`: no boundaries, the memory is updated after every batch; in
    Avalanche that is `split_online_stream(experience_size=10)`, each batch an experience of its
    own, with a reservoir or a memory balanced by class;
  - `er_batch_10`: five large experiences, at the end of each of which both fill the memory;
- everything: one ER run as a command, from the start of the process to its end, with an empty
  compile cache and with a full one.

Each ratio stands beside the bar that it shall reach, and the exit code is 1 where one doesn't.
Times of a busy machine compare with nothing: the load average is printed.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

PEER = Path(__file__).resolve().parents[1] / "references" / "avalanche_split_fashion.py"
EXPERIMENT = "incremental/split_fashion_mnist"


class Seconds(NamedTuple):
    """Of wall clock and of processor time."""

    wall: float
    cpu: float


class Case(NamedTuple):
    """One comparison.

    Attributes:
        learner: name in the experiment.
        peer: name in the peer's script.
        seeds: how many of them.
        bar: how many times faster Lamina shall be.
        changes: to the experiment's config, block to keys.
    """

    learner: str
    peer: str
    seeds: int
    bar: float
    changes: Mapping[str, Mapping[str, Any]] = {}


PAST = {"stream": {"name": "class_incremental"}, "learner": {"past_only": True}}
CASES = {
    "er": Case("er", "er", 1, 3.0),
    "er_5_seeds": Case("er", "er", 5, 3.0),
    "gem": Case("gem", "gem", 1, 6.0),
    "online_er_reservoir": Case(
        "online_er", "online_er_reservoir", 1, 8.0, {"learner": {"policy": "reservoir"}}
    ),
    "online_er": Case("online_er", "online_er", 1, 8.0),
    "er_batch_10": Case("online_er", "er_batch_10", 1, 8.0, PAST),
}
EVERYTHING = {"cold": 2.0, "warm": 3.0}
"""Compile cache to the bar of a whole ER run."""


def learn(case: Case) -> Seconds:
    """Returns the seconds that Lamina learns and evaluates, in this process."""
    import jax

    from lamina.platform import config as configs
    from lamina.platform.incremental import sequence
    from lamina.platform.programs import incremental
    from lamina.platform.training import initial, learners

    config, _ = configs.load(f"{EXPERIMENT}:{case.learner}")
    config.seeds = tuple(range(case.seeds))
    for block, keys in case.changes.items():
        config[block].update(keys)
    prepared = incremental.prepare(incremental.resolve(config), configs.EVERYONE, None, True)
    parts = prepared.parts
    runner = incremental.open_runner(prepared)
    state = initial.create(parts, prepared.loaded)
    state = learners.set_hyper(parts.recipe.learner, state)
    span = sequence.of_span(prepared.cut, 0, parts.steps)
    states = jax.block_until_ready(runner.split(state))
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(runner.advance(states, span))
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def lamina_alone(name: str) -> Seconds:
    """Returns what `learn` measures in a process of its own."""
    output, _ = process([sys.executable, __file__, f"--learn={name}"])
    return Seconds(*json.loads(output.splitlines()[-1]))


def peer_alone(peer: str, case: Case) -> Seconds:
    """Returns the sums over the seeds that the peer's script tells."""
    output, _ = process([peer, str(PEER), case.peer, f"--seeds={case.seeds}"])
    seconds = json.loads(output.splitlines()[-1])["seconds"]
    return Seconds(sum(seconds["wall"]), sum(seconds["cpu"]))


def lamina_whole(cache: str) -> Seconds:
    """Returns the seconds of `lamina run` for one seed of ER; `cache` keeps compiled programs."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lamina.platform.cli", "run"]
        command += [f"--config={EXPERIMENT}:er", "--config.seeds=(0,)", f"--workdir={folder}/er"]
        return process(command, {"JAX_COMPILATION_CACHE_DIR": cache})[1]


def peer_whole(peer: str) -> Seconds:
    """Returns the seconds of the peer's process for one seed of ER."""
    return process([peer, str(PEER), "er"])[1]


def process(command: list[str], environment: dict[str, str] | None = None) -> tuple[str, Seconds]:
    """Runs a command on two cores; returns its output and what it took."""
    threads = {"OMP_NUM_THREADS": "2", "JAX_PLATFORMS": "cpu"}
    wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, env=os.environ | threads | (environment or {}), capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    cpu = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    return done.stdout, Seconds(time.perf_counter() - wall, cpu)


def compare(
    name: str, bar: float, repeats: int, ours: Callable[[], Seconds], theirs: Callable[[], Seconds]
) -> bool:
    """Measures both sides in turns, prints a line, and tells whether the bar is reached."""
    pairs = [(ours(), theirs()) for _ in range(repeats)]
    (wall, cpu), (peer_wall, peer_cpu) = (
        Seconds(min(s.wall for s in side), min(s.cpu for s in side))
        for side in zip(*pairs, strict=True)
    )
    ratio = peer_wall / wall
    print(
        f"{name:26} {wall:8.2f} {cpu:8.2f} {peer_wall:10.2f} {peer_cpu:8.2f} {ratio:8.1f} "
        f"{peer_cpu / cpu:8.1f} {bar:6.1f}  {'reached' if ratio >= bar else 'MISSED'}",
        flush=True,
    )
    return ratio >= bar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*CASES, *EVERYTHING]
    parser.add_argument("--peer", help="Python of an environment with avalanche-lib")
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--learn", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.learn:
        print(json.dumps(learn(CASES[flags.learn])))
        return
    if not flags.peer or flags.repeats < 1:
        parser.error("--peer is the Python of an environment with avalanche-lib; --repeats >= 1")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    print(f"load average {os.getloadavg()[0]:.2f}; seconds:")
    print(
        f"{'':26} {'Lamina':>8} {'CPU':>8} {'Avalanche':>10} {'CPU':>8} {'ratio':>8} {'of CPU':>8}"
        f" {'bar':>6}"
    )
    reached = [
        compare(
            name,
            case.bar,
            flags.repeats,
            lambda name=name: lamina_alone(name),
            lambda case=case: peer_alone(flags.peer, case),
        )
        for name, case in CASES.items()
        if name in flags.cases
    ]
    with tempfile.TemporaryDirectory() as cache:
        if "warm" in flags.cases and "cold" not in flags.cases:
            lamina_whole(cache)  # fills it
        for name, bar in EVERYTHING.items():
            if name in flags.cases:
                repeats = 1 if name == "cold" else flags.repeats
                title = f"er, everything, {name} cache"
                whole = lambda: lamina_whole(cache)
                reached.append(compare(title, bar, repeats, whole, lambda: peer_whole(flags.peer)))
    print(f"load average {os.getloadavg()[0]:.2f}")
    sys.exit(not all(reached))


if __name__ == "__main__":
    main()
