"""The plan of a run: chunks at absolute multiples, and what is due after them."""

import math

import pytest

from lamina.platform.training import loop


def test_chunks_cover_every_step_once():
    plan = list(loop.chunks(0, 25, 10, {}))
    assert [(c.first, c.steps, c.end) for c in plan] == [(0, 10, 10), (10, 10, 20), (20, 5, 25)]


@pytest.mark.parametrize("start", [3, 7, 10, 15])
def test_a_resumed_run_comes_back_to_the_same_chunks(start):
    whole = {c.end: c for c in loop.chunks(0, 40, 10, {"record": 10, "save": 20})}
    for chunk in list(loop.chunks(start, 40, 10, {"record": 10, "save": 20}))[1:]:
        assert whole[chunk.end] == chunk


def test_what_is_due_follows_the_cadence_and_everything_is_due_at_the_end():
    plan = list(loop.chunks(0, 25, 5, {"record": 10, "save": 0}))
    assert [sorted(c.due) for c in plan] == [[], ["record"], [], ["record"], ["record", "save"]]


def test_nothing_is_planned_after_the_last_step():
    assert list(loop.chunks(25, 25, 10, {"record": 5})) == []


@pytest.mark.parametrize(
    ("values", "mode", "stop"),
    [
        ([1.0, 0.9, 0.8], "min", False),
        ([1.0, 1.1, 1.2], "min", True),
        ([1.0, 1.1, 0.95], "min", False),
        ([0.5, 0.6, 0.6, 0.6], "max", True),
        ([0.5, math.nan, math.nan], "max", True),
        ([], "max", False),
    ],
)
def test_stopping_waits_for_patience(values, mode, stop):
    assert loop.should_stop(values, mode, patience=2, min_delta=0.0) is stop


def test_an_improvement_below_min_delta_is_none():
    assert loop.should_stop([1.0, 0.99, 0.98], "min", patience=2, min_delta=0.1)
    assert not loop.should_stop([1.0, 0.99, 0.98], "min", patience=2, min_delta=0.001)
