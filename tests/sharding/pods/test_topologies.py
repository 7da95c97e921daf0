"""Slices are known by name, and a wrong name says what would be right; transfers take link time."""

import numpy as np
import pytest

from lamina.sharding.pods import chips, topologies, torus


def test_a_slice_has_its_chips():
    assert topologies.topology("v5e:16x16").chips == 256
    assert topologies.topology("v5p:8x8x8").chips == 512
    assert topologies.topology("v5e:4x4", 2).chips == 32


@pytest.mark.parametrize(
    ("name", "slices", "part"),
    [
        ("v5e", 1, "as in v5e:16x16"),
        ("v9:4x4", 1, "only v4, v5e, v5p, v6e"),
        ("v5e:4x4x4", 1, "have 2 axes"),
        ("v5p:8x8", 1, "have 3 axes, as in v5p:4x4x4"),
        ("v5e:32x32", 1, "at most 16x16"),
        ("v5e:4x4", 0, "at least 1"),
    ],
)
def test_a_slice_that_does_not_exist_is_refused(name, slices, part):
    with pytest.raises(ValueError, match=part):
        topologies.topology(name, slices)


def test_every_chip_says_where_its_figures_come_from():
    for chip in chips.CHIPS.values():
        assert "Google Cloud" in chip.source
        assert chip.usable < chip.memory


def layout(side=16, slices=1):
    places = [[s, i // side, i % side, 0] for s in range(slices) for i in range(side * side)]
    sizes = {"data": slices, "fsdp": side, "tensor": side}
    return torus.Layout(chips.CHIPS["v5e"], sizes, np.array(places), (side, side, 1))


def test_a_ring_carries_in_both_directions_and_an_open_line_in_one():
    row, size, link = np.arange(16)[None], 2e9, 45e9
    ring = torus.transfer_seconds("all-gather", size, row, layout())
    assert ring == pytest.approx(15 / 16 * size / (2 * link) + 8 * torus.HOP)
    line = torus.transfer_seconds("all-gather", size, row[:, :8], layout())
    assert line == pytest.approx(7 / 8 * size / link + 7 * torus.HOP)


def test_all_axes_of_the_torus_work_at_once_and_a_reduction_passes_twice():
    everyone, size = np.arange(256)[None], 2e9
    gather = torus.transfer_seconds("all-gather", size, everyone, layout())
    assert gather == pytest.approx(255 / 256 * size / (4 * 45e9) + 16 * torus.HOP)
    assert torus.transfer_seconds("all-reduce", size, everyone, layout()) == 2 * gather


def test_every_other_chip_shares_its_links():
    size = 2e9
    apart = torus.transfer_seconds("all-gather", size, np.arange(0, 16, 2)[None], layout())
    assert apart == pytest.approx(7 / 8 * size / (2 * 45e9 / 2) + 4 * torus.HOP)


def test_slices_are_joined_by_the_network():
    pair = np.array([[0, 256]])
    assert torus.transfer_seconds("all-gather", 2e9, pair, layout(slices=2)) == pytest.approx(
        1e9 / 3.125e9
    )
    assert layout(slices=2).slice_axes() == ("data",)
    assert layout().slice_axes() == ()


def test_mesh_axes_of_a_group_are_those_along_which_it_differs():
    assert layout().differing(np.arange(16)[None]) == ("tensor",)
    assert layout().differing(np.arange(0, 256, 16)[None]) == ("fsdp",)
    assert layout().differing(np.arange(256)[None]) == ("fsdp", "tensor")
