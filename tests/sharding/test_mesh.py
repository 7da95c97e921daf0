"""A mesh has the sizes that the config gives, or says which would work."""

import types

import jax
import numpy as np
import pytest

from lamina.sharding import mesh as meshes


def ids(mesh, *shape):
    return np.array([device.id for device in mesh.devices.flat]).reshape(shape).tolist()


def test_one_axis_takes_what_the_others_leave():
    mesh = meshes.create(jax.devices(), data=-1, fsdp=2)
    assert mesh.axis_names == meshes.AXES
    assert (mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"]) == (4, 2, 1)
    assert meshes.batch_parallelism(mesh) == 8
    assert meshes.describe(mesh) == "data=4, fsdp=2"


@pytest.mark.parametrize("axis", meshes.AXES)
def test_every_axis_can_take_all_devices(axis):
    mesh = meshes.create(jax.devices(), **{"data": 1, axis: -1})
    assert mesh.shape[axis] == mesh.size == 8
    assert meshes.batch_parallelism(mesh) == (8 if axis in meshes.BATCH_AXES else 1)


def test_fewer_devices_may_be_used():
    mesh = meshes.create(jax.devices()[:2], tensor=2, data=1)
    assert mesh.size == 2


@pytest.mark.parametrize(
    ("sizes", "part"),
    [
        ({"data": 3}, r"needs 3 devices, but there are 8. These would fit: mesh.data = 8"),
        ({"data": 2, "tensor": 3}, r"needs 6 devices.*: mesh.tensor = 4"),
        ({"tensor": 3}, r"doesn't divide the 8 devices.*: mesh.tensor = 1, 2, 4 or 8"),
        ({"data": 1, "tensor": 5, "fsdp": 3}, r"Sizes divide 8 \(1, 2, 4 or 8\)"),
        ({"data": -1, "fsdp": -1}, "only one axis may be -1"),
        ({"fsdp": 0}, "mesh.fsdp = 0"),
        ({"fsdp": -2}, "mesh.fsdp = -2"),
        ({"dcn": {"pipeline": 2}}, "mesh.dcn.pipeline is no axis of the mesh"),
        ({"dcn": {"data": 3}}, "mesh.dcn asks for 3 slices, which doesn't divide the 8 devices"),
        ({"dcn": {"tensor": 2}}, "mesh.tensor = 1 is no multiple of mesh.dcn.tensor = 2"),
        ({"dcn": {"data": "two"}}, "mesh.dcn.data = 'two'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, part):
    with pytest.raises(ValueError, match=part):
        meshes.create(jax.devices(), **sizes)


def test_an_axis_may_stand_for_the_slices_whatever_their_number():
    shape = lambda devices: dict(meshes.create(devices, data=-1, fsdp=-1, dcn={"data": -1}).shape)
    one, two = shape(pod(1)), shape(pod(2))
    assert (one["data"], one["fsdp"]) == (1, 16)
    assert (two["data"], two["fsdp"]) == (2, 16)
    here = shape(jax.devices())
    assert (here["data"], here["fsdp"]) == (1, 8)


def test_devices_without_a_slice_are_cut_in_their_order():
    mesh = meshes.create(jax.devices(), data=4, tensor=2, dcn={"data": 2})
    assert ids(mesh, 4, 2) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    mesh = meshes.create(jax.devices(), data=2, tensor=4, dcn={"tensor": 2})
    assert ids(mesh, 2, 4) == [[0, 1, 4, 5], [2, 3, 6, 7]]


class Chip(types.SimpleNamespace):
    """A device of a pod, as far as the order within a mesh depends on it."""

    def __hash__(self):
        return self.id


def pod(slices):
    """Slices of 4 x 4 chips, in an order that isn't theirs."""
    chips = [
        Chip(
            id=100 * index + 4 * y + x,
            platform="tpu",
            device_kind="TPU v5 lite",
            process_index=0,
            slice_index=index,
            coords=(x, y, 0),
            core_on_chip=0,
        )
        for x in range(4)
        for y in range(4)
        for index in range(slices)
    ]
    return chips


@pytest.mark.parametrize(
    ("sizes", "outer"),
    [
        ({}, ("data", 2)),
        ({"replica": 2, "data": 1, "fsdp": 16}, ("replica", 2)),
        ({"data": 1, "fsdp": -1}, ("fsdp", 2)),
        ({"data": 2, "fsdp": 2, "tensor": -1}, ("data", 2)),
        ({"data": 1, "fsdp": 2, "tensor": 16, "dcn": {"fsdp": -1}}, ("fsdp", 2)),
        ({"data": -1, "fsdp": -1, "dcn": {"data": -1}}, ("data", 2)),
    ],
)
def test_slices_stand_along_the_outer_axis(sizes, outer):
    mesh = meshes.create(pod(2), **sizes)
    axis, parts = outer
    along = np.moveaxis(mesh.devices, meshes.AXES.index(axis), 0)
    for rows in np.split(along, parts):
        assert len({chip.slice_index for chip in rows.flat}) == 1
    assert len({chip.id for chip in mesh.devices.flat}) == 32


@pytest.mark.parametrize(
    ("sizes", "part"),
    [
        ({"data": 1, "tensor": -1}, "has no axis for the 2 slices"),
        ({"dcn": {"data": 4}}, "needs 4 slices, but there are 2. These would fit: mesh.dcn.data"),
    ],
)
def test_slices_that_no_axis_can_take_are_refused(sizes, part):
    with pytest.raises(ValueError, match=part):
        meshes.create(pod(2), **sizes)


def test_slices_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="different numbers of devices: 16, 15"):
        meshes.create(pod(2)[:-1])
