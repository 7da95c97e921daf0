"""The numbers of independent implementations; tests/references/optimizers.py wrote them."""

import json
from pathlib import Path

import numpy as np
import pytest

from lamina.platform.optimizers import create, eval_params

FILE = Path(__file__).parents[2] / "references" / "optimizers.json"
REFERENCE = json.loads(FILE.read_text())
KEPT = np.array(REFERENCE["kept"]) - 1
A, WD = 0.05, 0.1

SAME = {
    "adamw": ("adamw", {"weight_decay": WD}, 1e-10),
    "ademamix": ("ademamix", {"b3": 0.99, "warmup_steps": 12, "weight_decay": WD}, 1e-10),
    "core": ("core", {"step_size_min": 1e-3, "step_size_max": 0.2, "beta1_c": 5.0}, 1e-10),
    "core plastic": (
        "core",
        {"step_size_min": 1e-3, "step_size_max": 0.2, "score_history": 6, "frozen": 0.3},
        1e-10,
    ),
    "exadam": ("exadam", {"weight_decay": WD}, 1e-10),
    "lion": ("lion", {"weight_decay": WD, "b2": 0.99}, 1e-10),
    "mars": ("mars", {"weight_decay": WD}, 1e-6),
    "prodigy": ("prodigy", {"weight_decay": WD}, 1e-8),
    "radam": ("radam", {}, 1e-4),
    "rprop": ("rprop", {}, 1e-10),
    "schedule_free_adamw": (
        "schedule_free_adamw",
        {"warmup_steps": 8, "r": 1.0, "weight_decay": WD},
        1e-9,
    ),
    "schedule_free_sgd": (
        "schedule_free_sgd",
        {"warmup_steps": 8, "r": 0.5, "weight_decay": WD},
        1e-10,
    ),
    "sgd": ("sgd", {"momentum": 0.9, "nesterov": True}, 1e-10),
    "soap": ("soap", {"weight_decay": 0.0, "precondition_every": 3}, 1e-5),
}
"""Case to (optimizer, keys, tolerance); above 1e-10 where eps or float32 stand elsewhere there."""

DIFFERENT = {
    "amsgrad": ("amsgrad", {}, 1, 1e-2),
    "nadam": ("nadam", {}, 0, 1e-4),
}
"""Case to (optimizer, keys, kept step, by how much they differ from it on)."""


@pytest.fixture(scope="module")
def reference():
    read = lambda key: {name: np.array(value) for name, value in REFERENCE[key].items()}
    return read("start"), read("grads")


def rate(name):
    return 1.0 if name == "prodigy" else A


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", SAME)
def test_equals_an_independent_implementation(case, reference, follow):
    name, keys, tolerance = SAME[case]
    path, state = follow(create(name, rate(name), **keys), *reference)
    expected = REFERENCE["cases"][case]["path"]
    last = {leaf: path[leaf][-1] for leaf in path}
    for leaf in path:
        np.testing.assert_allclose(path[leaf][KEPT], expected[leaf], rtol=0, atol=tolerance)
        if f"{leaf} evaluated" in expected:
            evaluated = eval_params(name, state, last)[leaf]
            np.testing.assert_allclose(evaluated, expected[f"{leaf} evaluated"], atol=tolerance)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("case", "scale"), [("muon", "spectral"), ("muon rms", "rms")])
def test_muon_equals_pytorchs_on_kernels_the_other_way_round(case, scale, follow):
    oblong = REFERENCE["oblong"]
    ours = lambda values: np.swapaxes(np.array(values), -1, -2)  # [..., inputs, outputs]
    start, grads = ({n: ours(v) for n, v in oblong[key].items()} for key in ("start", "grads"))
    path, _ = follow(create("muon", A, scale=scale, weight_decay=WD), start, grads)
    for leaf, expected in oblong["cases"][case]["path"].items():  # eps stands elsewhere there
        np.testing.assert_allclose(path[leaf][KEPT], ours(expected), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", DIFFERENT)
def test_differs_from_pytorch_as_the_convention_says(case, reference, follow):
    name, keys, first, least = DIFFERENT[case]
    path, _ = follow(create(name, A, **keys), *reference)
    gap = np.abs(path["vector"][KEPT] - np.array(REFERENCE["cases"][case]["path"]["vector"]))
    assert gap[first:].max() > least
    assert first == 0 or gap[:first].max() < 1e-6
