"""Which trials a sweep has, which of them share a compiled program, and which run at once."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict

from lamina.platform import config as configs
from lamina.platform.data.dataset import Dataset
from lamina.platform.errors import UserError
from lamina.platform.optimizers import table
from lamina.platform.training import experiment, seeds, step
from lamina.platform.training.experiment import Experiment, Members

NUMERIC = ("optimizer.", "schedule.", "task.", "ema.decay", "clip_norm")
"""What a number may be an array of the program instead of a constant of it: keys, or their
beginnings. Whether it can be is tried, for a factory may decide by it what to compute."""

OFF = ("clip_norm", "ema.decay")
"""Keys whose 0 means "none of it", so that a 0 is another program."""


class Trial(NamedTuple):
    """One point of the space.

    Attributes:
        number: from 0.
        values: config key to value.
        config: the resolved training config with these values.
    """

    number: int
    values: Mapping[str, Any]
    config: FrozenConfigDict


class Group(NamedTuple):
    """Trials that share one compiled program.

    Attributes:
        trials: in the order of their numbers.
        hyper: the keys that are arrays of the program.
    """

    trials: tuple[Trial, ...]
    hyper: tuple[str, ...]


def make_trial(
    number: int,
    values: Mapping[str, Any],
    config: FrozenConfigDict,
    trust: Sequence[str],
    schema: configs.Schema = experiment.SCHEMA,
    program: str = "train",
) -> Trial:
    """Returns a trial of a resolved sweep config.

    Args:
        number: from 0.
        values: config key to value.
        config: what they change.
        trust: packages whose factories the config may name.
        schema: the vocabulary of the trial's program.
        program: its name.

    Raises:
        UserError: the config with these values is wrong.
    """
    changed = ConfigDict(configs.thaw(config))
    with changed.unlocked(), changed.ignore_type():
        if "sweep" in changed:
            del changed["sweep"]
        changed.program = program
        for key, value in values.items():
            *blocks, last = key.split(".")
            block = changed
            for name in blocks:
                block = block[name]
            block[last] = value
        for key in values:
            block, _, last = key.rpartition(".")
            kind = schema.kinds.get(block)
            if last == "name" and kind is not None:
                given = [k.rpartition(".")[2] for k in values if k.startswith(f"{block}.")]
                configs.drop_foreign(changed[block], kind, block, trust, given)
    try:
        return Trial(number, dict(values), configs.resolve(changed, schema, trust))
    except UserError as error:
        raise UserError(f"{describe(number, values)}: {error}") from error


def describe(number: int, values: Mapping[str, Any]) -> str:
    """Returns a trial's number and values, for messages."""
    shown = ", ".join(f"{key} = {value!r}" for key, value in values.items())
    return f"trial {number} ({shown})"


def candidates(values: Mapping[str, Any], config: FrozenConfigDict) -> tuple[str, ...]:
    """Returns the keys whose values in this trial may be arrays of the program."""
    flat = configs.flatten(config)
    return tuple(
        key
        for key in values
        if key.startswith(NUMERIC)
        and isinstance(flat[key], int | float)
        and not isinstance(flat[key], bool)
        and (flat[key] or not _off_at_zero(key, config))
    )


def _off_at_zero(key: str, config: FrozenConfigDict) -> bool:
    block, _, last = key.partition(".")
    if block == "optimizer" and last != "learning_rate":
        return last in table.off_at_zero(config["optimizer"]["name"])
    return key in OFF


def group(
    trials: Iterable[Trial], traceable: Callable[[Trial, tuple[str, ...]], tuple[str, ...]]
) -> list[Group]:
    """Returns as few groups as possible, in the order of their first trials.

    Args:
        trials: all of them.
        traceable: `(trial, keys)` to those keys that can be arrays; asked once for each
            combination of the other keys' values.
    """
    asked: dict[Any, tuple[str, ...]] = {}
    found: dict[Any, list[Trial]] = {}
    for trial in trials:
        keys = candidates(trial.values, trial.config)
        rest = rest_of(trial, keys)
        if (rest, keys) not in asked:
            asked[rest, keys] = traceable(trial, keys) if keys else ()
        hyper = asked[rest, keys]
        found.setdefault((rest_of(trial, hyper), hyper), []).append(trial)
    return [Group(tuple(members), hyper) for (_, hyper), members in found.items()]


def rest_of(trial: Trial, hyper: tuple[str, ...]) -> tuple:
    """Returns what a trial shares with those of its group: the values that are no arrays."""
    return tuple((k, repr(v)) for k, v in sorted(trial.values.items()) if k not in hyper)


