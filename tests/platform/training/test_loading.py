"""What a run starts from: a file has batch statistics as well as parameters."""

import jax
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from lamina.platform import config as configs
from lamina.platform.checkpoints import exchange, names
from lamina.platform.errors import UserError
from lamina.platform.training import experiment, loading


@pytest.fixture(scope="module")
def parts():
    """A model with batch norms."""
    config = {
        "steps": 1,
        "data": {"name": "digits", "batch_size": 8},
        "model": {"name": "convnet", "width": 2, "stages": 1},
        "task": {"name": "classification"},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "schedule": {"name": "constant"},
    }
    return experiment.assemble(experiment.resolve(config), ("*",), jax.devices()[:1])


def load(parts, path, params, state):
    """Writes a model with one number in all parameters, and returns what a run takes from it."""
    model = parts.recipe.model
    full = lambda tree, number: jax.tree.map(lambda a: np.full(a.shape, number, a.dtype), tree)
    tree = {**full(model.params, params), "model_state": full(model.model_state, state)}
    exchange.export_params(path, tree)
    config = FrozenConfigDict({**configs.thaw(parts.config), "init_from": str(path)})
    return loading.load(config, ("*",), model, loading.placement(parts))


def test_batch_statistics_of_a_file_come_along(parts, tmp_path):
    loaded = load(parts, tmp_path / "x.safetensors", 2.0, 3.0)
    params, state = loaded.take()
    assert set(params) == set(names.flatten(parts.recipe.model.params))
    assert set(state) == set(names.flatten(parts.recipe.model.model_state)) != set()
    assert {float(np.ptp(leaf)) for leaf in (*params.values(), *state.values())} == {0.0}
    assert {float(np.max(leaf)) for leaf in params.values()} == {2.0}
    assert {float(np.max(leaf)) for leaf in state.values()} == {3.0}
    assert "unused" not in loaded.report


def test_batch_statistics_that_are_not_finite_are_refused_by_name(parts, tmp_path):
    with pytest.raises(UserError, match=r"not finite: model_state/"):
        load(parts, tmp_path / "x.safetensors", 1.0, np.nan)
