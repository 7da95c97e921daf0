"""Activations are split as the placement in force says, and nothing is said outside of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from lamina.models import placement


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
