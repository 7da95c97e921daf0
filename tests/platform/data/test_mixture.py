"""Mixtures have exact shares, keep each source's own epochs, and read at random."""

import jax
import numpy as np
import pytest

from lamina.models.spec import DataSpec
from lamina.platform.data import feed, order
from lamina.platform.data.dataset import ArraySource, Dataset, Subset
from lamina.platform.data.mixture import interleave, mix, mixture
from lamina.platform.errors import UserError

SIZES = {"a": 30, "b": 7, "c": 12}
STARTS = {"a": 0, "b": 100, "c": 200}


def numbered(label, lazy=False):
    """A data set whose labels tell its source and the example."""
    n, start = SIZES[label], STARTS[label]
    labels = np.arange(start, start + n, dtype=np.int32)
    source = ArraySource({"inputs": labels[:, None].astype(np.float32), "labels": labels})
    if lazy:
        source = Subset(source, np.arange(n))
    splits = dict.fromkeys(("train", "validation", "test"), source)
    return Dataset(DataSpec((1,), "float32", 300), splits, description=f"Numbers of {label}.")


def mixed(weights, lazy=False):
    return mix({label: numbered(label, lazy) for label in weights}, weights)


def read_labels(source, count, first=0, seed=0):
    opened = feed.training_feed(source, 1, seed)
    rows = opened.read(first, count)
    if opened.constants:
        labels = jax.vmap(lambda row: opened.select(opened.constants, row)["labels"])(rows)
    else:
        labels = rows["labels"]
    opened.close()
    return np.asarray(labels)[:, 0]


@pytest.mark.parametrize("weights", [(2, 1), (0.7, 0.3), (1, 1, 1), (0.5, 0.3, 0.2), (3.0,)])
def test_the_pattern_has_exact_shares_and_is_even(weights):
    pattern = interleave(weights)
    exact = np.array(weights) / sum(weights)
    np.testing.assert_allclose(np.bincount(pattern) / len(pattern), exact)
    for end in range(1, len(pattern) + 1):
        so_far = np.bincount(pattern[:end], minlength=len(weights))
        assert (abs(so_far - exact * end) <= 1).all()


@pytest.mark.parametrize("lazy", [False, True])
def test_shares_are_exact_over_every_window_of_the_training_stream(lazy):
    source = mixed({"a": 0.5, "b": 0.3, "c": 0.2}, lazy).splits["train"]
    assert feed.choose_placement(source) == ("grain" if lazy else "device")
    for window in read_labels(source, 200).reshape(20, 10):
        assert np.bincount(window // 100, minlength=3).tolist() == [5, 3, 2]


@pytest.mark.parametrize("lazy", [False, True])
def test_each_source_is_read_epoch_by_epoch_in_its_own_order(lazy):
    labels = read_labels(mixed({"a": 2, "b": 1}, lazy).splits["train"], 90)
    ours = labels[labels >= 100] - 100
    assert np.array_equal(np.sort(ours[:28].reshape(4, 7), axis=1), np.tile(np.arange(7), (4, 1)))
    assert np.array_equal(ours, order.indices(7, order.seed_for(0, 1), 0, 30))
    assert np.array_equal(np.sort(labels[labels < 100][:30]), np.arange(30))


def test_a_mixture_is_resumed_from_any_position():
    source = mixed({"a": 0.7, "c": 0.3}).splits["train"]
    whole = read_labels(source, 100)
    for first in (1, 9, 10, 53):
        assert np.array_equal(read_labels(source, 20, first), whole[first : first + 20])


def test_device_and_grain_mix_alike():
    weights = {"a": 3, "b": 1}
    in_memory, lazy = (mixed(weights, lazy).splits["train"] for lazy in (False, True))
    assert np.array_equal(read_labels(in_memory, 50), read_labels(lazy, 50))


def test_held_out_splits_are_all_sources_one_after_another():
    for lazy in (False, True):
        split = mixed({"a": 3, "b": 1}, lazy).splits["validation"]
        labels = [int(split[i]["labels"]) for i in range(len(split))]
        assert labels == [*range(30), *range(100, 107)]
        with pytest.raises(IndexError):
            split[len(split)]


def test_a_mixture_is_named_in_a_config():
    small = {"examples": 4, "held_out": 2, "shape": (2, 2, 1), "classes": 3}
    dataset = mixture(
        sources={
            "x": {"name": "synthetic_images", "weight": 3.0, **small},
            "y": {"name": "synthetic_images", "seed": 1, **small},
        }
    )
    assert dataset.spec == ((2, 2, 1), "uint8", 3)
    assert len(dataset.splits["train"]) == 8
    assert "x 3, y 1" in dataset.description


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, "empty"),
        ({"x": 3}, r"(?s)data\.sources\.x: .*should be a block"),
        (
            {"x": {"name": "digitz"}},
            r"data\.sources\.x: .*'digitz' is unknown \(did you mean 'digits'",
        ),
        ({"x": {"name": "os:system"}}, "somebody's code"),
        ({"x": {"name": "digits", "size": 3}}, "source.size is not a key"),
        ({"x": {"name": "arrays"}}, "source.path is missing"),
        ({"x": {"name": "digits", "weight": 0.0}}, "positive"),
        ({"x": {"name": "digits", "weight": float("nan")}}, "not finite"),
        ({"x": {"name": "digits", "weight": "2"}}, "should be a float"),
        (
            {
                "x": {"name": "digits"},
                "y": {"name": "digits", "weight": 0.123},
                "z": {"name": "digits", "weight": 0.00173},
            },
            "rounder numbers",
        ),
        (
            {"x": {"name": "digits"}, "y": {"name": "synthetic_images", "examples": 1}},
            "don't fit one model",
        ),
    ],
)
def test_wrong_mixtures_are_refused(sources, message):
    with pytest.raises(UserError, match=message):
        mixture(sources=sources)
