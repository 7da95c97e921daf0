"""The program `lr_finder`: a learning-rate range test of a training config.

Any config of the program `train` will do: its model, data, task and optimizer are used, from the
parameters that training would start from; its schedule is not. One compiled scan trains at a rate
that grows with each step; short runs at constant rates then find where training becomes unstable
(see `lamina.platform.optimizers.range_test`). A killed run starts again from its beginning.
"""

import base64
import contextlib
import dataclasses
import io
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from lamina.platform import config as configs
from lamina.platform.data import feed as feeds
from lamina.platform.errors import UserError
from lamina.platform.optimizers import range_test
from lamina.platform.programs import session, train
from lamina.platform.programs.context import Context, Outcome
from lamina.platform.reporting import folder, records, storage
from lamina.platform.reporting.clock import Clock
from lamina.platform.training import compiled, experiment, initial, optimizing, rows, step
from lamina.platform.training.experiment import Experiment

STREAMED_BATCHES = 32
"""Batches that are used again and again where the data don't stay on the device."""


class RangeTest(NamedTuple):
    """The block `lr_finder`.

    Attributes:
        low: lowest learning rate.
        high: highest learning rate.
        steps: steps of the growing run.
        smoothing: decay of the average of the losses.
        probe_steps: steps of each of the 32 short runs that find the largest stable rate; 0 takes
            the point where the growing run blows up for it, which is too high.
    """

    low: float = 1e-6
    high: float = 10.0
    steps: int = 200
    smoothing: float = 0.9
    probe_steps: int = 30


SCHEMA = experiment.SCHEMA._replace(blocks={**experiment.SCHEMA.blocks, "lr_finder": RangeTest})
"""The vocabulary: that of training, and the block `lr_finder`."""


def resolve(config: Any, trust: Sequence[str] = configs.EVERYONE) -> FrozenConfigDict:
    """Returns the whole config, checked.

    Raises:
        UserError: lists all mistakes.
    """
    resolved = configs.resolve(config, SCHEMA, trust)
    block = resolved.lr_finder
    range_test.growing_rates(block.low, block.high, block.steps)
    if not 0 <= block.smoothing < 1:
        raise UserError(f"lr_finder.smoothing = {block.smoothing} should lie in [0, 1)")
    if block.probe_steps < 0 or 0 < block.probe_steps < 4:
        raise UserError(f"lr_finder.probe_steps = {block.probe_steps} should be 0, or 4 or more")
    if resolved.islands.name != "none":
        raise UserError(
            f"islands.name = {resolved.islands.name!r}: a range test is of one state, set "
            "islands.name = 'none' (the rates of an island are those of its part of the batch)"
        )
    return resolved


def prepare(
    config: FrozenConfigDict,
    trust: Sequence[str],
    devices: Sequence[jax.Device] | None,
    fresh: bool,
) -> train.Prepared:
    """Builds the parts as for training, but for the schedule.

    Raises:
        UserError: the config doesn't fit the data or the devices.
    """
    constant = {"name": "constant", "warmup_steps": 0}
    without = FrozenConfigDict({**configs.thaw(config), "schedule": constant})
    return train.prepare(without, trust, devices, fresh)


def forbidden_changes(old: Mapping, new: Mapping) -> dict[str, tuple[Any, Any]]:
    """Returns the differences that matter: all but those that don't change what is computed."""
    return configs.difference(old, new, train.FREE)


