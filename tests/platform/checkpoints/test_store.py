"""Saving and restoring in one process: bits, asynchrony, retention, replacement, other models."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lamina.platform.checkpoints.restoring import list_steps, restore_subtree
from lamina.platform.checkpoints.store import open_store
from lamina.platform.errors import UserError


class Ema(NamedTuple):
    decay: jax.Array
    average: dict


def make_state(seed=0, width=8):
    key = jax.random.key(seed)
    params = {"dense.1": {"kernel": jax.random.normal(key, (4, width)), "bias": jnp.zeros(width)}}
    return {
        "step": jnp.int32(7),
        "params": params,
        "opt_state": optax.adamw(1e-3).init(params),
        "ema": Ema(jnp.float32(0.9), {"kernel": jnp.ones((2, 3), jnp.bfloat16) / 3}),
        "half": jnp.arange(5, dtype=jnp.float16) / 7,
        "flags": jnp.array([True, False, True]),
        "count": jnp.array([2**32 - 1, 0], jnp.uint32),
        "keys": jax.random.split(key, 3),
        "rbg": jax.random.key(1, impl="rbg"),
        "nan": jnp.array([jnp.nan, -0.0, jnp.inf]),
        "nothing": jnp.zeros((0, 3)),
    }


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def raw(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert raw(a) == raw(b)


@pytest.fixture
def store(tmp_path):
    opened = open_store(tmp_path / "checkpoints")
    yield opened
    opened.close()


def test_every_dtype_comes_back_bit_for_bit(store):
    state = make_state()
    assert store.save(7, state, {"seconds": 1.5, "axes": {"kernel": ["embed", None]}})
    restored = store.restore(abstract(state))
    assert restored.step == 7
    assert restored.extra == {"seconds": 1.5, "axes": {"kernel": ["embed", None]}}
    assert restored.notes == ()
    assert_same(restored.state, state)
    assert restored.state["keys"].sharding == state["keys"].sharding
    jax.random.uniform(restored.state["rbg"])  # a usable key


def test_an_empty_folder_restores_to_none(store):
    assert store.restore(abstract(make_state())) is None
    assert store.steps() == ()


def test_the_caller_may_donate_the_state_right_after_save(store):
    state = {"w": jnp.arange(4_000_000, dtype=jnp.float32), "b": jnp.ones(100_000)}
    expected = jax.tree.map(np.array, state)
    form = abstract(state)
    overwrite = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 1, t), donate_argnums=0)
    pointers = {name: leaf.unsafe_buffer_pointer() for name, leaf in state.items()}
    store.save(1, state)
    for _ in range(5):
        state = overwrite(state)
    jax.block_until_ready(state)
    reused = {state[name].unsafe_buffer_pointer() == pointers[name] for name in state}
    assert True in reused, "the memory was not written over, so this test shows nothing"
    restored = store.restore(form)
    jax.tree.map(np.testing.assert_array_equal, restored.state, expected)


def test_retention_keeps_the_newest(tmp_path):
    store = open_store(tmp_path, keep=2)
    for step in range(1, 6):
        store.save(step, {"x": jnp.full(3, step)})
    store.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "5"]
    assert list_steps(tmp_path) == (4, 5)


def test_the_best_by_metric_stays_and_of_equal_ones_the_earlier(tmp_path):
    store = open_store(tmp_path, keep=1, keep_best=("accuracy", "max"))
    for step, value in enumerate([0.1, 0.9, 0.5, 0.9, float("nan"), 0.2]):
        store.save(step, {"x": jnp.full(3, step)}, {"metrics": {"accuracy": value}})
    store.wait()
    assert store.steps() == (1, 5)
    assert store.best() == 1
    store.close()
    again = open_store(tmp_path, keep=1, keep_best=("accuracy", "min"))  # metrics are on the disk
    assert again.best() == 5
    assert float(again.restore({"x": jnp.zeros(3, jnp.int32)}, step=1).state["x"][0]) == 1
    again.close()


def test_old_checkpoints_go_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    from lamina.platform.checkpoints import folders

    seen = []
    remove = folders.remove

    def spy(path):
        seen.append((path.name, list_steps(tmp_path)))
        remove(path)

    monkeypatch.setattr(folders, "remove", spy)
    store = open_store(tmp_path, keep=1)
    for step in (1, 2):
        store.save(step, {"x": jnp.ones(3)})
    store.close()
    assert seen == [("1", (1, 2))]


def test_an_identical_save_is_skipped_and_a_different_one_replaces(store):
    first, second = {"x": jnp.ones(3)}, {"x": jnp.full(3, 2.0)}
    assert store.save(5, first)
    assert not store.save(5, first)
    assert store.save(5, second)
    store.wait()
    assert [p.name for p in store.directory.iterdir()] == ["5-1"]
    assert store.steps() == (5,)
    assert float(store.restore(first).state["x"][0]) == 2.0


def test_an_unverified_checkpoint_of_the_step_is_replaced(tmp_path):
    state = {"x": jnp.ones(3)}
    store = open_store(tmp_path)
    store.save(5, state)
    store.close()
    store = open_store(tmp_path)
    assert store.save(5, state)
    store.close()
    assert [p.name for p in tmp_path.iterdir()] == ["5-1"]


def test_going_back_to_an_earlier_step_never_deletes_what_is_saved_next(tmp_path):
    store = open_store(tmp_path, keep=2)
    for step in (10, 20, 30):
        store.save(step, {"x": jnp.full(3, step)})
    store.restore({"x": jnp.zeros(3, jnp.int32)}, step=20)
    store.save(25, {"x": jnp.full(3, 25)})
    store.close()
    assert list_steps(tmp_path) == (20, 25, 30)


def test_another_model_is_named_by_path_and_shape_and_is_not_called_damaged(store):
    store.save(1, make_state(width=8))
    other = make_state(width=16)
    other["new"] = jnp.zeros(2)
    other["count"] = other["count"].astype(jnp.int32)
    del other["half"]
    with pytest.raises(UserError) as caught:
        store.restore(abstract(other))
    message = str(caught.value)
    assert "params/dense.1/kernel: the checkpoint has float32[4,8]" in message or "more" in message
    assert "count: the checkpoint has uint32[2], the state here int32[2]" in message
    assert "half: the checkpoint has float16[5], the state here has no such array" in message
    assert "damaged" not in message
    assert store.steps() == (1,)


def test_many_differences_are_counted_not_all_listed(store):
    store.save(1, {f"w{i}": jnp.ones(2) for i in range(20)})
    with pytest.raises(UserError, match="and 12 more"):
        store.restore({f"w{i}": jnp.ones(3) for i in range(20)})


def test_a_step_that_is_not_there_is_an_error_that_names_those_that_are(store):
    store.save(3, {"x": jnp.ones(3)})
    with pytest.raises(UserError, match=r"no checkpoint of step 4 .*steps: 3"):
        store.restore({"x": jnp.ones(3)}, step=4)


def test_parts_are_read_without_knowing_the_rest(store):
    state = make_state()
    store.save(7, state, {"a": 1})
    store.wait()
    part = restore_subtree(store.directory, ("params", "ema", "keys", "model_state?"))
    assert set(part.state) == {"params", "ema", "keys"}
    assert part.extra == {"a": 1}
    kernel = part.state["params"]["dense.1"]["kernel"]
    assert isinstance(kernel, np.ndarray)
    np.testing.assert_array_equal(kernel, state["params"]["dense.1"]["kernel"])
    assert part.state["ema"]["average"]["kernel"].dtype == jnp.bfloat16
    assert raw(part.state["keys"]) == raw(state["keys"])
    placed = restore_subtree(
        store.directory, "params", shardings=lambda name, record: state["step"].sharding
    )
    assert isinstance(placed.state["params"]["dense.1"]["bias"], jax.Array)
    with pytest.raises(UserError, match=r"no 'parms'; it has .*params"):
        restore_subtree(store.directory, "parms")
    with pytest.raises(UserError, match="no checkpoint in"):
        restore_subtree(store.directory / "nowhere", "params")


def test_a_leaf_that_is_no_array_is_refused_by_name(store):
    with pytest.raises(TypeError, match=r"a/b .*float"):
        store.save(1, {"a": {"b": 1.0}})
    with pytest.raises(ValueError, match="leads into"):
        store.save(1, {"a": jnp.ones(1), "a/b": jnp.ones(1)})


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(UserError, match="keep is 0"):
        open_store(tmp_path, keep=0)
    with pytest.raises(UserError, match="biggest"):
        open_store(tmp_path, keep_best=("loss", "biggest"))


def test_extra_is_taken_at_the_time_of_the_call(store):
    extra = {"history": [1]}
    store.save(1, {"x": jnp.ones(3)}, extra)
    extra["history"].append(2)
    assert store.restore({"x": jnp.ones(3)}).extra == {"history": [1]}
    assert json.dumps(extra)


def test_without_atomic_rename_the_manifest_alone_completes_a_checkpoint(tmp_path, monkeypatch):
    from lamina.platform.checkpoints import manifest

    monkeypatch.setattr(manifest, "is_local", lambda path: False)  # as on gs://
    store = open_store(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.save(step, {"x": jnp.full(3, step)})
    store.close()
    assert list_steps(tmp_path) == (2, 3)
    (tmp_path / "3" / "manifest.json").unlink()  # as if killed before the manifest
    assert list_steps(tmp_path) == (2,)
    store = open_store(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["2"]
    assert int(store.restore({"x": jnp.zeros(3, jnp.int32)}).state["x"][0]) == 2
    store.close()
