"""Hugging Face's layouts: the same logits as transformers', there and back, and hostile folders."""

import json
import pickle
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina.models.functional import functional
from lamina.models.spec import DataSpec
from lamina.models.transformer import transformer
from lamina.models.vit import vit
from lamina.platform.checkpoints import layouts, names, safetensors, transfer, weights
from lamina.platform.errors import UserError
from lamina.platform.training import foreign

REFERENCES = Path(__file__).parents[2] / "references" / "hugging_face"
LLAMA = {"depth": 2, "embed": 24, "heads": 4, "kv_heads": 2, "mlp": 40}


def build(name, scan):
    found = weights.open_weights(REFERENCES / name)
    layout = layouts.detect(found.tensors)
    keys = foreign.required(layout, found.config)
    if layout == "hf-llama":
        spec = DataSpec((9,), "int32", 61)
        make = lambda rngs: transformer(rngs, spec, jnp.float32, scan=scan, **LLAMA, **keys)
    else:
        spec = DataSpec((12, 12, 3), "float32", 5)
        sizes = {"depth": 2, "embed": 24, "heads": 3, "mlp": 40, "patch": 4}
        make = lambda rngs: vit(rngs, spec, jnp.float32, scan=scan, **sizes, **keys)
    return found, layout, functional(make)


def load(found, layout, model):
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), model.params
    )
    targets = {path: leaf.shape for path, leaf in names.flatten(target).items()}
    done = transfer.transfer(layouts.to_ours(layout, found.tensors, targets), target)
    assert not done.left
    assert not done.unused
    return done.params


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama_tied_sharded", "vit"])
def test_logits_are_those_of_transformers(name, scan):
    found, layout, model = build(name, scan)
    params = load(found, layout, model)
    expected = json.loads((REFERENCES / name / "expected.json").read_text())
    inputs = np.asarray(expected["inputs"])
    if layout == "hf-vit":
        inputs = inputs.transpose(0, 2, 3, 1).astype(np.float32)
    output, _ = model.apply(params, {}, jnp.asarray(inputs), train=False)
    np.testing.assert_allclose(output.logits, expected["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama_tied_sharded", "vit"])
def test_what_is_loaded_is_written_again_bit_for_bit(name, scan):
    found, layout, model = build(name, scan)
    back = layouts.from_ours(layout, names.flatten(load(found, layout, model)))
    assert set(back) == set(found.tensors)
    for key, (size, give) in back.items():
        assert size == safetensors.Layout(found.tensors[key].shape, found.tensors[key].dtype)
        np.testing.assert_array_equal(give(), found.tensors[key])


def test_a_part_of_a_converted_parameter_is_that_part_of_the_whole():
    found, layout, model = build("llama", True)
    targets = {path: leaf.shape for path, leaf in names.flatten(model.params).items()}
    ours = layouts.to_ours(layout, found.tensors, targets)
    kernel = ours["layers/blocks/query/kernel"]
    index = (slice(1, 2), slice(3, 9), slice(0, 2), slice(None))
    np.testing.assert_array_equal(kernel[index], np.asarray(kernel)[index])


def test_other_sizes_are_named():
    found, layout, _ = build("llama", True)
    spec = DataSpec((9,), "int32", 60)
    other = functional(
        lambda rngs: transformer(rngs, spec, jnp.float32, **{**LLAMA, "depth": 3}, tied=False)
    )
    with pytest.raises(UserError) as caught:
        load(found, layout, other)
    message = str(caught.value)
    assert "embedding: shape (61, 24) in the source, (60, 24) here" in message
    assert "query/kernel: shape (2, 24, 4, 6) in the source, (3, 24, 4, 6) here" in message


def test_keys_that_shapes_do_not_show_are_compared_with_config_json():
    config = json.loads((REFERENCES / "llama" / "config.json").read_text())
    keys = {"embedding_scale": 1.0, "norm_epsilon": 1e-6, "rope_theta": 5e5, "tied": False}
    with pytest.raises(UserError, match=r"--config.model.norm_epsilon=1e-05$"):
        foreign.check("hf-llama", config, keys)
    foreign.check("hf-llama", config, {**keys, "norm_epsilon": 1e-5})
    with pytest.raises(UserError, match="attention_bias = True, which our model doesn't have"):
        foreign.check("hf-llama", config | {"attention_bias": True}, keys)
    with pytest.raises(UserError, match=r"config.json is damaged"):
        foreign.check("hf-llama", config | {"head_dim": "a", "num_attention_heads": "b"}, keys)
    scaled = config | {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}
    with pytest.raises(UserError, match="rope_parameters"):
        foreign.check("hf-llama", scaled, keys)


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(REFERENCES / "llama_tied_sharded", tmp_path / "w")
    return tmp_path / "w"


def change_index(folder, **changes):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(changes)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../w.safetensors", "/etc/passwd", "a\\b.safetensors", 3, "x.bin"]
)
def test_an_index_that_leads_outside_its_folder_is_refused(folder, name):
    change_index(folder, **{"model.norm.weight": name})
    with pytest.raises(UserError, match=r"leads outside its folder: 'model.norm.weight'"):
        weights.open_weights(folder)


def test_an_index_that_lies_is_refused(folder):
    change_index(folder, extra="model-00001-of-00004.safetensors")
    with pytest.raises(UserError, match=r"says that 'extra' is in model-00001.*it is not"):
        weights.open_weights(folder)


def test_a_shard_that_is_cut_or_missing_is_named(folder):
    path = folder / "model-00002-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model-00002-of-00004.safetensors is cut short"):
        weights.open_weights(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"names model-00002-of-00004.safetensors, which is not"):
        weights.open_weights(folder)


def test_damaged_json_is_refused(folder):
    (folder / "config.json").write_text("{" * 100000)
    with pytest.raises(UserError, match=r"config.json is damaged"):
        weights.open_weights(folder)
    (folder / "config.json").unlink()
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match=r"index.json is damaged"):
        weights.open_weights(folder)


def test_a_folder_of_pickles_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"w": 1}))
    assert weights.is_weights(tmp_path)
    with pytest.raises(UserError, match="pickles only"):
        weights.open_weights(tmp_path)


def test_layers_with_gaps_are_refused():
    tensors = {"model.layers.1.input_layernorm.weight": np.ones(3)}
    with pytest.raises(UserError, match="not numbered from 0 on: 1"):
        layouts.to_ours("hf-llama", tensors, {})
