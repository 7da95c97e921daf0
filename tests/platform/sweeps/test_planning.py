"""Which trials share a program, and how a group of them is run."""

import pytest

from lamina.platform.sweeps.planning import Shape, shape

CPU = {"platform": "cpu", "devices": 1, "seed_parallelism": 1, "cores": 2}


@pytest.mark.parametrize(
    ("trials", "seeds", "steps_per_call", "at_once", "expected"),
    [
        (8, 4, 10, 0, Shape(8, 32, 1, "single")),  # one program for all
        (1, 5, 10, 0, Shape(1, 5, 1, "single")),
        (8, 4, 10, 8, Shape(2, 8, 1, "single")),  # four units
        (5, 1, 10, 2, Shape(2, 2, 1, "single")),
        (8, 4, 1, 0, Shape(1, 2, 2, "unroll")),  # operations that are slow in loops
        (1, 1, 1, 0, Shape(1, 1, 1, "single")),
    ],
)
def test_members_on_a_cpu_are_trained_by_themselves(
    trials, seeds, steps_per_call, at_once, expected
):
    found = shape(trials, seeds, steps_per_call=steps_per_call, at_once=at_once, **CPU)
    assert found == expected


def test_members_on_accelerators_are_one_vmapped_axis_that_divides_by_the_mesh():
    gpu = {"platform": "gpu", "devices": 8, "seed_parallelism": 4, "cores": 64}
    assert shape(5, 3, steps_per_call=10, at_once=0, **gpu) == Shape(5, 1, 16, "vmap")
    assert shape(64, 2, steps_per_call=1, at_once=32, **gpu) == Shape(16, 1, 32, "vmap")
