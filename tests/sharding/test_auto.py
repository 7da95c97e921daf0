"""The rules `auto` find the layouts that we wrote by hand, and some for models without names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lamina.models.functional import functional
from lamina.models.mlp import mlp
from lamina.models.spec import DataSpec
from lamina.models.transformer import transformer
from lamina.models.vit import vit
from lamina.sharding import auto, rules
from lamina.sharding import mesh as meshes

TOKENS = jax.ShapeDtypeStruct((8, 32), jnp.int32)
IMAGES = jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.float32)


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):  # Flax's layers need it
        yield


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def nested(tree):
    return traverse_util.unflatten_dict(tree, sep="/")


def derive(model, inputs, ways=4):
    def forward(params, state, x):
        return model.apply(nested(params), state, x, train=False)[0]

    return auto.layout(forward, flat(model.params), (model.model_state, inputs), ways, "tensor")


def by_hand(model, preset="tensor"):
    mesh = meshes.create(jax.devices(), data=2, tensor=4)
    axes, found = flat(model.axes), {}
    for path, leaf in flat(model.params).items():
        spec = rules.partition_spec(axes[path], leaf.shape, rules.preset(preset), mesh, path)
        found[path] = tuple(part or "" for part in [*spec, *[None] * len(leaf.shape)])
        found[path] = found[path][: len(leaf.shape)]
    return found


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_layout_of_a_transformer_is_the_one_by_hand(scan, tied):
    spec = DataSpec((32,), "int32", 64)
    sizes = {"depth": 2, "embed": 32, "heads": 8, "kv_heads": 4, "mlp": 64}
    model = functional(lambda r: transformer(r, spec, jnp.float32, scan=scan, tied=tied, **sizes))
    assert derive(model, TOKENS) == by_hand(model)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("pool", ["token", "gap"])
def test_the_layout_of_a_vit_is_the_one_by_hand(scan, pool):
    spec = DataSpec((16, 16, 3), "float32", 10)
    sizes = {"patch": 4, "depth": 2, "embed": 32, "heads": 4, "mlp": 64}
    model = functional(lambda r: vit(r, spec, jnp.float32, scan=scan, pool=pool, **sizes))
    assert derive(model, IMAGES) == by_hand(model)


def test_the_layout_of_an_mlp_alternates_columns_and_rows():
    spec = DataSpec((16, 16, 3), "float32", 10)
    model = functional(lambda r: mlp(r, spec, jnp.float32, widths=(256, 128)))
    assert derive(model, IMAGES) == {
        "layers/0/kernel": ("", "tensor"),
        "layers/0/bias": ("tensor",),
        "layers/1/kernel": ("tensor", ""),
        "layers/1/bias": ("",),
        "head/kernel": ("", ""),
        "head/bias": ("",),
    }


class Unnamed(nnx.Module):
    """Convolutions, attention and an MLP of Flax, which know nothing of logical axes."""

    def __init__(self, rngs):
        self.first = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.second = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, in_features=32, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.up = nnx.Linear(32, 128, rngs=rngs)
        self.down = nnx.Linear(128, 32, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.second(nnx.relu(self.first(x)))).reshape(x.shape[0], -1, 32)
        x = x + self.attention(self.norm(x))
        x = x + self.down(nnx.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


def test_a_model_without_names_gets_columns_and_rows():
    found = derive(functional(Unnamed), IMAGES)
    assert found["first/kernel"] == ("", "", "", "tensor")
    assert found["second/kernel"] == ("", "", "tensor", "")
    for name in ("query", "key", "value"):
        assert found[f"attention/{name}/kernel"] == ("", "tensor", "")
    assert found["attention/out/kernel"] == ("tensor", "", "")
    assert found["up/kernel"] == ("", "tensor")
    assert found["up/bias"] == ("tensor",)
    assert found["down/kernel"] == ("tensor", "")
    assert found["norm/scale"] == ("",)


def test_a_model_computes_the_same_under_the_layout():
    model = functional(Unnamed)
    params, state = model.init(jax.random.key(0))
    mesh = meshes.create(jax.devices(), data=2, tensor=4)
    specs = derive(model, IMAGES)
    placed = {
        path: jax.device_put(leaf, NamedSharding(mesh, P(*[part or None for part in specs[path]])))
        for path, leaf in flat(params).items()
    }
    x = jax.random.normal(jax.random.key(1), IMAGES.shape)
    forward = jax.jit(lambda params, x: model.apply(params, state, x, train=False)[0].logits)
    split = forward(nested(placed), jax.device_put(x, NamedSharding(mesh, P("data"))))
    np.testing.assert_allclose(split, forward(params, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ways", [1, 2, 3, 8, 64])
def test_what_is_split_divides(ways):
    spec = DataSpec((16, 16, 3), "float32", 10)
    sizes = {"patch": 4, "depth": 3, "embed": 48, "heads": 6, "mlp": 96}
    model = functional(lambda r: vit(r, spec, jnp.float32, scan=False, **sizes))
    found, shapes = derive(model, IMAGES, ways), flat(model.params)
    assert found.keys() == shapes.keys()
    for path, parts in found.items():
        split = [size for size, part in zip(shapes[path].shape, parts, strict=True) if part]
        assert len(split) <= 1
        assert all(size % ways == 0 for size in split)
    assert any(part for parts in found.values() for part in parts) == (ways in (2, 3, 8))


def test_a_chain_of_many_layers_is_solved_at_once():
    spec = DataSpec((16, 16, 3), "float32", 10)
    model = functional(lambda r: mlp(r, spec, jnp.float32, widths=(64,) * 60))
    found = derive(model, IMAGES)
    kernels = [found[f"layers/{i}/kernel"] for i in range(60)]
    assert sum("tensor" in parts for parts in kernels) >= 59
