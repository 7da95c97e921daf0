"""Checks of the numbers that a learner is given."""

import math

from lamina.platform.errors import UserError


def within(low: float, high: float = math.inf, **values: float) -> None:
    """Raises a `UserError` where a learner's key lies outside of [low, high]."""
    for name, value in values.items():
        if not low <= value <= high:
            right = f"lie in [{low}, {high}]" if high < math.inf else f"be at least {low}"
            raise UserError(f"learner.{name} = {value} should {right}")


def positive(**values: float) -> None:
    """Raises a `UserError` where a learner's key isn't above 0."""
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"learner.{name} = {value} should be above 0")
