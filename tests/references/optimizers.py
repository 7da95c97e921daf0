"""Writes optimizers.json: what other implementations make of fixed gradients, in float64.

Run in an environment of its own, with torch (CPU), numpy, pytorch_optimizer, schedulefree,
prodigyopt and core-optimizer:

    python tests/references/optimizers.py

The gradients don't depend on the parameters, so that a difference in a step stays what it is.
PyTorch's Muon iterates in bfloat16, which says nothing beyond the second digit: here it doesn't.
"""

import importlib.metadata
import json
from pathlib import Path

import core_optimizer
import numpy as np
import prodigyopt
import pytorch_optimizer
import schedulefree
import torch

STEPS, RATE = 24, 0.05
KEPT = (1, 2, 3, 12, 24)  # the steps after which the parameters are written
SHAPES = {"matrix": (4, 4), "vector": (5,)}
OBLONG = {"wide": (3, 6), "tall": (7, 2)}  # [outputs, inputs], as PyTorch has its kernels


def problem(shapes):
    """Returns the first parameters and the gradients of each step."""
    rng = np.random.default_rng(0)
    start = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    grads = {name: rng.normal(size=(STEPS, *shape)) for name, shape in shapes.items()}
    return start, grads


def trajectory(make, evaluate=None, shapes=SHAPES):
    """Returns each parameter after the kept steps, and the evaluation weights with `evaluate`."""
    start, grads = problem(shapes)
    params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    optimizer = make(list(params.values()))
    if hasattr(optimizer, "train"):
        optimizer.train()
    path = {name: [] for name in params}
    for step in range(STEPS):
        for name, parameter in params.items():
            parameter.grad = torch.tensor(grads[name][step])
        optimizer.step()
        for name, parameter in params.items() if step + 1 in KEPT else ():
            path[name].append(parameter.detach().numpy().copy().tolist())
    if evaluate:
        optimizer.eval()
        path |= {f"{n} evaluated": p.detach().numpy().tolist() for n, p in params.items()}
    return path


def schedule_free(kind, **options):
    return lambda p: kind(p, lr=RATE, foreach=False, **options)


CASES = {
    "adamw": (lambda p: torch.optim.AdamW(p, RATE, weight_decay=0.1), "torch"),
    "ademamix": (
        lambda p: pytorch_optimizer.AdEMAMix(
            p,
            RATE,
            betas=(0.9, 0.999, 0.99),
            alpha=5.0,
            t_alpha_beta3=12,
            weight_decay=0.1,
            weight_decouple=True,
        ),
        "pytorch_optimizer",
    ),
    "amsgrad": (lambda p: torch.optim.Adam(p, RATE, amsgrad=True), "torch"),
    "core": (
        lambda p: core_optimizer.CoRe(
            p, lr=RATE, step_sizes=(1e-3, 0.2), betas=(0.7375, 0.8125, 5.0, 0.99)
        ),
        "core-optimizer",
    ),
    "core plastic": (
        lambda p: core_optimizer.CoRe(
            p, lr=RATE, step_sizes=(1e-3, 0.2), score_history=6, frozen=0.3
        ),
        "core-optimizer",
    ),
    "exadam": (
        lambda p: pytorch_optimizer.EXAdam(p, RATE, weight_decay=0.1),
        "pytorch_optimizer",
    ),
    "lion": (lambda p: pytorch_optimizer.Lion(p, RATE, weight_decay=0.1), "pytorch_optimizer"),
    "mars": (
        lambda p: pytorch_optimizer.MARS(
            p, RATE, betas=(0.95, 0.99), gamma=0.025, weight_decay=0.1, optimize_1d=True
        ),
        "pytorch_optimizer",
    ),
    "nadam": (lambda p: torch.optim.NAdam(p, RATE), "torch"),
    "prodigy": (
        lambda p: prodigyopt.Prodigy(p, 1.0, use_bias_correction=True, weight_decay=0.1),
        "prodigyopt",
    ),
    "radam": (lambda p: torch.optim.RAdam(p, RATE), "torch"),
    "rprop": (lambda p: torch.optim.Rprop(p, RATE), "torch"),
    "schedule_free_adamw": (
        schedule_free(schedulefree.AdamWScheduleFree, warmup_steps=8, r=1.0, weight_decay=0.1),
        "schedulefree",
    ),
    "schedule_free_sgd": (
        schedule_free(schedulefree.SGDScheduleFree, warmup_steps=8, r=0.5, weight_decay=0.1),
        "schedulefree",
    ),
    "sgd": (lambda p: torch.optim.SGD(p, RATE, momentum=0.9, nesterov=True), "torch"),
    "soap": (
        lambda p: pytorch_optimizer.SOAP(p, RATE, weight_decay=0.0, precondition_frequency=3),
        "pytorch_optimizer",
    ),
}


def muon(scale):
    return lambda p: torch.optim.Muon(p, RATE, weight_decay=0.1, adjust_lr_fn=scale)


OBLONG_CASES = {
    "muon": (muon("original"), "torch"),
    "muon rms": (muon("match_rms_adamw"), "torch"),
}


def written(cases, shapes):
    """Returns a problem and what each case makes of it, as plain lists."""
    start, grads = problem(shapes)
    found = {
        "start": {name: value.tolist() for name, value in start.items()},
        "grads": {name: value.tolist() for name, value in grads.items()},
        "cases": {},
    }
    for name, (make, package) in cases.items():
        version = importlib.metadata.version(package)
        path = trajectory(make, evaluate=name.startswith("schedule_free"), shapes=shapes)
        found["cases"][name] = {"package": f"{package} {version}", "path": path}
    return found


def main() -> None:
    """Runs every case and writes the file beside this one."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.bfloat16 = torch.Tensor.clone  # Muon's, which changes its copy in place
    found = {"kept": KEPT, **written(CASES, SHAPES), "oblong": written(OBLONG_CASES, OBLONG)}
    text = json.dumps(found, separators=(",", ":"))
    Path(__file__).with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
