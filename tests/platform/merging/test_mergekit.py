"""The numbers of mergekit 0.1.5 on a tiny Llama (tests/references/mergekit_numbers.py)."""

from pathlib import Path

import numpy as np
import pytest

from lamina.platform import merging

NUMBERS = np.load(Path(__file__).parent / "mergekit.npz")
W = (0.5, 0.3, 0.9)
TIES = {
    f"ties_{density}_{normalize}": {"density": density, "normalize": normalize, "scale": 0.7}
    for density, normalize in ((0.1, True), (0.5, False), (1.0, True))
}


def tensors(prefix):
    names = [name for name in NUMBERS.files if name.startswith(f"{prefix}/")]
    return {name.removeprefix(f"{prefix}/"): NUMBERS[name] for name in names}


BASE, *MODELS = (tensors(f"input{number}") for number in range(4))


def agrees(key, merged):
    expected = tensors(key)
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(merged[name], value, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("key", "normalize"), [("linear", True), ("linear_sum", False)])
def test_linear(key, normalize):
    agrees(key, merging.create("linear", normalize=normalize)(MODELS, weights=W))


@pytest.mark.parametrize("t", [0.0, 0.3])
def test_slerp(t):
    agrees(f"slerp_{t}", merging.create("slerp", t=t)(MODELS[:2]))


def test_task_arithmetic():
    merger = merging.create("task_arithmetic", scale=0.7)
    agrees("task_arithmetic", merger(MODELS, base=BASE, weights=W))


def test_model_stock():
    agrees("model_stock", merging.create("model_stock")(MODELS, base=BASE))


@pytest.mark.parametrize("key", TIES)
def test_ties(key):
    merger = merging.create("ties_per_tensor", **TIES[key])
    agrees(key, merger(MODELS, base=BASE, weights=W))
