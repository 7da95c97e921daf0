"""Runs with islands: on one device or a mesh, resumed, with some that leave or join."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from lamina.platform.errors import UserError
from lamina.platform.run import restore, run
from lamina.platform.training import compiled, experiment, initial, islands, loading, step

DILOCO = {"name": "diloco", "number": 4, "every": 3}
METHODS = {
    "diloco": DILOCO,
    "int8": {**DILOCO, "compression": "int8"},
    "local_sgd": {"name": "local_sgd", "number": 4, "every": 3, "compression": "float16"},
    "demo": {"name": "demo", "number": 4, "topk": 8, "chunk": 16},
}
ON_MESH = {"data": 2, "replica": 4}


def with_islands(digits, block, **changes):
    """Returns the config of a run of 20 steps."""
    config = digits(checkpoint__every=5, checkpoint__keep=9, model__widths=(16,), **changes)
    if block:
        with config.unlocked():
            config.islands = block
    return config


@pytest.fixture
def assembled(digits):
    """Returns `assembled(block, devices=1, **changes)`: the parts of such a run."""

    def make(block, devices=1, **changes):
        config = experiment.resolve(with_islands(digits, block, **changes))
        return experiment.assemble(config, devices=jax.devices()[:devices])

    return make


def learned(parts, steps=7):
    """Returns the state after some steps on random batches."""
    jitted, (_, batch) = compiled.single_step(parts)
    state = initial.create(parts, loading.NOTHING)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = {
            "inputs": rng.normal(size=batch["inputs"].shape).astype(np.float32),
            "labels": rng.integers(0, 10, batch["labels"].shape, np.int32),
        }
        state = jitted(state, {k: jax.device_put(v, batch[k].sharding) for k, v in rows.items()})
    assert jitted._cache_size() == 1, "nothing is compiled again"
    return jax.device_get(state), state


def assert_same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


def assert_close(one, two, tolerance=1e-5):
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, one, two)


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("diloco", "local_sgd")), "demo"]
)
def test_islands_on_a_mesh_are_those_of_one_device(name, assembled):
    one, _ = learned(assembled(METHODS[name]))
    eight, placed = learned(assembled(METHODS[name], 8, mesh=ON_MESH))
    for part in ("params", "islands", "optimizer_state", "metrics"):
        assert_close(getattr(one, part), getattr(eight, part))
    for leaf in jax.tree.leaves(placed.islands):
        assert leaf.sharding.spec[0] == "replica"


def test_what_is_sent_between_devices_is_the_code_and_not_the_numbers(assembled):
    parts = assembled(METHODS["int8"], 8, mesh=ON_MESH)
    jitted, arguments = compiled.single_step(parts)
    program = jitted.lower(*arguments).compile()
    gathered = re.findall(r"= (\w+)\[[\d,]*\]\S* all-gather", program.as_text())
    assert "s8" in gathered


def test_one_island_with_rounds_of_a_step_is_ordinary_training(assembled):
    outer = {"name": "sgd", "learning_rate": 1.0}
    changes = {"optimizer": {"name": "sgd", "learning_rate": 0.1}, "model__dropout": 0.3}
    plain, _ = learned(assembled({}, **changes))
    island, _ = learned(
        assembled({"name": "diloco", "number": 1, "every": 1, "outer": outer}, **changes)
    )
    assert_close(plain.params, island.params, 1e-6)


@pytest.mark.slow
def test_an_island_learns_alone_from_its_part_of_the_batch_until_they_meet(assembled):
    parts = assembled({"name": "local_sgd", "number": 2, "every": 3})
    state, _ = learned(parts, steps=2)
    alone = parts.recipe._replace(islands=None)
    one = jax.jit(lambda state, batch: step.train_step(alone, state, batch, jnp.bool_(False)))
    start = initial.create(parts, loading.NOTHING)
    for number in range(2):
        own, rng = islands.island(parts.recipe.islands, start, number), np.random.default_rng(0)
        for _ in range(2):
            inputs = rng.normal(size=parts.batch["inputs"].shape).astype(np.float32)
            labels = rng.integers(0, 10, parts.batch["labels"].shape, np.int32)
            batch = {"inputs": jnp.asarray(inputs), "labels": jnp.asarray(labels)}
            own = one(own, islands.rows_of(parts.recipe.islands, batch, number))
        expected = jax.tree.map(lambda a, i=number: a[i], state.islands["params"])
        assert_close(own.params, expected)
    assert_same(jax.device_get(start.params), state.params)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two seeds with int8 islands and a moving average, 20 steps; a test copies its folder."""
    folder = tmp_path_factory.mktemp("islands") / "run"
    return run(config_of_whole(), folder, console=False, devices=jax.devices()[:1])


def config_of_whole(**changes):
    config = {
        "seeds": (0, 7),
        "steps": 20,
        "data": {"name": "digits", "batch_size": 40},
        "model": {"name": "mlp", "widths": (16,)},
        "task": {"name": "classification"},
        "optimizer": {"name": "adamw", "learning_rate": 1e-2},
        "schedule": {"name": "constant"},
        "islands": METHODS["int8"],
        "ema": {"decay": 0.9},
        "checkpoint": {"every": 5, "keep": 9},
        "log_every": 5,
        "steps_per_call": 5,
        "trackers": (),
    }
    return ConfigDict(config | changes)


