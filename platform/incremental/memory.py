"""The memory of replay: a sample of what came by, of fixed size, kept by random priorities.

Every row that comes gets a priority from U[0, 1), once. The memory keeps the rows with the lowest
ones: all alike ("reservoir"), or rank by rank within each class or experience. Each row that came
is therefore kept with the same probability as by Algorithm R (Vitter 1985), or by evicting from the
largest class, but a whole batch is inserted at once instead of one row after another, in N x B
comparisons, and the result depends neither on the order of rows in a batch nor on the number of
devices.

Letters: N slots, B rows that come, M rows drawn.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lamina.platform.errors import UserError
from lamina.platform.incremental import checks
from lamina.platform.training.learners import Draw, Memory, Moment, Own, Space

Policy = Literal["reservoir", "balanced", "task"]
EMPTY = 2.0
"""Priority of an empty slot, above all others."""
MOST = 2**23
"""Slots that a memory may have: ranks of as many and of a batch are exact in float32."""


def create(
    slots: int,
    *,
    policy: Policy = "reservoir",
    draws: Mapping[str, Draw] | None = None,
    stores: tuple[str, ...] = (),
    past_only: bool = False,
    per_task: int = 0,
    at_end: str = "",
) -> Memory:
    """Returns a memory.

    Args:
        slots: rows that it holds; with `per_task` at most (and as many experiences as it is then).
        policy: "reservoir" keeps a uniform sample of all rows, "balanced" equal numbers of each
            class seen so far, "task" equal numbers of each experience.
        draws: what the step draws.
        stores: what is kept besides inputs and labels.
        past_only: whether only rows of earlier experiences are drawn.
        per_task: with "task": rows of each experience, `slots` being ignored. Default: no limit.
        at_end: the rows of an experience come at its end, not at its steps; how they are chosen
            then, in a word: "drawn", or "herded" by what a learner gives. Default: at the steps.

    Raises:
        UserError: there are no slots, or (from `init`) more than `MOST`.
    """
    if slots < 1 and per_task < 1:
        raise UserError(f"a memory of {slots or per_task} rows can hold nothing")

    def init(space: Space, example: Mapping[str, Any]) -> Own:
        count = per_task * space.experiences or slots
        if count > MOST:
            raise UserError(f"a memory of {count} rows is too large: at most {MOST} are possible")
        rows = {
            name: jnp.zeros((count, *leaf.shape[1:]), leaf.dtype) for name, leaf in example.items()
        }
        return {
            "rows": rows,
            "priority": jnp.full(count, EMPTY),
            "rank": jnp.zeros(count, jnp.int32),
            "task": jnp.full(count, -1, jnp.int32),
        }

    def insert(
        memory: Own,
        rows: Mapping[str, jax.Array],
        there: jax.Array,
        moment: Moment,
        priority: jax.Array | None = None,
    ) -> Own:
        new = len(there)
        if priority is None:
            priority = jax.random.uniform(moment.key, (new,))
        task = jnp.broadcast_to(moment.experience, (new,)).astype(jnp.int32)
        groups = {
            "reservoir": (jnp.zeros_like(memory["task"]), jnp.zeros_like(task)),
            "task": (memory["task"], task),
        }
        groups = groups.get(policy, (memory["rows"]["labels"], rows["labels"]))
        held = Ranked(memory["priority"], memory["rank"], groups[0])
        held, came = ranked(held, jnp.where(there, priority, EMPTY), groups[1])
        stays = keep(held, came, per_task)
        kept, slot_of_row = stays[:-new], places(stays[:-new], stays[-new:])
        put = lambda old, values: old.at[slot_of_row].set(
            values.astype(old.dtype), mode="drop", unique_indices=True
        )
        return {
            "rows": {name: put(old, rows[name]) for name, old in memory["rows"].items()},
            "priority": put(jnp.where(kept, held.priority, EMPTY), came.priority),
            "rank": put(held.rank, came.rank),
            "task": put(memory["task"], task),
        }

    def draw(memory: Own, number: int, moment: Moment) -> tuple[dict[str, jax.Array], jax.Array]:
        eligible = memory["priority"] < EMPTY
        if past_only:
            eligible &= memory["task"] < moment.experience
        return take(memory, number, eligible, moment.key)

    size = f"{per_task} rows of each experience" if per_task else f"{slots} rows"
    kind = f"{policy}, {size}{', of the past' if past_only else ''}"
    kind += f", {at_end} at the end of an experience" if at_end else ""
    return Memory(init, insert, draw, draws or {}, stores, per_task or slots, kind, bool(at_end))


def take(
    memory: Own, number: int, eligible: jax.Array, key: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Draws rows without replacement from some of the slots.

    Args:
        memory: the memory.
        number: M, at most N.
        eligible: bool [N].
        key: of the draw.

    Returns:
        The rows, and bool [M]: False where there were not enough.
    """
    noise = jax.random.uniform(key, eligible.shape, minval=0.1)
    score, slots = jax.lax.top_k(jnp.where(eligible, noise, 0.0), number)
    return {name: array[slots] for name, array in memory["rows"].items()}, score > 0


