"""The picture of a sharding shows each part with its devices."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lamina.platform.reporting.shardings import draw_sharding
from lamina.sharding import mesh as meshes


@pytest.fixture(scope="module")
def mesh():
    return meshes.create(jax.devices(), data=2, tensor=4)


def parts(picture):
    """Returns (x, y, width, height, devices) of each part that is drawn."""
    number = r'"([\d.]+)"'
    found = re.findall(
        rf"<rect x={number} y={number} width={number} height={number}.*?<title>devices ([\d, ]+)<",
        picture.html,
    )
    return [(*map(float, row[:4]), row[4]) for row in found]


def placed(mesh, shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))


def test_a_matrix_that_is_split_by_columns_shows_them_with_their_devices(mesh):
    drawn = parts(draw_sharding({"kernel": placed(mesh, (6, 8), None, "tensor")}))
    assert [(x, width, devices) for x, _, width, _, devices in sorted(drawn)] == [
        (0.0, 42.0, "0, 4"),
        (42.0, 42.0, "1, 5"),
        (84.0, 42.0, "2, 6"),
        (126.0, 42.0, "3, 7"),
    ]
    assert {(y, height) for _, y, _, height, _ in drawn} == {(0.0, 84.0)}


def test_both_dimensions_split_give_a_part_for_each_device(mesh):
    drawn = parts(draw_sharding([placed(mesh, (4, 8), "data", "tensor")]))
    assert [row[4] for row in drawn] == [str(device) for device in range(8)]
    assert sum(width * height for _, _, width, height, _ in drawn) == 168 * 84


@pytest.mark.parametrize("shape", [(), (8,), (2, 3, 4, 8)])
def test_whole_arrays_of_any_rank_are_one_part_on_all_devices(mesh, shape):
    assert parts(draw_sharding(placed(mesh, shape))) == [
        (0.0, 0.0, 168.0, 84.0, "0, 1, 2, 3, 4, 5, 6, 7")
    ]


def test_a_split_dimension_is_drawn_wherever_it_stands(mesh):
    drawn = parts(draw_sharding(placed(mesh, (4, 3, 5), "tensor", None, None)))
    assert len(drawn) == 4


def test_equal_arrays_are_drawn_once_the_largest_first_and_names_are_escaped(mesh):
    tree = {"<a>": placed(mesh, (4, 8)), "b": placed(mesh, (4, 8)), "c": placed(mesh, (16, 8))}
    picture = draw_sharding(tree)
    assert picture.html.count("<svg") == 2
    assert picture.html.index("c<br>") < picture.html.index("&lt;a&gt; and 1 more")
    assert "1 more kinds of arrays" in draw_sharding(tree, most=1).html
    assert picture._repr_html_() == picture.html


def test_real_arrays_are_drawn_as_their_descriptions_are(mesh):
    described = placed(mesh, (4, 8), "data", "tensor")
    array = jax.device_put(jnp.ones((4, 8)), described.sharding)
    assert draw_sharding([array]).html == draw_sharding([described]).html
