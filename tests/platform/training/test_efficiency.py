"""Model FLOPs, peaks of devices, and the figures made of them."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from lamina.platform.training import efficiency, experiment
from lamina.platform.training.experiment import assemble


def assembled(config):
    return assemble(experiment.resolve(ConfigDict(config)), devices=jax.devices()[:1])


def classifier(seeds=(0,)):
    return {
        "steps": 4,
        "seeds": seeds,
        "data": {"name": "digits", "batch_size": 10},
        "model": {"name": "mlp", "widths": (16,)},
        "task": {"name": "classification"},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        "schedule": {"name": "constant"},
    }


def language_model(**model):
    sizes = {"name": "transformer", "embed": 16, "depth": 2, "heads": 2, "mlp": 32}
    return classifier() | {
        "data": {"name": "synthetic_tokens", "batch_size": 4, "context": 8, "vocabulary": 64},
        "model": sizes | model,
        "task": {"name": "language_modeling"},
    }


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_a_step_takes_three_times_the_products_of_the_forward_pass(seeds):
    products = 2 * 10 * (64 * 16 + 16 * 10)
    assert efficiency.model_flops(assembled(classifier(seeds))) == 3 * len(seeds) * products


@pytest.mark.parametrize("model", [{}, {"scan": False}, {"remat": "full"}])
def test_attention_counts_half_under_the_causal_mask_and_nothing_counts_twice(model):
    tokens, time, embed, mlp, vocabulary = 4 * 8, 8, 16, 32, 64
    projections = 4 * embed * embed + 3 * embed * mlp
    attention = 2 * time * embed / 2
    forward = 2 * tokens * (2 * (projections + attention) + embed * vocabulary)
    assert efficiency.model_flops(assembled(language_model(**model))) == 3 * forward


def test_language_models_have_a_speed_in_tokens():
    found = efficiency.figures(assembled(language_model()), 10, {"train": 2.0})
    assert found["tokens_per_second"] == 5 * 4 * 8


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40", None),
        ("TPU v55", None),
        ("cpu", None),
    ],
)
def test_peaks_of_devices(kind, expected):
    assert efficiency.peak(kind) == expected


def test_figures_of_a_run():
    parts = assembled(classifier((0, 1)))
    phases = {"train": 6.0, "data": 2.0, "compile": 1.0, "evaluate": 0.5, "checkpoint": 0.5}
    found = efficiency.figures(parts, 400, phases)
    assert found["steps_per_second"] == 50.0
    assert found["examples_per_second"] == found["examples_per_second_per_device"] == 1000.0
    assert found["goodput"] == 0.6
    assert found["checkpoint_stall_seconds"] == 0.5
    assert found["mfu"] is None  # nobody knows the peak of a CPU
    per_second = found["model_flops_per_second_per_device"]
    np.testing.assert_allclose(per_second, 50 * efficiency.model_flops(parts))
    assert "tokens_per_second" not in found


def test_mfu_is_a_share_of_the_peak(monkeypatch):
    parts = assembled(classifier())
    monkeypatch.setitem(efficiency.PEAKS, "cpu", 1e9)
    found = efficiency.figures(parts, 400, {"train": 8.0})
    np.testing.assert_allclose(found["mfu"], 50 * efficiency.model_flops(parts) / 1e9)


def test_a_run_without_steps_has_no_speed():
    found = efficiency.figures(assembled(classifier()), 0, {})
    assert found["steps_per_second"] == 0.0
    assert found["goodput"] is None
