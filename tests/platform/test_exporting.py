"""Exported models give the numbers of the run, without Lamina."""

import json
import shutil

import jax
import numpy as np
import pytest
from jax import export
from safetensors import safe_open

from lamina.platform import exporting
from lamina.platform.checkpoints import names
from lamina.platform.errors import UserError
from lamina.platform.training import trained


def test_weights_read_back_equal_those_of_the_run(finished, tmp_path):
    found = trained.read(finished.workdir, seed=2)
    exporting.weights(found, str(tmp_path / "model.safetensors"))
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    wanted = names.flatten(found.params)
    assert read.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(read[name], array, err_msg=name)
    assert (metadata["seed"], metadata["step"]) == ("2", "10")
    assert json.loads(metadata["model"])["widths"] == [8]


def test_another_run_starts_from_exported_weights(finished, tiny_run, tmp_path):
    found = trained.read(finished.workdir)
    exporting.weights(found, str(tmp_path / "model.safetensors"))
    tiny_run(
        tmp_path / "run",
        steps=5,
        init_from=str(tmp_path / "model.safetensors"),
        optimizer={"name": "sgd", "learning_rate": 0.0},
    )
    taken = names.flatten(trained.read(tmp_path / "run").params)
    for name, array in names.flatten(found.params).items():
        np.testing.assert_array_equal(taken[name], array, err_msg=name)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_an_exported_prediction_equals_the_model_for_any_batch_size(finished, tmp_path, batch_size):
    found = trained.read(finished.workdir)
    exporting.prediction(found, str(tmp_path / "model.jax"))
    read = export.deserialize(bytearray((tmp_path / "model.jax").read_bytes()))
    shape = (batch_size, *found.spec.input_shape)
    inputs = np.random.default_rng(0).uniform(size=shape).astype(found.spec.input_dtype)
    wanted, _ = jax.jit(
        lambda x: found.model.apply(found.params, found.model_state, x, train=False)
    )(inputs)
    np.testing.assert_allclose(read.call(inputs), wanted.logits, rtol=1e-6, atol=1e-6)


def test_a_damaged_run_is_not_exported(finished, tmp_path):
    folder = shutil.copytree(finished.workdir, tmp_path / "run")
    for manifest in folder.glob("checkpoints/*/manifest.json"):
        manifest.write_text("")
    with pytest.raises(UserError, match=r"every checkpoint .* is damaged; nothing was deleted"):
        trained.read(folder)
