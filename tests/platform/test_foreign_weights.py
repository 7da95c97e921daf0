"""Runs start from Hugging Face folders, and write them; what is wrong in one is named."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from ml_collections import ConfigDict

from lamina.platform import exporting
from lamina.platform.checkpoints import names, safetensors, weights
from lamina.platform.errors import UserError
from lamina.platform.run import run
from lamina.platform.training import trained

REFERENCES = Path(__file__).parents[1] / "references" / "hugging_face"
LLAMA = {
    "steps": 2,
    "data": {"name": "synthetic_tokens", "vocabulary": 61, "context": 9, "batch_size": 8},
    "schedule": {"name": "constant"},
    "model": {
        "name": "transformer",
        **{"depth": 2, "embed": 24, "heads": 4, "kv_heads": 2, "mlp": 40},
        **{"tied": False, "rope_theta": 500000.0, "embedding_scale": 1.0, "norm_epsilon": 1e-5},
    },
    "task": {"name": "language_modeling"},
    "optimizer": {"name": "sgd", "learning_rate": 0.0},
    "steps_per_call": 1,
    "log_every": 1,
    "trackers": (),
    "init_from": str(REFERENCES / "llama"),
}
VIT = {
    "model": {
        "name": "vit",
        **{"depth": 2, "embed": 8, "heads": 2, "mlp": 12, "patch": 4, "norm_epsilon": 1e-12},
    },
    "steps": 5,
}


@pytest.mark.slow
def test_a_run_starts_from_a_folder_each_parameter_split_as_in_training(tmp_path):
    config = ConfigDict(LLAMA | {"mesh": {"data": 2, "fsdp": 4}, "sharding": {"rules": "fsdp"}})
    result = run(config, tmp_path / "run", console=False, devices=jax.devices()[:8])
    found = trained.read(result.workdir)
    source = weights.open_weights(REFERENCES / "llama").tensors
    params = names.flatten(found.params)
    np.testing.assert_array_equal(params["embedding"], source["model.embed_tokens.weight"])
    query = np.asarray(source["model.layers.1.self_attn.q_proj.weight"])
    np.testing.assert_array_equal(
        params["layers/blocks/query/kernel"][1], query.T.reshape(24, 4, 6)
    )
    exporting.to_layout(found, str(tmp_path / "out"), "hf-llama")
    back = weights.open_weights(tmp_path / "out")
    assert back.tensors.keys() == source.keys()
    for name, tensor in back.tensors.items():
        np.testing.assert_array_equal(tensor, source[name], err_msg=name)
    theirs = json.loads((REFERENCES / "llama" / "config.json").read_text())
    shared = set(theirs) & set(back.config) - {"max_position_embeddings"}
    assert {key: back.config[key] for key in shared} == {key: theirs[key] for key in shared}


@pytest.mark.slow
def test_a_vit_goes_out_in_bfloat16_and_back_in_parts(tiny_run, tmp_path):
    first = tiny_run(tmp_path / "first", **VIT)
    found = trained.read(first.workdir)
    exporting.to_layout(found, str(tmp_path / "w.safetensors"), "hf-vit", "bfloat16")
    with safetensors.File(tmp_path / "w.safetensors") as file:
        kernel = file.tensors["vit.embeddings.patch_embeddings.projection.weight"]
        assert kernel.dtype == ml_dtypes.bfloat16
        assert kernel.shape == (8, 1, 4, 4)
    second = tiny_run(
        tmp_path / "second",
        **VIT,
        seeds=(7,),
        init_from=str(tmp_path / "w.safetensors"),
        init_from_rules={"exclude": ("^head/",)},
        optimizer={"name": "sgd", "learning_rate": 0.0},
    )
    taken = names.flatten(trained.read(second.workdir).params)
    for name, array in names.flatten(found.params).items():
        if not name.startswith("head/"):
            rounded = np.asarray(array).astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(taken[name], rounded, err_msg=name)
    with pytest.raises(UserError, match="hf-llama is of the model 'transformer', not 'vit'"):
        exporting.to_layout(found, str(tmp_path / "x"), "hf-llama")


def test_other_keys_of_the_model_are_told_as_flags(tmp_path):
    config = ConfigDict(LLAMA)
    config.model.norm_epsilon = 1e-6
    config.model.embedding_scale = 0.0
    with pytest.raises(UserError) as caught:
        run(config, tmp_path / "run", console=False, devices=jax.devices()[:1])
    assert "--config.model.embedding_scale=1.0 --config.model.norm_epsilon=1e-05" in str(
        caught.value
    )


def test_values_that_are_not_finite_are_refused_by_name(tmp_path):
    folder = shutil.copytree(REFERENCES / "llama", tmp_path / "w")
    source = weights.open_weights(folder).tensors
    values = {name: np.array(tensor) for name, tensor in source.items()}
    values["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    sizes = {n: safetensors.Layout(v.shape, v.dtype) for n, v in values.items()}
    safetensors.write(folder / "model.safetensors", sizes, values.__getitem__)
    config = ConfigDict(LLAMA | {"init_from": str(folder)})
    with pytest.raises(UserError, match=r"not finite: layers/blocks/up/kernel"):
        run(config, tmp_path / "run", console=False, devices=jax.devices()[:1])


def test_weights_of_another_model_are_refused(tmp_path):
    config = ConfigDict(LLAMA | {"init_from": str(REFERENCES / "vit")})
    with pytest.raises(UserError, match="weights of a 'vit'"):
        run(config, tmp_path / "run", console=False, devices=jax.devices()[:1])
