"""Rounds of fine-tuning, each from the merge of the one before: alternating tuning and merging.

ATM (Zhou et al. 2024, arXiv 2411.03055): in each round every task is fine-tuned from the same
parameters `B`, which then move to `B + a/T sum_t (M_t - B)`. With a = 1 that is the mean of the
models; another step is `dict(name="task_arithmetic", scale=a, normalize=True)`. One round is plain
merging, and rounds of one step of gradient descent on all data are multi-task training. The paper
divides one budget of epochs by the number of rounds; here a round is as long as the config of the
fine-tuning says, each with a new optimizer and its schedule from the start. What a task keeps of
its own goes on from its own round before.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from lamina.platform import config as configs
from lamina.platform.checkpoints import exchange, names
from lamina.platform.errors import UserError
from lamina.platform.merging.mergers import Merger
from lamina.platform.multitask import models
from lamina.platform.multitask.models import Flat, Weights
from lamina.platform.reporting import storage

FOLDER = "rounds"
"""Of all rounds but the first."""


class Paths(NamedTuple):
    """Where the trained models of a seed are.

    Attributes:
        pretrained: the run (or file) that the first round began with.
        base: a run or file whose body the last round began with, in every task.
        tasks: task to its run in the last round.
    """

    pretrained: str
    base: str
    tasks: Mapping[str, str]


class Models(NamedTuple):
    """The models of a seed.

    Attributes:
        pretrained: the body that the first round began with.
        base: the body that the last round began with.
        tasks: task to its model.
    """

    pretrained: Flat
    base: Flat
    tasks: dict[str, Weights]


def read(paths: Paths, own: Sequence[str], seed: int, trust: Sequence[str]) -> Models:
    """Reads the models of a seed.

    Args:
        paths: where they are.
        own: regular expressions of what isn't merged.
        seed: of the fine-tunings.
        trust: packages whose factories the runs' configs may name.

    Raises:
        UserError: one isn't there, or they can't be merged.
    """
    tasks = {name: models.read(path, own, seed, trust) for name, path in paths.tasks.items()}
    different = {paths.pretrained, paths.base}
    bases = {path: models.read_base(path, own, trust) for path in different}
    models.check_fit({**tasks, "the base": bases[paths.base]})
    if not bases[paths.base].body:
        raise UserError(f"merge.own = {own} leaves no parameter to merge")
    return Models(bases[paths.pretrained].body, bases[paths.base].body, tasks)


def starts(found: Models, merger: Merger, axes: Any) -> dict[str, Weights]:
    """Returns what each task's next round begins with: one body, and what each has kept.

    Args:
        found: the models of the round before.
        merger: of their bodies; task vectors are those of that round.
        axes: the logical axes of the bodies.
    """
    body = merger([weights.body for weights in found.tasks.values()], base=found.base, axes=axes)
    state = models.average_states([weights.state for weights in found.tasks.values()])
    return {name: Weights(body, weights.own, state) for name, weights in found.tasks.items()}


def write(path: str, weights: Weights, facts: Mapping[str, str]) -> None:
    """Writes a model as a safetensors file that `init_from` takes, whole or not at all.

    Args:
        path: the file; its folder is made.
        weights: the model.
        facts: of the file's header.

    Raises:
        UserError: the file can't be written.
    """
    tree = names.nest({**weights.body, **weights.own})
    if jax.tree.leaves(weights.state):
        tree["model_state"] = weights.state
    storage.as_path(path).parent.mkdir(parents=True, exist_ok=True)
    exchange.export_params(path, tree, facts)


def fine_tuning(config: FrozenConfigDict, start: str, number: int, seed: int) -> FrozenConfigDict:
    """Returns the config of a task's fine-tuning in a round after the first.

    It reads the data in another order than the rounds before, and all of its start: what
    `init_from_rules` leaves out of the pretrained model, such as a head, has been trained since.

    Args:
        config: of the first round, resolved.
        start: the file it begins with.
        number: of the round, from 2.
        seed: which; each has a start of its own.
    """
    changed = ConfigDict(configs.thaw(config))
    changed.init_from, changed.seeds = start, (seed,)
    changed.init_from_rules.update(include=(), exclude=(), rename=())
    changed.data.seed += number - 1
    return FrozenConfigDict(changed)
