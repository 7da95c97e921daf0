"""Rules turn logical axes into partition specs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from lamina.models.axes import VOCABULARY
from lamina.sharding import mesh as meshes
from lamina.sharding import rules


@pytest.fixture(scope="module")
def mesh():
    return meshes.create(jax.devices(), data=2, fsdp=2, tensor=2)


def test_data_parallelism_splits_no_parameter(mesh):
    assert rules.partition_spec(("embed", "mlp"), (8, 8), rules.PRESETS["data"], mesh, "w") == P()


def test_each_preset_splits_the_axes_it_is_about(mesh):
    spec = lambda preset: rules.partition_spec(
        ("embed", "mlp"), (8, 8), rules.PRESETS[preset], mesh, "w"
    )
    assert spec("fsdp") == P("fsdp")
    assert spec("tensor") == P(None, "tensor")
    assert spec("fsdp+tensor") == P("fsdp", "tensor")


def test_a_mesh_axis_is_used_once_in_a_parameter(mesh):
    both = {"embed": "fsdp", "mlp": "fsdp"}
    assert rules.partition_spec(("embed", "mlp"), (8, 8), both, mesh, "w") == P("fsdp")


def test_an_axis_may_be_split_over_two_mesh_axes(mesh):
    both = {"embed": ("fsdp", "tensor")}
    assert rules.partition_spec(("embed",), (8,), both, mesh, "w") == P(("fsdp", "tensor"))


def test_a_dimension_that_does_not_divide_is_named(mesh):
    with pytest.raises(ValueError, match=r"'embed' of layer/kernel has size 7"):
        rules.partition_spec(("embed",), (7,), rules.FSDP, mesh, "layer/kernel")


def test_a_rule_for_an_axis_that_the_mesh_lacks_is_refused(mesh):
    with pytest.raises(ValueError, match="names no axis of the mesh"):
        rules.partition_spec(("embed",), (8,), {"embed": "pipeline"}, mesh, "w")


def test_the_presets_speak_of_axes_that_the_models_have():
    for preset in rules.PRESETS.values():
        assert set(preset) <= VOCABULARY


def test_arrays_of_a_tree_get_their_shardings(mesh):
    tree = {"dense": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
    axes = {"dense": {"kernel": ("embed", "mlp"), "bias": ("mlp",)}}
    found = rules.shardings(tree, axes, rules.PRESETS["fsdp+tensor"], mesh)
    assert found["dense"]["kernel"].spec == P("fsdp", "tensor")
    assert found["dense"]["bias"].spec == P("tensor")
