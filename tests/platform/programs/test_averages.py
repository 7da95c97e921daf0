"""Averages of the parameters in runs: evaluated, restored, resumed, split over devices."""

import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from lamina.platform.errors import UserError
from lamina.platform.run import restore, run

AVERAGES = {"swa": {"start": 3, "every": 2}, "lawa": {"latest": 3, "every": 2}}


def config_of(name, **changes):
    config = {
        "seeds": (0, 4),
        "steps": 12,
        "data": {"name": "digits", "batch_size": 64},
        "model": {"name": "mlp", "widths": (16,)},
        "task": {"name": "classification"},
        "optimizer": {"name": "sgd", "learning_rate": 0.3},
        "schedule": {"name": "constant"},
        "init_from_rules": {"freeze": ("head/bias",)},
        name: AVERAGES[name],
        "checkpoint": {"every": 4, "keep": 9},
        "log_every": 4,
        "steps_per_call": 4,
        "trackers": (),
    }
    return ConfigDict(config | changes)


def start(name, folder, devices=1, **changes):
    config = config_of(name, **changes)
    return run(config, folder, console=False, devices=jax.devices()[:devices])


@pytest.fixture(scope="module", params=AVERAGES)
def whole(request, tmp_path_factory):
    """(The average's name, a finished run with it.)"""
    folder = tmp_path_factory.mktemp("average") / "run"
    return request.param, start(request.param, folder)


def accuracy(model):
    from lamina.platform.data.digits import digits

    split = digits().splits["validation"]
    rows = [split[i] for i in range(len(split))]
    inputs = np.stack([row["inputs"] for row in rows])
    logits = np.asarray(model(inputs).logits)
    return float(np.mean(np.argmax(logits, axis=-1) == [row["labels"] for row in rows]))


def test_evaluation_and_restore_use_the_average(whole):
    name, result = whole
    state = jax.device_get(result.state)
    for seed, value in zip((0, 4), result.final["validation/accuracy"].values, strict=True):
        model = restore(result.workdir, seed=seed)
        assert accuracy(model) == pytest.approx(value, abs=1e-6)
    kernel = restore(result.workdir, seed=4).trained.params["head"]["kernel"]
    kept = state.ema["head"]["kernel"][1]
    expected = kept if name == "swa" else kept.mean(axis=0)
    np.testing.assert_allclose(kernel, expected, rtol=1e-6, atol=1e-7)
    assert not np.allclose(kernel, state.params["head"]["kernel"][1])


def test_a_run_with_an_average_resumes_bit_for_bit(whole, tmp_path):
    name, result = whole
    shutil.copytree(result.workdir, tmp_path / "run")
    for step in (8, 12):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    for file in ("result.json", "status.json"):
        (tmp_path / "run" / file).unlink()
    again = start(name, tmp_path / "run")
    both = (jax.device_get(result.state), jax.device_get(again.state))
    jax.tree.map(np.testing.assert_array_equal, *both)


@pytest.mark.slow
def test_an_average_that_is_split_is_the_same(whole, tmp_path):
    name, result = whole
    mesh = {"data": 2, "fsdp": 4}
    split = start(name, tmp_path / "run", 8, mesh=mesh, sharding={"rules": "fsdp"})
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, jax.device_get(result.state.ema), jax.device_get(split.state.ema))
    assert "fsdp" in split.state.ema["layers"]["0"]["kernel"].sharding.spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema": {"decay": 0.9}}, "ema.decay = 0.9 and swa.every = 2: evaluation takes one"),
        ({"swa": {"start": 11, "every": 2}}, "nothing is averaged within steps = 12"),
        ({"swa": {"every": -1}}, "swa.every = -1 should be a number of steps, or 0"),
        ({"lawa": {"every": 1, "latest": 0}, "swa": {}}, "lawa.latest = 0 at least 1"),
    ],
)
def test_a_mistake_is_refused_by_name(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        start("swa", tmp_path, **changes)