class Ranked(NamedTuple):
    """Rows, and how they stand in their groups.

    Attributes:
        priority: float32 [K]; `EMPTY` for what is no row.
        rank: int32 [K]: rows of the same group with a lower priority; of what is no row anything.
        group: int32 [K].
    """

    priority: jax.Array
    rank: jax.Array
    group: jax.Array


def ranked(held: Ranked, priority: jax.Array, group: jax.Array) -> tuple[Ranked, Ranked]:
    """Returns the rows of a memory [N], and those that come [B], ranked together.

    Args:
        held: the rows of the memory, ranked among each other.
        priority: float32 [B], of those that come.
        group: int32 [B], likewise.
    """
    place, there = jnp.arange(len(priority)), priority < EMPTY
    column = lambda row: row[:, None]
    first = (column(priority) == priority[None]) & (column(place) < place[None])  # of equals
    below = (column(priority) < priority[None]) | first
    below &= (column(group) == group[None]) & column(there)
    alike = column(held.group) == group[None]
    under = alike & (column(held.priority) <= priority[None]) & (column(held.priority) < EMPTY)
    over = alike & (column(held.priority) > priority[None]) & there[None]
    rank = (jnp.sum(below, axis=0) + jnp.sum(under, axis=0)).astype(jnp.int32)
    own = (held.rank + jnp.sum(over, axis=1)).astype(jnp.int32)
    return held._replace(rank=own), Ranked(priority, rank, group)


def keep(held: Ranked, came: Ranked, limit: int = 0) -> jax.Array:
    """Returns which rows stay: as many as there are slots, of the lowest ranks in their groups.

    Of equal ranks the lower priority stays. What stays of a group are its lowest ranks without a
    gap, so that they need not be counted again.

    Args:
        held: the rows of the slots [N].
        came: the rows that come [B], ranked with them.
        limit: most rows of one group; 0: none.

    Returns:
        bool [N + B], True for at most N.
    """
    new = len(came.rank)
    priority = jnp.concatenate([held.priority, came.priority])
    rank = jnp.concatenate([held.rank, came.rank])
    stays = priority < EMPTY
    if limit:
        stays &= rank < limit
    surplus = jnp.sum(stays) - len(held.rank)  # so many go, those of the highest ranks
    # float32, for which top_k is quick on CPU, is exact: ranks are below 2**24.
    highest, _ = jax.lax.top_k(jnp.where(stays, rank, -1).astype(jnp.float32), new)
    last = highest[jnp.maximum(surplus - 1, 0)].astype(jnp.int32)
    above, equal = stays & (rank > last), stays & (rank == last)
    _, ordered = jax.lax.top_k(jnp.where(equal, priority, -1.0), new)
    goes = above.at[ordered].max(jnp.arange(new) < surplus - jnp.sum(above))
    return stays & ~(goes & (surplus > 0))


def places(kept_slots: jax.Array, kept_rows: jax.Array) -> jax.Array:
    """Returns the slot of each new row: a free one, or one beyond the last for a row that goes.

    Args:
        kept_slots: bool [N]: slots whose rows stay.
        kept_rows: bool [B]: new rows that stay; no more than there are free slots.
    """
    count, new = len(kept_slots), len(kept_rows)
    _, free = jax.lax.top_k((~kept_slots).astype(jnp.float32), min(count, new))
    number = jnp.clip(jnp.cumsum(kept_rows) - 1, 0, len(free) - 1)
    return jnp.where(kept_rows, free[number], count + jnp.arange(new))


def mean(values: jax.Array, there: jax.Array) -> jax.Array:
    """Returns the mean of the values [M] of rows that are there; 0 where none is."""
    count = jnp.maximum(jnp.sum(there), 1).astype(jnp.float32)
    return jnp.sum(jnp.where(there, values, 0.0)) / count


def check_size(slots: int, drawn: int) -> None:
    """Raises a `UserError` where a memory holds less than is drawn from it at once."""
    checks.within(1, memory=slots)
    checks.within(0, replay=drawn)
    if slots < drawn:
        raise UserError(
            f"learner.memory = {slots} is smaller than the {drawn} rows that are replayed at once: "
            "make the memory larger, or learner.replay smaller"
        )
