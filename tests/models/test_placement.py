"""Activations are split as the placement in force says, and nothing is said outside of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from lamina.models import placement, transformer, vit
from lamina.models.spec import DataSpec


@pytest.fixture
def placed():
    devices = np.array(jax.devices()).reshape(4, 2, 1)
    mesh = Mesh(devices, ("data", "tensor", "sequence"), axis_types=(AxisType.Auto,) * 3)
    axes = {"batch": ("data",), "length": ("sequence",), "heads": ("tensor",)}
    return placement.Placement("tpu", mesh, axes)


def test_outside_of_a_placement_the_default_backend_counts_and_nothing_is_constrained():
    assert placement.in_force() is None
    assert placement.platform() == "cpu"
    assert not placement.single_device()
    x = jnp.ones((4, 2))
    assert placement.constrain(x, "batch", None) is x


def test_dimensions_are_split_by_name(placed):
    with placement.use(placed):
        assert placement.platform() == "tpu"
        spec = placement.partition_spec((8, 6, 4, 3), "batch", "length", "heads", None)
        assert spec == P(("data",), None, ("tensor",), None)
    assert placement.in_force() is None


def test_a_dimension_that_does_not_divide_is_left_whole(placed):
    with placement.use(placed):
        assert placement.partition_spec((6, 6), "batch", None) == P(None, None)


def test_a_constrained_array_lies_as_it_was_told(placed):
    @jax.jit
    def double(x):
        with placement.use(placed):
            return placement.constrain(2 * x, "batch", "heads")

    result = double(np.ones((8, 4)))
    assert {shard.data.shape for shard in result.addressable_shards} == {(2, 2)}


def test_a_name_that_the_placement_does_not_know_is_left_to_the_compiler(placed):
    with placement.use(placed):
        assert placement.partition_spec((8, 6), "batch", "mlp") == P(("data",), P.UNCONSTRAINED)


@pytest.mark.parametrize("name", ["vit", "transformer"])
def test_a_model_names_the_dimensions_of_its_main_activations(name, monkeypatch):
    seen = set()

    def note(x, *names, summed=""):
        del summed
        assert len(names) == x.ndim
        seen.update(filter(None, names))
        return x

    for module in (vit, transformer):
        monkeypatch.setattr(module, "constrain", note)
    if name == "vit":
        spec, inputs = DataSpec((8, 8, 3), "float32", 4), jnp.ones((2, 8, 8, 3))
        model = vit.vit(nnx.Rngs(0), spec, jnp.float32, patch=4, depth=1, embed=8, heads=2)
    else:
        spec, inputs = DataSpec((6,), "int32", 16), jnp.zeros((2, 6), jnp.int32)
        model = transformer.transformer(nnx.Rngs(0), spec, jnp.float32, depth=1, embed=8, heads=2)
    jax.make_jaxpr(model)(inputs)
    assert seen <= placement.VOCABULARY
    assert {"batch", "stream", "length", "heads", "mlp"} <= seen


def test_what_is_placed_can_be_recorded_with_what_it_was_summed_over(placed):
    def function(x):
        return placement.constrain(x, "batch", None, summed="heads")

    with placement.use(placed), placement.recorded() as seen:
        jax.eval_shape(function, jnp.ones((8, 4)))
    assert seen == [
        placement.Seen(("batch", None), (8, 4), "float32", P(("data",), None), ("tensor",))
    ]
