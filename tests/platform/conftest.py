"""A tiny finished run that several modules look at, and charts that are drawn once."""

from collections.abc import Iterator

import jax
import pytest
from ml_collections import ConfigDict

from lamina.platform import config as configs
from lamina.platform.reporting import charts
from lamina.platform.run import run

TINY = {
    "steps": 10,
    "data": {"name": "digits", "batch_size": 16},
    "model": {"name": "mlp", "widths": (8,)},
    "task": {"name": "classification"},
    "optimizer": {"name": "adamw", "learning_rate": 1e-3},
    "schedule": {"name": "constant"},
    "log_every": 5,
    "steps_per_call": 5,
    "checkpoint": {"every": 5},
    "mesh": {"data": -1},
    "trackers": (),
}

CHARTS: dict[str, str] = {}
"""What this process has drawn, by description."""


@pytest.fixture(autouse=True)
def _charts_are_drawn_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Gives the first chart of a description again: drawing takes a third of a small run.

    The tests of the reports themselves draw every chart.
    """
    if request.path.parent.name == "reporting":
        yield
        return
    draw = charts.figure

    def figure(content, description):
        if description not in CHARTS:
            CHARTS[description] = draw(content, description)
        return CHARTS[description]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "figure", figure)
        yield


@pytest.fixture(scope="session")
def tiny_run():
    """Returns `tiny_run(workdir, **changes)`: a run of a few steps, on one device."""

    def start(workdir, console=False, **changes):
        config = ConfigDict(TINY | changes)
        return run(config, workdir, console=console, devices=jax.devices()[:1])

    return start


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_run):
    """The result of a finished run of two seeds; a test that changes its folder copies it."""
    return tiny_run(tmp_path_factory.mktemp("finished") / "run", seeds=(4, 2))


@pytest.fixture
def tiny_config(tmp_path):
    """Returns `tiny_config(**changes)`: the path of a JSON config of a few steps."""

    def write(**changes):
        path = tmp_path / "config.json"
        path.write_text(configs.to_json(ConfigDict(TINY | changes)))
        return path

    return write