def killed_after(whole, step, folder):
    """Copies a run's folder as it would be, had it been killed after a checkpoint."""
    shutil.copytree(whole.workdir, folder)
    for later in range(step + 5, 25, 5):
        shutil.rmtree(folder / "checkpoints" / str(later))
    for file in ("result.json", "status.json"):
        (folder / file).unlink()
    return folder


def test_a_run_resumes_in_the_middle_of_a_round_bit_for_bit(whole, tmp_path, run_here):
    again = run_here(config_of_whole(), killed_after(whole, 5, tmp_path / "run"))
    assert_same(jax.device_get(whole.state), jax.device_get(again.state))
    without_time = lambda result: [r._replace(time=0) for r in result.metrics]
    assert without_time(whole) == without_time(again)


@pytest.fixture
def run_here():
    return lambda config, folder: run(config, folder, console=False, devices=jax.devices()[:1])


def test_bytes_are_counted_beside_the_loss_and_in_the_result(whole):
    params = jax.tree.leaves(whole.state.params)
    size = sum(leaf[0].size + 4 * (leaf.shape[-1] if leaf.ndim > 2 else 1) for leaf in params)
    sent = [r.value for r in whole.metrics if r.name == "sent_bytes" and r.seed == 7]
    # Rounds end after 3, 6, 9, 12, 15 and 18 steps, and with the run.
    assert sent == pytest.approx([size * n / 5 for n in (1, 2, 2, 2)])
    found = whole.summary["communication"]
    assert found == {"islands": 4, "rounds": 7, "bytes": 7 * size, "bytes_per_step": 7 * size / 20}


def test_islands_end_at_the_common_weights_and_their_average_is_restored(whole):
    own, common = whole.state.islands["params"], whole.state.params
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, 2], b), own, common)
    found = restore(whole.workdir, seed=7).trained.params
    assert_same(found, jax.tree.map(lambda a: a[1], whole.state.ema))


def test_islands_leave_between_two_sessions(whole, tmp_path, run_here):
    fewer = config_of_whole(islands={**METHODS["int8"], "number": 2})
    after = run_here(fewer, killed_after(whole, 15, tmp_path / "run"))
    assert after.status == "done"
    assert {leaf.shape[1] for leaf in jax.tree.leaves(after.state.islands)} == {2}


@pytest.mark.parametrize("number", [2, 6])
def test_an_island_that_joins_starts_from_the_common_parameters(number, whole, assembled):
    before = jax.tree.map(lambda a: a[0], jax.device_get(whole.state))
    moved = jax.tree.map(lambda a: a + 1.0, before.params)  # as if they had gone on since
    before = type(before)(**{**vars(before), "params": moved})
    plan = assembled({**DILOCO, "number": number}, data__batch_size=12 * number).recipe.islands
    now = islands.resized(plan, before)
    assert_same(now.params, before.params)
    for i in range(number):
        own, like = (
            jax.tree.map(lambda a, j=j: a[j], state.islands)
            for state, j in ((now, i), (before, i % 4))
        )
        assert_same(own["optimizer_state"], like["optimizer_state"])
        assert_same(own["params"], like["params"] if i < 4 else before.params)


@pytest.mark.slow
def test_seeds_side_by_side_are_those_of_single_runs(whole, tmp_path, run_here):
    alone = run_here(config_of_whole(seeds=(7,)), tmp_path / "run")
    for part in ("params", "islands", "optimizer_state", "ema"):
        both = jax.tree.map(lambda a: a[1], getattr(jax.device_get(whole.state), part))
        assert_same(both, jax.device_get(getattr(alone.state, part)))


BAD = {
    "doesn't divide by islands.number = 5": ({"name": "local_sgd", "number": 5}, {}),
    "mesh.replica = 2 doesn't divide the 1 islands": (
        {"name": "local_sgd", "number": 1},
        {"mesh": {"data": 4, "replica": 2}, "devices": 8},
    ),
    "64 doesn't divide by 128: the mesh (data=8) and 16 islands split a batch in 128": (
        {"name": "local_sgd", "number": 16},
        {"devices": 8},
    ),
    "compression = 'int4' should be one of": ({**DILOCO, "compression": "int4"}, {}),
    "every = 0 should be at least 1 step": ({**DILOCO, "every": 0}, {}),
    "islands.name = 'dilocco' is unknown": ({"name": "dilocco", "number": 4}, {}),
    "islands.number is missing": ({"name": "diloco"}, {}),
    "islands.name is missing": ({"number": 4}, {}),
    "schedule-free": (
        DILOCO,
        {"optimizer": {"name": "schedule_free_sgd", "learning_rate": 0.1}},
    ),
    "an island of islands.name = 'demo' knows its part alone": (
        METHODS["demo"],
        {"optimizer": {"name": "sophia", "learning_rate": 0.1}},
    ),
    "float16 isn't for it": (METHODS["demo"], {"precision": "float16"}),
}


@pytest.mark.parametrize("message", BAD)
def test_a_mistake_is_refused_by_name(message, assembled):
    block, changes = BAD[message]
    with pytest.raises(UserError, match=re.escape(message)):
        assembled(block, **changes)


def test_a_run_whose_last_round_was_shorter_becomes_no_longer(whole, run_here):
    with pytest.raises(UserError, match="steps: 20 -> 30"):
        run_here(config_of_whole(steps=30), whole.workdir)
