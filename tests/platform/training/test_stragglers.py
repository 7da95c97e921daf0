"""Which differences between processes are worth a line."""

import pytest

from lamina.platform.reporting.clock import Clock
from lamina.platform.training.stragglers import Pace, Watch, describe


@pytest.mark.parametrize("data", [0.0, 0.019])
def test_processes_that_differ_by_less_than_a_fifth_are_no_news(data):
    assert describe([Pace(0.1, 0.0), Pace(0.1, data), Pace(0.085, 0.0)]) == ""


def test_a_process_that_waits_for_its_data_is_named():
    line = describe([Pace(0.1, 0.001), Pace(0.1, 0.025), Pace(0.1, 0.0)])
    assert line == "process 1 is slow: it waits 25.0 ms of a step for its data, process 2 0.0 ms"


def test_a_process_whose_steps_take_longer_is_named():
    line = describe([Pace(0.130, 0.0), Pace(0.1, 0.0)])
    assert line == "process 0 is slow: a step takes it 130.0 ms, process 1 100.0 ms"


def test_a_single_process_is_not_compared():
    watch = Watch(Clock(), 0)
    assert not watch.look(10)
    assert (watch.line, watch.paces) == ("", [])
