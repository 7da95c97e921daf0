"""A curve as text: its height, its labels, and the example in the docstring."""

import doctest

from lamina.platform.reporting import text_chart


def test_each_value_has_a_column_whose_height_is_its_share_of_the_largest():
    lines = text_chart.draw([0.0, 0.5, 1.0], height=4)
    assert len(lines) == 4
    columns = [line.partition("┤")[2].ljust(3) for line in lines]
    assert [sum(row[i] == "█" for row in columns) for i in range(3)] == [0, 2, 4]


def test_a_curve_of_zeros_is_drawn():
    assert text_chart.draw([0.0, 0.0], height=2)[0] == "1 ┤"


def test_the_example_in_the_docstring_is_true():
    result = doctest.testmod(text_chart)
    assert result.attempted
    assert not result.failed
