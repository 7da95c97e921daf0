"""The memory of replay: a sample of what came by, of fixed size, kept by random priorities.

Every row that comes gets a priority from U[0, 1), once. The memory keeps the rows with the lowest
ones: all alike ("reservoir"), or rank by rank within each class or experience. Each row that came
is therefore kept with the same probability as by Algorithm R (Vitter 1985), or by evicting from the
largest class, but a whole batch is inserted by two sorts instead of one row after another, and the
result depends neither on the order of rows in a batch nor on the number of devices.

Letters: N slots, B rows that come, M rows drawn.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lamina.platform.errors import UserError
from lamina.platform.training.learners import Draw, Memory, Moment, Own, Space

Policy = Literal["reservoir", "balanced", "task", "given"]
EMPTY = 2.0
"""Priority of an empty slot, above all others."""


def create(
    slots: int,
    *,
    policy: Policy = "reservoir",
    draws: Mapping[str, Draw] | None = None,
    stores: tuple[str, ...] = (),
    past_only: bool = False,
    per_task: int = 0,
) -> Memory:
    """Returns a memory.

    Args:
        slots: rows that it holds; with `per_task` at most (and as many experiences as it is then).
        policy: "reservoir" keeps a uniform sample of all rows, "balanced" equal numbers of each
            class seen so far, "task" equal numbers of each experience; "given" is "balanced" by
            the priorities that a learner gives at the end of an experience.
        draws: what the step draws.
        stores: what is kept besides inputs and labels.
        past_only: whether only rows of earlier experiences are drawn.
        per_task: with "task": rows of each experience, `slots` being ignored. Default: no limit.

    Raises:
        UserError: there are no slots.
    """
    if slots < 1 and per_task < 1:
        raise UserError(f"a memory of {slots or per_task} rows can hold nothing")

    def init(space: Space, example: Mapping[str, Any]) -> Own:
        count = per_task * space.experiences or slots
        rows = {
            name: jnp.zeros((count, *leaf.shape[1:]), leaf.dtype) for name, leaf in example.items()
        }
        return {
            "rows": rows,
            "priority": jnp.full(count, EMPTY),
            "task": jnp.full(count, -1, jnp.int32),
        }

    def insert(
        memory: Own,
        rows: Mapping[str, jax.Array],
        there: jax.Array,
        moment: Moment,
        priority: jax.Array | None = None,
    ) -> Own:
        count, new = len(memory["priority"]), len(there)
        if priority is None:
            if policy == "given":
                return memory
            priority = jax.random.uniform(moment.key, (new,))
        priority = jnp.concatenate([memory["priority"], jnp.where(there, priority, EMPTY)])
        task = jnp.concatenate(
            [memory["task"], jnp.broadcast_to(moment.experience, (new,)).astype(jnp.int32)]
        )
        labels = jnp.concatenate([memory["rows"]["labels"], rows["labels"]])
        group = {"reservoir": jnp.zeros_like(task), "task": task}.get(policy, labels)
        kept = keep(priority, group, count, per_task)
        slot_of_row = places(kept[:count], kept[count:])
        put = lambda old, values: old.at[slot_of_row].set(
            values.astype(old.dtype), mode="drop", unique_indices=True
        )
        emptied = jnp.where(kept[:count], memory["priority"], EMPTY)
        return {
            "rows": {name: put(old, rows[name]) for name, old in memory["rows"].items()},
            "priority": put(emptied, priority[count:]),
            "task": put(memory["task"], task[count:]),
        }

    def draw(memory: Own, number: int, moment: Moment) -> tuple[dict[str, jax.Array], jax.Array]:
        eligible = memory["priority"] < EMPTY
        if past_only:
            eligible &= memory["task"] < moment.experience
        return take(memory, number, eligible, moment.key)

    size = f"{per_task} rows of each experience" if per_task else f"{slots} rows"
    kind = f"{policy}, {size}{', of the past' if past_only else ''}"
    return Memory(init, insert, draw, draws or {}, stores, per_task or slots, kind)


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


def keep(priority: jax.Array, group: jax.Array, count: int, limit: int = 0) -> jax.Array:
    """Returns which rows stay: the `count` of the lowest rank within their group.

    Args:
        priority: float32 [N + B]; `EMPTY` for what is no row.
        group: int32 [N + B].
        count: N.
        limit: most rows of one group; 0: none.

    Returns:
        bool [N + B], True for at most `count`.
    """
    size = len(priority)
    there = priority < EMPTY
    group = jnp.where(there, group, jnp.iinfo(jnp.int32).max)
    places = jnp.arange(size)
    sorted_group, _, original = jax.lax.sort((group, priority, places), num_keys=2)
    opens = jnp.concatenate([jnp.ones(1, bool), sorted_group[1:] != sorted_group[:-1]])
    first = jax.lax.cummax(jnp.where(opens, places, 0))
    rank = jnp.zeros(size, jnp.int32).at[original].set((places - first).astype(jnp.int32))
    rank = jnp.where(there, rank, size)
    # Of equal ranks the lower priority stays.
    _, _, by_rank = jax.lax.sort((rank, priority, places), num_keys=2)
    kept = jnp.zeros(size, bool).at[by_rank[:count]].set(True) & there
    return kept & (rank < limit) if limit else kept


def places(kept_slots: jax.Array, kept_rows: jax.Array) -> jax.Array:
    """Returns the slot of each new row: a free one, or one beyond the last for a row that goes.

    Args:
        kept_slots: bool [N]: slots whose rows stay.
        kept_rows: bool [B]: new rows that stay; no more than there are free slots.
    """
    count, new = len(kept_slots), len(kept_rows)
    free = jnp.nonzero(~kept_slots, size=new, fill_value=count)[0]
    number = jnp.cumsum(kept_rows) - 1
    return jnp.where(kept_rows, free[jnp.maximum(number, 0)], count + jnp.arange(new))


def mean(values: jax.Array, there: jax.Array) -> jax.Array:
    """Returns the mean of the values [M] of rows that are there; 0 where none is."""
    count = jnp.maximum(jnp.sum(there), 1).astype(jnp.float32)
    return jnp.sum(jnp.where(there, values, 0.0)) / count


def check_count(name: str, value: int) -> None:
    """Raises a `UserError` where a learner's key isn't at least 1."""
    if value < 1:
        raise UserError(f"learner.{name} = {value} should be at least 1")


def check_size(slots: int, drawn: int) -> None:
    """Raises a `UserError` where a memory holds less than is drawn from it at once."""
    check_count("memory", slots)
    if drawn < 0:
        raise UserError(f"learner.replay = {drawn} should not be negative")
    if slots < drawn:
        raise UserError(
            f"learner.memory = {slots} is smaller than the {drawn} rows that are replayed at once: "
            "make the memory larger, or learner.replay smaller"
        )
