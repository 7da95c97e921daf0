"""Search spaces: what they hold, and what is refused by name."""

import numpy as np
import pytest

from lamina.platform.sweeps import space
from lamina.platform.sweeps.space import Domain

CONFIG = {
    "seeds": (0,),
    "clip_norm": 0.0,
    "optimizer": {"name": "adamw", "learning_rate": 1e-3},
    "model": {"widths": (8,)},
    "sweep": {"seed": 0},
}


def problems(written):
    return space.read(written, CONFIG)[1]


def test_nested_blocks_become_dotted_keys_and_a_tuple_is_a_choice():
    written = {
        "optimizer": {"learning_rate": {"low": 1e-4, "high": 1.0, "scale": "log", "points": 3}},
        "clip_norm": (0.5, 1.0),
        "model": {"widths": {"values": ((8,), (8, 8))}},
    }
    domains, wrong = space.read(written, CONFIG)
    assert not wrong
    assert [domain.key for domain in domains] == [
        "optimizer.learning_rate",
        "clip_norm",
        "model.widths",
    ]
    assert domains[0].grid() == (1e-4, 1e-2, 1.0)
    assert [domain.values for domain in domains[1:]] == [(0.5, 1.0), ((8,), (8, 8))]


def test_a_grid_holds_every_combination_and_its_last_key_varies_fastest():
    grid = space.grid([Domain("a", (1, 2)), Domain("b", ("x", "y"))])
    assert [tuple(point.values()) for point in grid] == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]


@pytest.mark.parametrize("method", ["random", "halton"])
def test_more_trials_begin_with_the_same_points_and_stay_in_their_ranges(method):
    domains = [
        Domain("a", (), 1e-5, 1e-1, "log"),
        Domain("b", (), 2, 5),
        Domain("c", ("x", "y")),
    ]
    many = space.draw(domains, 64, 3, method)
    assert many[:5] == space.draw(domains, 5, 3, method)
    assert many != space.draw(domains, 64, 4, method)
    a = np.array([point["a"] for point in many])
    assert (a >= 1e-5).all()
    assert (a <= 1e-1).all()
    assert 0.35 < (a < 1e-3).mean() < 0.65  # log-uniform
    assert {point["b"] for point in many} == {2, 3, 4, 5}
    assert {point["c"] for point in many} == {"x", "y"}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({}, "sweep.space is empty"),
        ({"optimizer": {}}, "optimizer is no key of this config"),
        (
            {"optimizer": {"lerning_rate": (1.0,)}},
            "optimizer.lerning_rate is no key of this",
        ),
        ({"optimizer": {"lr": (1.0,)}}, "(did you mean 'optimizer.learning_rate'?)"),
        ({"optimizer": {"name": "sgd,adamw"}}, "several are written ('sgd', 'adamw')"),
        ({"seeds": (0, 1)}, "every trial is run with all of config.seeds"),
        ({"clip_norm": {"values": ()}}, "with at least one value"),
        ({"clip_norm": (1.0, 1.0)}, "holds a value twice"),
        ({"clip_norm": (1, 2.0, 1.0)}, "holds a value twice"),
        ({"clip_norm": {"low": "a", "high": 2}}, "should be two numbers"),
        ({"clip_norm": {"low": 2.0, "high": 1.0}}, "low below high"),
        ({"clip_norm": {"low": 0.0, "high": 1.0, "scale": "log"}}, "above 0 for scale = 'log'"),
        ({"clip_norm": {"low": 0.0, "high": float("inf")}}, "should be two numbers"),
        ({"clip_norm": {"low": 0.1, "high": 1.0, "scale": "cubic"}}, "'linear' or 'log'"),
        ({"clip_norm": {"values": (1.0,), "low": 0.1}}, "either values or low and high"),
        ({"clip_norm": {"lo": 0.1, "high": 1.0}}, "lo is not a key"),
        ({"clip_norm": 0.3}, "should be a tuple of values"),
        ({"sweep": {"seed": (1, 2)}}, "no key of this config"),
    ],
)
def test_a_mistake_in_a_space_is_told_by_its_key(written, message):
    assert any(message in problem for problem in problems(written)), problems(written)
