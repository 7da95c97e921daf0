"""A mesh has the sizes that the config gives, or says which would work."""

import jax
import pytest

from lamina.sharding import mesh as meshes


def test_one_axis_takes_what_the_others_leave():
    mesh = meshes.create(jax.devices(), data=-1, fsdp=2)
    assert dict(mesh.shape) == {"seed": 1, "data": 4, "fsdp": 2, "tensor": 1}
    assert meshes.batch_parallelism(mesh) == 8


def test_fewer_devices_may_be_used():
    mesh = meshes.create(jax.devices()[:2], tensor=2, data=1)
    assert mesh.size == 2


@pytest.mark.parametrize(
    ("sizes", "part"),
    [
        ({"data": 3}, "needs 3 devices, but there are 8"),
        ({"tensor": 3}, "doesn't divide the 8 devices"),
        ({"data": -1, "fsdp": -1}, "only one axis may be -1"),
        ({"fsdp": 0}, "mesh.fsdp = 0"),
        ({"fsdp": -2}, "mesh.fsdp = -2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, part):
    with pytest.raises(ValueError, match=part):
        meshes.create(jax.devices(), **sizes)
