"""Several learners as one: their hooks in order, their states side by side, one memory."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lamina.platform.errors import UserError
from lamina.platform.training.learners import (
    STREAM,
    Learner,
    Memory,
    Mixed,
    Moment,
    Own,
    Setup,
    Sweep,
)


def chain(**links: Learner) -> Learner:
    """Returns the learner that does what all `links` do, in their order.

    Losses, gradients, states and streams pass from one link to the next; predictions are those of
    the last link that has its own. Links that remember share one memory, which has what any of
    them stores and from which each draws for itself.

    Args:
        **links: name to learner; the name is that of its part of the state.

    Raises:
        UserError: the memories of two links differ in size or kind, or a link that replaces the
            loss isn't the first.

    Example:
        >>> from lamina.platform.incremental.learners import create
        >>> both = chain(er=create("er", memory=200), ewc=create("ewc", strength=10.0))
        >>> sorted(both.hyper)
        ['er', 'ewc']
    """
    for name in list(links)[1:]:
        if "first" in links[name].needs:
            raise UserError(
                f"{name!r} replaces the loss, so what {next(iter(links))!r} adds to it would be "
                f"lost: name {name!r} first in learner.links"
            )

    def init(setup: Setup) -> Own:
        return {name: link.init(setup) for name, link in links.items()}

    def fold_states(hook: str):
        def folded(own: Own, state: Any, moment: Moment) -> tuple[Own, Any]:
            own = dict(own)
            for name, link in links.items():
                own[name], state = getattr(link, hook)(own[name], state, at(name, moment))
            return own, state

        return folded

    def output(own: Own, output: Any, mixed: Mixed, moment: Moment) -> Any:
        for name, link in links.items():
            output = link.output(own[name], output, rows_of(name, mixed), at(name, moment))
        return output

    def loss(loss: Any, own: Own, params: Any, mixed: Mixed, output: Any, moment: Moment, *rest):
        for name, link in links.items():
            mine, now = rows_of(name, mixed), at(name, moment)
            loss = link.loss(loss, own[name], params, mine, output, now, *rest)
        return loss

    def gradient(gradient: Any, own: Own, params: Any, of: Any, moment: Moment, memory: Own) -> Any:
        for name, link in links.items():
            gradient = link.gradient(gradient, own[name], params, of, at(name, moment), memory)
        return gradient

    def after(own: Own, before: Any, after: Any, gradient: Any, mixed: Mixed, output, moment):
        own = dict(own)
        for name, link in links.items():
            mine, now = rows_of(name, mixed), at(name, moment)
            own[name], after = link.after(own[name], before, after, gradient, mine, output, now)
        return own, after

    def review(own: Own, params: Any, rows: Any, there: Any, forward: Any, moment: Moment) -> Own:
        looked = {
            name: link.review(own[name], params, rows, there, forward, at(name, moment))
            for name, link in links.items()
        }
        return own | looked

    places = {name: place for place, name in enumerate(links)}

    def at(name: str, moment: Moment) -> Moment:
        return moment._replace(key=jax.random.fold_in(moment.key, 1000 + places[name]))

    plain = Learner().predict
    predicting = [name for name, link in links.items() if link.predict is not plain]

    def predict(own: Own, output: Any, moment: Moment) -> Any:
        return links[predicting[-1]].predict(own[predicting[-1]], output, moment)

    def arrange(stream: Any) -> Any:
        for link in links.values():
            stream = link.arrange(stream)
        return stream

    return Learner(
        init=init,
        begin=fold_states("begin"),
        output=output,
        loss=loss,
        gradient=gradient,
        after=after,
        sweep=_sweeps({name: link.sweep for name, link in links.items() if link.sweep}),
        review=review,
        end=fold_states("end"),
        predict=predict if predicting else plain,
        memory=_memory({name: link.memory for name, link in links.items() if link.memory}),
        hyper={name: dict(link.hyper) for name, link in links.items() if link.hyper},
        needs=frozenset[str]().union(*(link.needs for link in links.values())),
        arrange=arrange,
    )


def rows_of(name: str, mixed: Mixed) -> Mixed:
    """Returns the batch with the draws of one link under the names that the link gave them."""
    groups = {
        group.removeprefix(f"{name}/"): rows
        for group, rows in mixed.groups.items()
        if group == STREAM or group.startswith(f"{name}/")
    }
    return mixed._replace(groups=groups)


def _sweeps(sweeps: dict[str, Sweep]) -> Sweep | None:
    """Returns the passes of several links as one; each sees as many batches as it wants."""
    if not sweeps:
        return None

    def start(own: Own, *rest: Any) -> Any:
        carries = {name: sweep.start(own[name], *rest) for name, sweep in sweeps.items()}
        return jnp.zeros((), jnp.int32), carries

    def add(carry: Any, own: Own, *rest: Any) -> Any:
        count, carries = carry
        added = {}
        for name, sweep in sweeps.items():
            wanted = not sweep.batches or count < sweep.batches
            more = partial(_added, sweep, own[name], rest)
            added[name] = jax.lax.cond(wanted, more, lambda old: old, carries[name])
        return count + 1, added

    def finish(carry: Any, own: Own, *rest: Any) -> Own:
        _, carries = carry
        done = {n: sweep.finish(carries[n], own[n], *rest) for n, sweep in sweeps.items()}
        return own | done

    giving = [name for name, sweep in sweeps.items() if sweep.priority is not None]

    def priority(carry: Any, own: Own, *rest: Any) -> jax.Array:
        given = sweeps[giving[-1]].priority
        assert given is not None
        return given(carry[1][giving[-1]], own[giving[-1]], *rest)

    limits = [sweep.batches for sweep in sweeps.values()]
    batches = 0 if 0 in limits else max(limits)
    return Sweep(start, add, finish, batches, priority if giving else None)


def _added(sweep: Sweep, own: Own, rest: tuple[Any, ...], carry: Any) -> Any:
    return sweep.add(carry, own, *rest)


def _memory(memories: dict[str, Memory]) -> Memory | None:
    if not memories:
        return None
    first = next(iter(memories.values()))
    for name, memory in memories.items():
        if memory.kind != first.kind:
            raise UserError(
                f"the links of a chain share one memory, but that of {name!r} ({memory.kind}) "
                f"differs from that of {next(iter(memories))!r} ({first.kind})"
            )
    draws = {
        f"{name}/{draw}": value
        for name, memory in memories.items()
        for draw, value in memory.draws.items()
    }
    stores = tuple(dict.fromkeys(s for memory in memories.values() for s in memory.stores))
    return first._replace(draws=draws, stores=stores)
