"""How well a run used its devices: model FLOPs, MFU, goodput and speeds."""

from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from lamina.platform import config as configs
from lamina.platform.training import experiment as experiments
from lamina.platform.training import flops
from lamina.platform.training.experiment import Experiment
from lamina.sharding.pods.chips import CHIPS

_NVIDIA = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
}

PEAKS: dict[str, float] = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    **_NVIDIA,
}
"""The beginning of jax's `device_kind` to the device's peak in bfloat16 FLOP/s, without sparsity.
TPUs from `sharding.pods.chips`, GPUs from NVIDIA's data sheets. Of two that fit the longer counts.
"""


def peak(device_kind: str) -> float | None:
    """Returns the peak of a kind of device in bfloat16 FLOP/s, or None where it isn't known.

    Example:
        >>> peak("TPU v5 lite"), peak("NVIDIA H100 80GB HBM3"), peak("cpu")
        (197000000000000.0, 989000000000000.0, None)
    """
    known = [name for name in PEAKS if f"{device_kind} ".startswith(f"{name} ")]
    known += [name for name in _NVIDIA if device_kind.startswith(f"{name}-")]
    return PEAKS[max(known, key=len)] if known else None


def model_flops(experiment: Experiment) -> float:
    """Returns the FLOPs that a step of the model needs, however it is computed.

    Three times the matrix products of the forward pass (backward takes twice as many), without
    those that are done again to save memory, as is usual for MFU (Chowdhery et al. 2022, arXiv
    2204.02311, appendix B). Products with a batch dimension are attention's; under language
    modelling half of them lie behind the causal mask and don't count.
    """
    c, recipe = experiment.config, experiment.recipe
    model, state = recipe.model, experiment.state
    if "attention" in c.model:
        changed = configs.thaw(c)
        changed["model"]["attention"] = "dense"
        plain = FrozenConfigDict(changed)
        model, _, _ = experiments.build_model(plain, experiment.trust, experiment.dataset.spec)
    batch = jax.eval_shape(recipe.augment, jax.random.key(0), experiment.batch)
    one = lambda tree: jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape[1:] if experiment.seeds.number > 1 else leaf.shape, leaf.dtype
        ),
        tree,
    )

    def forward(trained: Any, frozen: Any, model_state: Any, batch: Any) -> Any:
        params = recipe.parameters.combine(trained, frozen)
        arguments, options = recipe.task.inputs(batch)
        key = jax.random.key(0)
        output, _ = model.apply(params, model_state, *arguments, train=True, key=key, **options)
        return output.logits

    traced = jax.make_jaxpr(forward)(
        one(state.params), one(state.frozen), one(state.model_state), batch
    )
    total, attention = flops.count_jaxpr(traced), flops.count_batched(traced)
    causal = c.task.name == "language_modeling"
    return 3.0 * experiment.seeds.number * (total - attention / 2 * causal)


def figures(experiment: Experiment, steps: int, phases: Mapping[str, float]) -> dict[str, Any]:
    """Returns what the result and the report say of a run's speed.

    Args:
        experiment: the run's parts.
        steps: how many were done.
        phases: seconds by phase (`Clock.totals`).

    Returns:
        steps_per_second, examples_per_second, examples_per_second_per_device: over the time in
            steps and in waits for data. Each seed's examples count.
        tokens_per_second, tokens_per_second_per_device: of language models.
        model_flops_per_step: see `model_flops`; None where the model can't be analysed.
        model_flops_per_second_per_device: the same, over the same time.
        mfu: that as a share of the device's peak; None where `peak` doesn't know it.
        goodput, checkpoint_stall_seconds: see `shares`.
        communication: see `traffic`.
    """
    c, devices = experiment.config, experiment.mesh.size
    training = phases.get("train", 0.0) + phases.get("data", 0.0)
    per_second = steps / training if training else 0.0
    examples = per_second * c.data.batch_size * experiment.seeds.number
    found: dict[str, Any] = {
        "steps_per_second": per_second,
        "examples_per_second": examples,
        "examples_per_second_per_device": examples / devices,
    }
    if c.task.name == "language_modeling" and "inputs" in experiment.batch:
        tokens = examples * experiment.batch["inputs"].shape[1]
        found |= {"tokens_per_second": tokens, "tokens_per_second_per_device": tokens / devices}
    needed = _model_flops_or_none(experiment)
    per_device = None if needed is None else needed * per_second / devices
    limit = peak(experiment.mesh.devices.flat[0].device_kind)
    return {
        **found,
        "model_flops_per_step": needed,
        "model_flops_per_second_per_device": per_device,
        "mfu": per_device / limit if per_device is not None and limit else None,
        **shares(phases),
        **traffic(experiment, steps),
    }


def traffic(experiment: Experiment, steps: int) -> dict[str, Any]:
    """Returns what islands have sent, {} where there are none.

    Args:
        experiment: the run's parts.
        steps: how many were done.

    Returns:
        communication: `islands`, `rounds` (in an exchange: steps), and `bytes` and
            `bytes_per_step` that each island has sent, for each seed. What an all-reduce or an
            all-gather makes of them on a network is not counted.
    """
    islands, state = experiment.recipe.islands, experiment.state
    if islands is None:
        return {}
    rounds, several = islands.rounds(steps), experiment.seeds.number > 1
    one = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[several:], leaf.dtype)
    sent = islands.sent(jax.tree.map(one, state.params), jax.tree.map(one, state.model_state))
    found = {
        "islands": islands.method.number,
        "rounds": rounds,
        "bytes": rounds * sent,
        "bytes_per_step": rounds * sent / steps if steps else 0.0,
    }
    return {"communication": found}


def shares(phases: Mapping[str, float]) -> dict[str, float | None]:
    """Returns how a run spent its time.

    Args:
        phases: seconds by phase (`Clock.totals`).

    Returns:
        goodput: the share of all wall time that went into steps, from 0 to 1: what was spent on
            compiling, waits for data, evaluation and checkpoints is missing to 1.
        checkpoint_stall_seconds: how long checkpoints kept the steps waiting in all.
    """
    total = sum(phases.values())
    return {
        "goodput": phases.get("train", 0.0) / total if total else None,
        "checkpoint_stall_seconds": phases.get("checkpoint", 0.0),
    }


def _model_flops_or_none(experiment: Experiment) -> float | None:
    """What is wrong with the analysis of a model of the user's doesn't fail a trained run."""
    try:
        return model_flops(experiment)
    except Exception:
        return None
