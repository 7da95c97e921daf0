"""Rules, plateaus and averaged weights in the train program: resumed exactly, and restored."""

import jax
import numpy as np
import pytest

from lamina.platform.training import trained

RULES = {
    "plain": {"paths": ("bias$",), "weight_decay": 0.0},
    "head": {"paths": ("^head/kernel",), "name": "muon", "learning_rate_factor": 0.5},
}
CONFIGS = {
    "soap": {"name": "soap", "learning_rate": 1e-2, "rules": RULES},
    "schedule_free": {
        "name": "schedule_free_adamw",
        "learning_rate": 1e-2,
        "rules": {"head": {"paths": ("^head/",), "name": "sgd"}},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_resumes_exactly_with_the_state_of_its_rules_and_its_plateau(
    name, tiny_run, tmp_path
):
    def start(folder, steps):
        schedule = {"name": "plateau", "every": 5, "patience": 1, "tolerance": 0.5}
        return tiny_run(
            tmp_path / folder, steps=steps, optimizer=CONFIGS[name], schedule=schedule, log_every=5
        )

    start("parts", 10)
    parts, whole = start("parts", 20), start("whole", 20)
    compare = lambda a, b: np.testing.assert_array_equal(a, b)
    jax.tree.map(compare, jax.device_get(parts.state), jax.device_get(whole.state))
    rates = [r.value for r in whole.metrics if r.name == "learning_rate"]
    assert rates[0] == pytest.approx(1e-2)
    assert rates[-1] < 0.5 * rates[0], "a loss that doesn't halve in 5 steps is on a plateau"
    kernel = trained.read(tmp_path / "whole").params["layers"]["0"]["kernel"]
    stepped = whole.state.params["layers"]["0"]["kernel"]
    assert np.array_equal(kernel, stepped) == (name == "soap")
