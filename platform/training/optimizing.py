"""From a resolved config to its learning rate and its optimizer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from ml_collections import ConfigDict, FrozenConfigDict

from lamina.models.functional import FunctionalModel
from lamina.platform import config as configs
from lamina.platform.optimizers import averaging as averages
from lamina.platform.optimizers import plateau, rules, table
from lamina.platform.optimizers.averaging import Averaging
from lamina.platform.optimizers.matrices import Axes
from lamina.platform.optimizers.plateau import Controlled
from lamina.platform.optimizers.schedules import SCHEDULES
from lamina.platform.training import parameters

SCHEDULE = configs.Kind(SCHEDULES, takes="steps", makes=(Callable, Controlled))
"""Schedules: a function from step to factor, or one that a controller may lower."""


class LearningRate(NamedTuple):
    """The learning rate of a run.

    Attributes:
        of_step: the number of steps done to the learning rate, but for what a controller does.
        controllers: the last transformations of the optimizer's chain: one that lowers the learning
            rate by what was measured, or none.
        recorded: (step, optimizer state) to the learning rate, for the record.
    """

    of_step: optax.Schedule
    controllers: tuple[optax.GradientTransformation, ...]
    recorded: Callable[[jax.Array, Any], jax.Array]


def learning_rate(
    c: FrozenConfigDict | ConfigDict, trust: Sequence[str], steps: int
) -> LearningRate:
    """Returns the learning rate of a resolved config.

    Args:
        c: the config; its numbers may be traced.
        trust: packages whose factories it may name.
        steps: of the whole run.

    Raises:
        UserError: the schedule refuses its keys.
    """
    built = configs.build(c.schedule, SCHEDULE, "schedule", trust, steps)
    controlled = isinstance(built, Controlled)
    peak, factor = c.optimizer.learning_rate, built.schedule if controlled else built
    return LearningRate(
        of_step=lambda count: peak * factor(count),
        controllers=(built.controller,) if controlled else (),
        recorded=lambda count, state: peak * factor(count) * plateau.current_factor(state),
    )


def averaging(c: FrozenConfigDict | ConfigDict) -> Averaging | None:
    """Returns the average of the parameters that a config keeps; None without one."""
    off = lambda number: isinstance(number, int | float) and not number  # a traced one is on
    if not off(c.ema.decay):
        return averages.ema(c.ema.decay)
    if c.swa.every:
        return averages.swa(c.swa.start, c.swa.every)
    return averages.lawa(c.lawa.latest, c.lawa.every) if c.lawa.every else None


def trained_axes(model: FunctionalModel, trained: parameters.Parameters) -> Axes:
    """Returns path to logical axes of each trained parameter, `()` where they aren't known."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, _ = jax.eval_shape(trained.partition, key, model.params)
    axes = parameters.flat(trained.axes(params))
    return {path: axes.get(path, ()) for path in parameters.flat(params)}


def optimizer(
    c: FrozenConfigDict | ConfigDict,
    trust: Sequence[str],
    rate: LearningRate,
    axes: Axes,
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of a resolved config, between clipping and the schedule's controller.

    Args:
        c: the config; its numbers may be traced.
        trust: packages whose factories it may name.
        rate: the learning rate.
        axes: of the trained parameters.

    Raises:
        UserError: the optimizer or one of its rules refuses its keys, or a rule selects nothing.
    """

    def make(name: str, rate: Any, **keys: Any) -> optax.GradientTransformationExtraArgs:
        factory = configs.lookup(name, table.OPTIMIZERS, "optimizer", trust)
        named = name if name in table.OPTIMIZERS else factory
        return table.create(named, rate, axes=axes, **keys)

    block: Mapping[str, Any] = configs.thaw(c.optimizer)
    keys = {k: v for k, v in block.items() if k not in ("name", "learning_rate", "rules")}
    built = rules.create(make, block["name"], rate.of_step, keys, block["rules"], list(axes))
    off = isinstance(c.clip_norm, int | float) and not c.clip_norm  # a traced number clips
    clip = () if off else (optax.clip_by_global_norm(c.clip_norm),)
    chain = (*clip, built, *rate.controllers)
    return optax.with_extra_args_support(optax.chain(*chain) if len(chain) > 1 else built)