def find(prepared: train.Prepared, context: Context) -> Outcome:
    """Runs the range test.

    Args:
        prepared: the parts of the run.
        context: the run folder and what else a program is given.

    Returns:
        The suggestion of each seed, their median, and the rate at which all seeds are stable.

    Raises:
        UserError: the loss blows up at the lowest rate.
    """
    options = prepared.parts.config.lr_finder
    parts = prepared.parts._replace(steps=options.steps)
    workdir = storage.as_path(context.workdir)
    seeds, clock = parts.config.seeds, Clock()
    session.cut_metrics(workdir / folder.METRICS, -1)
    if jax.process_index() == 0:
        folder.write_parameters(workdir, compiled.parameter_rows(parts))
    with contextlib.ExitStack() as stack:
        log = session.open_log(parts, context, 0)
        stack.callback(log.close)
        feed = initial.open_feed(parts)
        stack.callback(feed.close)
        state = initial.create(parts, prepared.loaded)
        number = options.steps if feed.constants else min(options.steps, STREAMED_BATCHES)
        batches = feed.read(0, number)
        placed = rows.put(batches, rows.abstract_rows(parts, batches, parts.seeds.per_seed_rows))
        arguments = (state, feed.constants, placed)
        rates = range_test.growing_rates(options.low, options.high, options.steps)
        with clock.phase("train"):
            grow = jax.jit(partial(_grow, parts, feed, number))
            losses = np.asarray(grow(*arguments, jnp.asarray(rates)))
            probe = jax.jit(partial(_probe, parts, feed, number, options.probe_steps))
            found = [range_test.conclude(rates, one, options.smoothing) for one in losses.T]
            limit = min((one.limit for one in found if one.limit), default=None)
            if options.probe_steps:
                losses_at = lambda r: np.asarray(probe(*arguments, jnp.asarray(r)))
                limit = range_test.search_limit(losses_at, options.low, options.high)
            found = [one._replace(limit=limit) for one in found]
        seconds_a_step = clock.elapsed() / options.steps
        for seed, one in zip(seeds, found, strict=True):
            columns = {"learning_rate": rates, "loss": one.losses, "smoothed_loss": one.smoothed}
            log.write(
                [
                    records.record(k + 1, "train", name, value, seed, (k + 1) * seconds_a_step)
                    for k in range(options.steps)
                    for name, values in columns.items()
                    if (value := records.finite(values[k])) is not None
                ]
            )
        log.sync()
    if jax.process_index() == 0:
        picture = base64.b64encode(_plot(found)).decode()
        title = "Loss over learning rate, with the suggestion and the limit of stability"
        folder.write_samples(workdir, [{"title": title, "png_base64": picture}])
    return Outcome(storage.plain(_result(context, found, clock)))


def _result(context: Context, found: Sequence[range_test.Found], clock: Clock) -> dict[str, Any]:
    suggestion, limit = float(np.median([one.suggestion for one in found])), found[0].limit
    edge = f"unstable above {limit:.3g}" if limit is not None else "stable up to the highest rate"
    context.say(f"suggested learning rate: {suggestion:.3g} ({edge})")
    return {
        "final": {
            "train/suggestion": records.summary([one.suggestion for one in found])._asdict(),
        },
        "suggestion": suggestion,
        "limit": limit,
        "steps": len(found[0].rates),
        "seconds": clock.elapsed(),
    }


def _step(parts: Experiment, feed: feeds.Feed, number: int, constants: Any, placed: Any) -> Any:
    """Returns the step of a range test: of all seeds, on one of `number` batches."""
    axes = optimizing.trained_axes(parts.recipe.model, parts.recipe.parameters)
    select = compiled.constrained(parts, feed, parts.seeds.per_seed_rows)

    def of_all(states: Any, rate: jax.Array, i: jax.Array) -> tuple[Any, jax.Array]:
        learning_rate = optimizing.LearningRate(lambda count: rate, (), lambda count, state: rate)
        optimizer = optimizing.optimizer(parts.config, parts.trust, learning_rate, axes)
        recipe = parts.recipe._replace(optimizer=optimizer, learning_rate=learning_rate.recorded)

        def of_one(state: Any, batch: Any) -> tuple[Any, jax.Array]:
            empty = jax.tree.map(jnp.zeros_like, state.metrics)
            fresh = dataclasses.replace(state, metrics=empty)
            new = step.train_step(recipe, fresh, batch, jnp.bool_(False))
            total, weight = new.metrics["loss"]
            return new, total / jnp.maximum(weight, 1e-30)

        batch = select(constants, jax.tree.map(lambda r: r[i % number], placed))
        results = parts.seeds.lift(of_one, "seed")(states, batch)
        losses = jnp.concatenate([jnp.atleast_1d(loss) for _, loss in results])
        return tuple(state for state, _ in results), losses

    return of_all


def _grow(parts, feed, number, state, constants, placed, rates) -> jax.Array:
    """Returns the losses [N, seeds] of a run whose rate grows."""
    one = _step(parts, feed, number, constants, placed)
    return range_test.grow(one, parts.seeds.split(state), rates)


def _probe(parts, feed, number, steps, state, constants, placed, rates) -> jax.Array:
    """Returns the losses [rates, steps, seeds] of short runs."""
    one = _step(parts, feed, number, constants, placed)
    return range_test.probe(one, parts.seeds.split(state), rates, steps)


def _plot(found: Sequence[range_test.Found]) -> bytes:
    """Returns the losses over the rates as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for one in found:
        shown = np.isfinite(one.smoothed)
        (line,) = axes.plot(one.rates[shown], one.smoothed[shown], linewidth=1.8)
        axes.plot(one.rates[shown], one.losses[shown], alpha=0.3, color=line.get_color())
        axes.axvline(one.suggestion, linestyle="--", color=line.get_color())
        if one.limit is not None:
            axes.axvline(one.limit, linestyle=":", color=line.get_color())
    axes.set(
        xscale="log", xlabel="learning rate (dashed: suggestion, dotted: limit)", ylabel="loss"
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
