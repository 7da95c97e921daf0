"""Placements in words name every mesh axis of several devices, and give true bytes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lamina.sharding import mesh as meshes
from lamina.sharding import view


@pytest.fixture(scope="module")
def mesh():
    return meshes.create(jax.devices(), data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (P(), "data B, fsdp B, tensor B"),
        (P("fsdp", "tensor"), "data B, fsdp S(0), tensor S(1)"),
        (P(("data", "fsdp"), None), "data S(0), fsdp S(0), tensor B"),
        (P("data", P.UNCONSTRAINED), "data S(0), fsdp free, tensor free"),
    ],
)
def test_each_axis_splits_or_broadcasts(mesh, spec, text):
    assert view.signature(spec, mesh) == text


def test_a_sum_that_is_not_taken_is_partial(mesh):
    assert view.signature(P("data"), mesh, ["tensor"]) == "data S(0), fsdp B, tensor P"


def test_on_one_device_there_is_nothing_to_say():
    assert view.signature(P(), meshes.create(jax.devices()[:1])) == ""


@pytest.mark.parametrize("spec", [P(), P("fsdp", "tensor"), P(("data", "fsdp")), P(None, "data")])
def test_bytes_are_those_of_a_shard(mesh, spec):
    array = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, spec))
    expected = array.addressable_shards[0].data.nbytes
    assert view.bytes_per_device(array.shape, 4, spec, mesh) == expected
