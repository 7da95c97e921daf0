"""The memory of replay: what it keeps, and what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina.models.spec import Output
from lamina.platform.errors import UserError
from lamina.platform.incremental import memory as memories
from lamina.platform.incremental.learners import create
from lamina.platform.training import learners
from lamina.platform.training.learners import Moment, Setup, Space
from lamina.platform.training.state import TrainState

SPACE = Space(experiences=4, classes=10, tasks=4, points=4, rows=40)


def moment(experience, key):
    return Moment(jnp.int32(experience), None, None, jnp.int32(0), jax.random.key(key))


def rows(first, count, label=None):
    ids = np.arange(first, first + count)
    labels = ids % 10 if label is None else np.full(count, label)
    return {"inputs": jnp.asarray(ids[:, None]), "labels": jnp.asarray(labels)}


def empty(memory):
    example = jax.eval_shape(lambda: rows(0, 1))
    return memory.init(SPACE, example)


def filled(memory, batches, key=0):
    """The memory after batches of (rows, which are there, experience)."""
    state, insert = empty(memory), jax.jit(memory.insert)
    for number, (new, there, experience) in enumerate(batches):
        state = insert(state, new, jnp.asarray(there), moment(experience, 1000 * key + number))
    return state


def kept(state):
    there = np.asarray(state["priority"]) < memories.EMPTY
    return np.asarray(state["rows"]["inputs"])[there, 0]


def test_a_reservoir_keeps_every_row_with_the_same_probability():
    memory = memories.create(10, policy="reservoir")
    counts = np.zeros(40)
    for key in range(300):
        batches = [(rows(8 * b, 8), np.ones(8, bool), 0) for b in range(5)]
        ids = kept(filled(memory, batches, key))
        assert len(set(ids)) == len(ids) == 10
        counts[ids] += 1
    # Binomial(300, 1/4): mean 75, standard deviation 7.5.
    assert abs(counts - 75).max() < 4.5 * 7.5
    assert abs(counts[:8].sum() - counts[-8:].sum()) < 5 * 7.5 * 4


def test_a_balanced_memory_holds_equal_numbers_of_classes_of_unequal_size():
    memory = memories.create(12, policy="balanced")
    batches = [(rows(0, 32, label=0), np.ones(32, bool), 0)]
    assert len(kept(filled(memory, batches))) == 12
    batches += [(rows(32, 32, label=1), np.ones(32, bool), 1)]
    batches += [(rows(64, 2, label=2), np.ones(2, bool), 1)]
    labels = kept(filled(memory, batches)) // 32
    assert np.bincount(labels).tolist() == [5, 5, 2]


def test_a_memory_by_task_keeps_no_more_than_its_share():
    memory = memories.create(0, policy="task", per_task=3)
    batches = [(rows(20 * t, 20), np.ones(20, bool), t) for t in (0, 0, 1)]
    state = filled(memory, batches)
    assert np.bincount(np.asarray(state["task"])[kept_mask(state)]).tolist() == [3, 3]


def kept_mask(state):
    return np.asarray(state["priority"]) < memories.EMPTY


def test_padding_is_never_kept_and_a_row_stays_in_its_slot():
    memory = memories.create(6, policy="reservoir")
    first = filled(memory, [(rows(0, 4), [True, True, False, False], 0)])
    assert sorted(kept(first)) == [0, 1]
    later = memory.insert(first, rows(10, 4), jnp.zeros(4, bool), moment(0, 9))
    np.testing.assert_array_equal(later["rows"]["inputs"], first["rows"]["inputs"])


def test_draws_are_without_replacement_and_say_what_is_missing():
    memory = memories.create(8, policy="reservoir", past_only=True)
    batches = [(rows(0, 3), np.ones(3, bool), 0), (rows(10, 3), np.ones(3, bool), 1)]
    state = filled(memory, batches)
    drawn, there = memory.draw(state, 5, moment(1, 3))
    assert sorted(np.asarray(drawn["inputs"])[np.asarray(there), 0]) == [0, 1, 2]
    drawn, there = memory.draw(state, 5, moment(2, 3))
    ids = np.asarray(drawn["inputs"])[:, 0]
    assert there.all()
    assert len(set(ids)) == 5


def test_a_memory_that_holds_less_than_is_drawn_is_refused():
    with pytest.raises(UserError, match=r"learner.memory = 50 is smaller than the 128 rows"):
        create("er", memory=50, replay=128)
    with pytest.raises(UserError, match=r"learner.per_task = 0"):
        create("gem", per_task=0)


@pytest.mark.parametrize("policy", ["reservoir", "balanced", "task"])
def test_what_stays_of_a_group_are_its_lowest_priorities_counted_without_a_gap(policy):
    memory = memories.create(12, policy=policy, per_task=4 if policy == "task" else 0)
    rng = np.random.default_rng(0)
    batches = [
        (rows(8 * b, 8, label=b // 3), rng.random(8) < 0.8, min(b // 2, 3)) for b in range(9)
    ]
    state = filled(memory, batches)
    there, rank = kept_mask(state), np.asarray(state["rank"])
    groups = {"reservoir": np.zeros(len(there)), "task": np.asarray(state["task"])}
    group = groups.get(policy, np.asarray(state["rows"]["labels"]))
    for one in np.unique(group[there]):
        mine = np.flatnonzero(there & (group == one))
        by_priority = mine[np.argsort(np.asarray(state["priority"])[mine])]
        assert rank[by_priority].tolist() == list(range(len(mine)))


@pytest.mark.parametrize(("name", "again"), [("er", False), ("derpp", True)])
def test_a_later_pass_brings_logits_anew_and_rows_alone_not(name, again):
    learner, ones = create(name, memory=8, replay=2), jnp.ones(4, bool)
    batch = rows(0, 4) | {"inputs": jnp.ones((4, 3)), "weights": jnp.ones(4)}
    marked = lambda fresh: batch | {"fresh": ones & fresh, "arrives": ones}
    forward = lambda params, batch: Output(batch["inputs"] @ params)
    example = jax.eval_shape(lambda: marked(True))
    own = learners.start(learner, Setup(jnp.ones((3, 10)), forward, example, SPACE, None))
    rest = dict.fromkeys(TrainState.__dataclass_fields__)
    state = TrainState(**rest | {"step": jnp.int32(0), "seed": jnp.uint32(0), "learner": own})
    for fresh in (True, False):
        mixed = learners.mix(learner, state, marked(fresh))
        output = Output(jnp.zeros((len(mixed.batch["labels"]), 10)))
        state = learners.finish_step(learner, state, state, None, mixed, marked(fresh), output)
    assert kept_mask(learners.memory_of(state)).sum() == (8 if again else 4)