def traceable(
    keys: tuple[str, ...], build: Callable[[tuple[str, ...]], Experiment]
) -> tuple[str, ...]:
    """Returns those keys that the training step can take as arrays, by trying it abstractly.

    Args:
        keys: those to try.
        build: some of them to the parts of a trial of one seed in which they are arrays.

    Raises:
        UserError: the trial's config is wrong, whether or not its numbers are arrays.
    """

    def fits(some: tuple[str, ...]) -> bool:
        try:
            parts = build(some)
            jax.eval_shape(partial(step.train_step, parts.recipe), parts.state, parts.batch, True)
        except (TypeError, ValueError, IndexError, UserError):
            return False
        return True

    if fits(keys):
        return keys
    build(())  # raises what is the user's mistake
    alone = tuple(key for key in keys if fits((key,)))
    return alone if len(alone) < 2 or fits(alone) else ()


def assemble(
    config: FrozenConfigDict,
    hyper: Sequence[str],
    plan: seeds.Seeds,
    values: tuple[int, ...],
    trust: Sequence[str],
    devices: Any,
    dataset: Dataset,
) -> Experiment:
    """Returns the parts of a program that runs several members: trials of several seeds.

    Args:
        config: of a trial; that of the others differs in the keys of `hyper` only.
        hyper: keys that are arrays.
        plan: how the members are run.
        values: the seed of each member.
        trust: packages whose factories the config may name.
        devices: the devices to use.
        dataset: the opened data set.
    """
    members = Members(plan, types_of(config, hyper))
    return experiment.assemble(with_seeds(config, values), trust, devices, dataset, members=members)


def types_of(config: FrozenConfigDict, hyper: Sequence[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the types of config values that are arrays of a program."""
    flat = configs.flatten(config)
    return {
        key: jax.ShapeDtypeStruct((), jnp.int32 if isinstance(flat[key], int) else jnp.float32)
        for key in hyper
    }


def with_seeds(config: FrozenConfigDict, values: tuple[int, ...]) -> FrozenConfigDict:
    """Returns the config with other seeds, of which some may be equal: of several trials."""
    return FrozenConfigDict({**configs.thaw(config), "seeds": values})


class Shape(NamedTuple):
    """How the trials of one group are run.

    Attributes:
        trials: in a unit; units follow one another, and each is saved as a whole.
        lanes: parts into which a unit's members fall; each is trained by itself.
        members: (trial, seed) pairs of a lane; what is missing to a full one repeats the last.
        lowering: how a lane's members are run; see `seeds.Seeds`.
    """

    trials: int
    lanes: int
    members: int
    lowering: seeds.Lowering


def shape(
    trials: int,
    seed_count: int,
    *,
    platform: str,
    devices: int,
    seed_parallelism: int,
    cores: int,
    steps_per_call: int,
    at_once: int,
) -> Shape:
    """Chooses how a group is run.

    On accelerators, members are a vmapped axis. On a CPU a vmapped axis gains nothing and leaves
    the cache: each member has a lane of its own there, and all are run by one program, as many at a
    time as there are cores, since a loop of small operations uses one core. Where a step is
    dispatched alone (`steps_per_call = 1`: models whose operations are slow in loops), the seeds of
    one trial stand side by side in the program ("unroll").

    Args:
        trials: of the group.
        seed_count: seeds of each trial.
        platform: "cpu", "gpu" or "tpu".
        devices: in the mesh.
        seed_parallelism: size of the mesh's seed axis.
        cores: of the CPU.
        steps_per_call: of the config.
        at_once: most members of a unit, at least those of one trial; 0: all.
    """
    most = max(1, at_once // seed_count) if at_once else trials
    alone = platform == "cpu" and devices == 1
    looped = steps_per_call > 1
    if alone and not looped:
        most = 1
    units = math.ceil(trials / most)
    per_unit = math.ceil(trials / units)
    members = per_unit * seed_count
    lanes = (members if looped else min(cores, members)) if alone else 1
    size = math.ceil(members / lanes)
    size = math.ceil(size / seed_parallelism) * seed_parallelism
    if size == 1:
        return Shape(per_unit, lanes, 1, "single")
    return Shape(per_unit, lanes, size, "unroll" if alone else "vmap")


def units(found: Group, size: int) -> list[tuple[Trial, ...]]:
    """Returns the group's trials, `size` at a time."""
    return [found.trials[i : i + size] for i in range(0, len(found.trials), size)]
