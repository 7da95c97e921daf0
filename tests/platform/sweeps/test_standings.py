"""The standings of a shoot-out, as far as they are more than its scores."""

import pytest

from lamina.platform.sweeps.standings import median_curve


@pytest.mark.parametrize(
    ("mode", "expected"), [("max", [0.5, 0.2, None]), ("min", [0.5, 0.4, None])]
)
def test_a_seed_that_has_diverged_is_worse_than_all_others_in_the_median_curve(mode, expected):
    values = [[0.5, None, None], [0.6, 0.2, None], [0.1, 0.4, 0.3]]
    curve = median_curve({"curve": {"steps": [10, 20, 30], "values": values}}, mode)
    assert curve == {"steps": [10, 20, 30], "values": expected}
