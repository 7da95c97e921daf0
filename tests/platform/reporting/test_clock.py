import json

import pytest

from lamina.platform.reporting.clock import Clock


class Ticks:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_phases_never_overlap_and_their_sum_is_the_time_that_passed():
    ticks = Ticks()
    clock = Clock(now=ticks)
    ticks.now += 1
    with clock.phase("train"):
        ticks.now += 10
        with clock.phase("checkpoint"):
            ticks.now += 3
        ticks.now += 20
    ticks.now += 2
    assert clock.totals() == {"other": 3.0, "train": 30.0, "checkpoint": 3.0}
    assert clock.elapsed() == 36.0


def test_a_resumed_clock_reports_the_totals_of_all_sessions():
    ticks = Ticks()
    first = Clock(now=ticks)
    with first.phase("train"):
        ticks.now += 5
    saved = json.loads(json.dumps(first.totals()))
    ticks.now += 1000  # the machine was away
    second = Clock(saved, now=ticks)
    with second.phase("train"):
        ticks.now += 7
        assert second.totals()["train"] == 12.0  # also in the middle of a phase
    assert second.elapsed() == 12.0


def test_a_phase_ends_when_its_block_fails():
    ticks = Ticks()
    clock = Clock(now=ticks)

    def fail():
        with clock.phase("train"):
            ticks.now += 2
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    ticks.now += 1
    assert clock.totals() == {"other": 1.0, "train": 2.0}
