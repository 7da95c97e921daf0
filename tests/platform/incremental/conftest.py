"""Float64, for comparisons with formulas."""

import jax
import pytest


@pytest.fixture
def x64():
    """Computes in float64."""
    with jax.enable_x64(True):
        yield
