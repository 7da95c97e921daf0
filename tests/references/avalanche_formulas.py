"""Writes single steps of Avalanche: `python avalanche_formulas.py avalanche_formulas.json`.

In an environment of its own, with avalanche-lib 0.6.0, torch and quadprog. All in float64, but for
GEM's projection, which Avalanche rounds to float32.
"""

import json
import sys
import types
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from avalanche.training.plugins import AGEMPlugin, GEMPlugin
from avalanche.training.regularization import LearningWithoutForgetting


def distillation(rng: np.random.Generator) -> dict:
    """LwF's term (without its factor alpha) and its gradient by the logits."""
    teacher, student = rng.normal(size=(2, 5, 4))
    z, classes, temperature = torch.tensor(student, requires_grad=True), [0, 1, 3], 2.0
    method = LearningWithoutForgetting(1.0, temperature)
    value = method._distillation_loss(z, torch.tensor(teacher), classes)
    value.backward()
    given = {"teacher": teacher.tolist(), "student": student.tolist(), "classes": classes}
    return given | {"temperature": temperature, "gradient": z.grad.tolist()}


def gem(rng: np.random.Generator, strength: float) -> dict:
    """GEM's projection of a gradient that goes against some of three others."""
    plugin = GEMPlugin(patterns_per_experience=1, memory_strength=strength)
    past, g = rng.normal(size=(3, 8)), rng.normal(size=8)
    plugin.G = torch.tensor(past)
    projected = plugin.solve_quadprog(torch.tensor(g)).tolist()
    return {"strength": strength, "past": past.tolist(), "g": g.tolist(), "projected": projected}


def agem(rng: np.random.Generator) -> dict:
    """A-GEM's projection of a gradient that goes against its reference."""
    reference = rng.normal(size=8)
    g = rng.normal(size=8) - reference
    plugin = AGEMPlugin(patterns_per_experience=1, sample_size=1)
    plugin.buffers, plugin.reference_gradients = [None], torch.tensor(reference)
    model = torch.nn.Linear(8, 1, bias=False, dtype=torch.float64)
    model.weight.grad = torch.tensor(g)[None]
    plugin.after_backward(types.SimpleNamespace(model=model, device="cpu"))
    projected = model.weight.grad[0].tolist()
    return {"reference": reference.tolist(), "g": g.tolist(), "projected": projected}


def main() -> None:
    rng = np.random.default_rng(0)
    numbers = {
        "package": f"avalanche-lib {version('avalanche-lib')}, torch {torch.__version__}",
        "lwf": distillation(rng),
        "gem": [gem(rng, strength) for strength in (0.0, 0.5)],
        "agem": agem(rng),
    }
    Path(sys.argv[1]).write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
