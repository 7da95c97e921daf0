"""How a stream is run for all seeds: as one compiled program, or fed from the host.

Several seeds are one vmapped program on accelerators; on CPU the program of one seed is dispatched
for each, side by side, so that every seed computes what it would alone, bit for bit.
"""

import concurrent.futures
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lamina.platform.errors import UserError
from lamina.platform.incremental import sequence, sources, streaming
from lamina.platform.incremental.sequence import Segments
from lamina.platform.incremental.stream import Stream
from lamina.platform.training import compiled
from lamina.platform.training.experiment import Experiment
from lamina.platform.training.state import TrainState
from lamina.sharding import rules as partition_rules


class Runner(NamedTuple):
    """The compiled program, for all seeds.

    Attributes:
        split: state of all seeds to what `advance` takes.
        advance: `(states, span) -> (states, records [seeds, records, metrics])`; the states are
            donated.
        join: back to the state of all seeds.
        close: stops what reads ahead.
    """

    split: Callable[[TrainState], Any]
    advance: Callable[[Any, np.ndarray], tuple[Any, np.ndarray]]
    join: Callable[[Any], TrainState]
    close: Callable[[], None] = lambda: None


def open_runner(
    parts: Experiment,
    streams: Sequence[Stream],
    cut: Segments,
    data: sources.Data,
    compile_program: Callable[..., compiled.Program] | None = None,
) -> Runner:
    """Compiles the program, once, whatever the number of seeds.

    Args:
        parts: of the run.
        streams: one for each seed, or one for all.
        cut: where they are interrupted.
        data: what is learned from and tested on.
        compile_program: in place of `compiled.compile_program`; may give a program that another run
            has compiled.

    Raises:
        UserError: data that stay on the host, in several processes.
    """
    compile_program = compile_program or compiled.compile_program
    plan, tables = sources.plan(parts, streams), sources.tables(parts, streams)
    if not sources.is_held(parts.config, data):
        return _open_streaming(parts, plan, tables, cut, data)
    examples = sources.examples(parts, cut, data)
    opened = _open_vmapped if parts.seeds.lowering == "vmap" else _open_side_by_side
    return opened(parts, plan, tables, examples, compile_program)


def _open_vmapped(
    parts: Experiment,
    plan: sequence.Plan,
    tables: Sequence[sequence.Tables],
    examples: Any,
    compile_program: Callable[..., compiled.Program],
) -> Runner:
    """Compiles one program for all seeds together."""
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *tables) if len(tables) > 1 else tables[0]
    axes = (0, None, 0 if len(tables) > 1 else None, None)
    vmapped = jax.vmap(partial(sequence.advance, plan), axes, spmd_axis_name="seed")
    call = _compile(parts, vmapped, parts.state, examples, stacked, compile_program)
    return Runner(lambda state: state, partial(call, stacked), lambda state: state)


def _open_side_by_side(
    parts: Experiment,
    plan: sequence.Plan,
    tables: Sequence[sequence.Tables],
    examples: Any,
    compile_program: Callable[..., compiled.Program],
) -> Runner:
    """Compiles the program of one seed, which threads then call for each seed."""
    number = parts.seeds.number
    one = parts.state if number == 1 else jax.tree.map(_without_seed, parts.state)
    advance = partial(sequence.advance, plan)
    call = _compile(parts, advance, one, examples, tables[0], compile_program)
    # Collective operations of two programs at once would wait for each other.
    ways = min(number, os.cpu_count() or 1) if parts.mesh.size == 1 else 1

    def side_by_side(states: list[TrainState], span: np.ndarray):
        each = [tables[i % len(tables)] for i in range(number)]
        if ways == 1:
            done = [call(*own, span) for own in zip(each, states, strict=True)]
        else:
            with concurrent.futures.ThreadPoolExecutor(ways) as pool:
                done = list(pool.map(partial(call, span=span), each, states))
        return [state for state, _ in done], np.stack([history for _, history in done])

    shardings = jax.tree.map(lambda leaf: leaf.sharding, one)
    return _by_seed(parts, shardings, side_by_side)


def _compile(
    parts: Experiment,
    advance: Callable[..., Any],
    state: TrainState,
    examples: Any,
    tables: sequence.Tables,
    compile_program: Callable[..., compiled.Program],
) -> Callable[..., tuple[TrainState, np.ndarray]]:
    """Compiles `(tables, state, span) -> (state, history)`; the state is donated."""
    whole = partition_rules.replicated(parts.mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(advance, donate_argnums=0, out_shardings=(shardings, whole))
    place = lambda span: jax.device_put(span, whole)
    program = compile_program(jitted, state, examples, tables, place(np.zeros(4, np.int32)))

    def call(tables: sequence.Tables, state: TrainState, span: np.ndarray):
        state, history = program.call(state, examples, tables, place(span))
        return state, np.asarray(jax.device_get(history))

    return call


def _open_streaming(
    parts: Experiment,
    plan: sequence.Plan,
    tables: Sequence[sequence.Tables],
    cut: Segments,
    data: sources.Data,
) -> Runner:
    """Opens the readers of data that stay on the host; the seeds take turns."""
    if jax.process_count() > 1:
        raise UserError("data.placement = 'grain': an incremental run reads it in one process")
    one = parts.state if parts.seeds.number == 1 else jax.tree.map(_without_seed, parts.state)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, one)
    opened = [
        streaming.open_advance(
            plan, shardings, cut, data.train, data.test, table, parts.config.data.workers
        )
        for table in tables
    ]

    def in_turns(states: list[TrainState], span: np.ndarray):
        done = [opened[i % len(opened)][0](state, span) for i, state in enumerate(states)]
        return [state for state, _ in done], np.stack([history for _, history in done])

    def close() -> None:
        for _, stop in opened:
            stop()

    return _by_seed(parts, shardings, in_turns)._replace(close=close)


def _by_seed(parts: Experiment, shardings: Any, advance: Callable[..., Any]) -> Runner:
    """Returns the runner of a program for one seed, whose states are a list."""
    number = parts.seeds.number
    if number == 1:
        return Runner(lambda state: [state], advance, lambda states: states[0])
    stacked_shardings = jax.tree.map(lambda leaf: leaf.sharding, parts.state)
    take = jax.jit(lambda tree, i: jax.tree.map(lambda a: a[i], tree), out_shardings=shardings)
    stack = jax.jit(
        lambda *trees: jax.tree.map(lambda *a: jnp.stack(a), *trees),
        out_shardings=stacked_shardings,
    )
    return Runner(
        lambda state: [take(state, i) for i in range(number)],
        advance,
        lambda states: stack(*states),
    )


def _without_seed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding
    assert isinstance(sharding, NamedSharding)
    rest = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=rest)
