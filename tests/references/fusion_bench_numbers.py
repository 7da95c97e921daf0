"""Writes fusion_bench's numbers on a small network, for a test of the merging methods.

    python tests/references/fusion_bench_numbers.py tests/platform/merging/fusion_bench.npz

Run in an environment with fusion-bench 0.2.33 and CPU torch. (Installed with `--no-deps`, it needs
besides: lightning, lightning-utilities, pytorch-lightning, torchmetrics, omegaconf, hydra-core,
antlr4-python3-runtime, bidict, joblib, cloudpickle, transformers, tqdm, rich.) All is in float64;
parameters stand in torch's layout, [out, in].
"""

import copy
import itertools
import json
import sys
from importlib import metadata

import lightning
import numpy as np
import torch
from fusion_bench.method.adamerging.layer_wise_adamerging import LayerWiseAdaMergingAlgorithm
from fusion_bench.method.adamerging.task_wise_adamerging import TaskWiseAdaMergingAlgorithm
from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
from fusion_bench.method.isotropic_merging.iso_utils import iso_c
from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
from fusion_bench.method.ties_merging.ties_merging import TiesMergingAlgorithm
from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel
from fusion_bench.models.wrappers.task_wise_fusion import TaskWiseMergedModel
from omegaconf import OmegaConf
from torch import nn

INPUTS, HIDDEN, FEATURES, CLASSES, EXAMPLES, MODELS, STEPS = 5, 8, 6, 4, 16, 3, 12


class Network(nn.Module):
    """Features `W2 tanh(W1 x + b1) + b2`; each task has a head of its own behind them."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(INPUTS, HIDDEN)
        self.down = nn.Linear(HIDDEN, FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def networks() -> list[Network]:
    """A base and three networks near it, some of whose task vectors cancel exactly."""
    torch.manual_seed(0)
    base = Network()
    tuned = [copy.deepcopy(base) for _ in range(MODELS)]
    with torch.no_grad():
        for network in tuned:
            for parameter in network.parameters():
                parameter += 0.4 * torch.randn_like(parameter)
        for network, change in zip(tuned, (2.0, -2.0, 0.0), strict=True):
            base.up.bias[:3] = 0
            network.up.bias[:3] = torch.tensor([change, -change, change])
    return [base, *tuned]


def tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def ties(models: list[Network], merge_func: str, percent: float) -> dict:
    pool = {"_pretrained_": models[0]} | {f"task{t}": m for t, m in enumerate(models[1:])}
    algorithm = TiesMergingAlgorithm(
        scaling_factor=0.3, threshold=percent, remove_keys=[], merge_func=merge_func
    )
    return tensors(algorithm.run(copy.deepcopy(pool)))


class _Adapts:
    """What an AdaMerging algorithm of fusion_bench asks of its user."""

    def prepare(self, heads: torch.Tensor, data: torch.Tensor) -> None:
        self.heads = heads
        self.rows = {f"task{t}": itertools.cycle(batches) for t, batches in enumerate(data)}
        self.modelpool = OmegaConf.create({"model_names": list(self.rows)})
        fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="64-true")
        self._fabric = self._fabric_instance = fabric  # task-wise, layer-wise

    def get_shuffled_test_loader_iter(self, task: str):
        return iter([(next(self.rows[task]),)])

    def compute_logits(self, module, batch, task: str) -> torch.Tensor:
        x = batch[0] if isinstance(batch, tuple) else batch
        return module(x) @ self.heads[int(task.removeprefix("task"))]


class TaskWise(_Adapts, TaskWiseAdaMergingAlgorithm):
    pass


class LayerWise(_Adapts, LayerWiseAdaMergingAlgorithm):
    is_debug_mode = False
    log_dict = staticmethod(lambda *arguments, **more: None)


def adamerging(kind: str, start: float, models: list[Network], heads, data) -> dict:
    """Coefficients [T] or [T, tensors] after all steps, and the merged parameters."""
    base, *tuned = copy.deepcopy(models)
    config = OmegaConf.create({"optimizer": "adam", "lr": 0.02, "max_steps": STEPS})
    algorithm = (TaskWise if kind == "task" else LayerWise)(config)
    algorithm.prepare(heads, data)
    shape = (MODELS,) if kind == "task" else (MODELS, len(list(base.parameters())))
    wrapper = TaskWiseMergedModel if kind == "task" else LayerWiseMergedModel
    module = wrapper(torch.full(shape, start), base, tuned)
    algorithm.test_time_adaptation(module)
    merged = {name: value.detach() for name, value in module.merge_weights().items()}
    return {"coefficients": module.merge_weight.detach(), **merged}


def main(path: str) -> None:
    torch.set_default_dtype(torch.float64)
    models = networks()
    tuned = models[1:]
    data = torch.randn(MODELS, STEPS, EXAMPLES, INPUTS)
    heads = 2 * torch.randn(MODELS, FEATURES, CLASSES)
    groups = {f"model{number}": tensors(model) for number, model in enumerate(models)}
    for merge_func, percent in itertools.product(("sum", "mean"), (10, 30)):
        groups[f"ties_{merge_func}_{percent}"] = ties(models, merge_func, percent)
    deltas = [{n: m[n] - groups["model0"][n] for n in m} for m in map(tensors, tuned)]
    groups["iso_c"] = iso_c(deltas, accelerator="cpu")  # the task vector, not yet scaled
    values = {n: [tensors(m)[n] for m in tuned] for n in groups["model0"]}
    fishers = [
        {n: torch.rand_like(v) ** 4 * 10.0**-t for n, v in delta.items()}
        for t, delta in enumerate(deltas)
    ]
    groups |= {f"fishers{t}": fisher for t, fisher in enumerate(fishers)}
    coefficients = torch.tensor([0.5, 0.2, 0.3])
    for name, floor in (("fisher", 1e-6), ("fisher_floor", 1e-2)):
        groups[name] = merging_with_fisher_weights(
            values, fishers, coefficients, minimal_fisher_weight=floor
        )
    grams = []
    for model, rows in zip(tuned, data[:, 0], strict=True):
        hidden = torch.tanh(model.up(rows)).detach()
        grams.append({n: x.T @ x / EXAMPLES for n, x in (("up", rows), ("down", hidden))})
    for alpha in (0.9, 0.5):
        groups[f"regmean_{alpha}"] = merging_with_regmean_weights(values, grams, alpha)
    for kind in ("task", "layer"):
        groups[f"adamerging_{kind}"] = adamerging(kind, 0.3, models, heads, data)
    groups["adamerging_clamped"] = adamerging("layer", 0.95, models, heads, data)
    versions = {name: metadata.version(name) for name in ("fusion-bench", "torch")}
    found = {f"{group}/{n}": v.numpy() for group, each in groups.items() for n, v in each.items()}
    found |= {"data": data.numpy(), "heads": heads.numpy()}
    np.savez_compressed(path, versions=json.dumps(versions), **found)


if __name__ == "__main__":
    main(sys.argv[1])
