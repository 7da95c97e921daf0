"""Eight devices, under every preset, train a small vit and transformer as one device does.

Losses, bytes and collectives of a preset come from one compiled step. docs/sharding.md explains the
collectives that are counted here.
"""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from lamina.platform.data import feed as feeds
from lamina.platform.training import compiled, experiment, initial, loading

B, T, D, F, H, G, K, V, L, C = 16, 32, 32, 64, 8, 4, 4, 64, 2, 10
P = 48  # pixels of a patch; the images have 16 of them
STEPS = 20

MODELS = {
    "transformer": {
        "data": {"name": "synthetic_tokens", "vocabulary": V, "context": T, "examples": 64},
        "model": {"name": "transformer", "depth": L, "embed": D, "heads": H, "kv_heads": G},
        "task": {"name": "language_modeling"},
    },
    "vit": {
        "data": {"name": "synthetic_images", "shape": (16, 16, 3), "classes": C, "examples": 64},
        "model": {"name": "vit", "patch": 4, "depth": L, "embed": D, "heads": H, "pool": "gap"},
        "task": {"name": "classification"},
    },
}
MESHES = {
    "data": {"data": 8},
    "zero1": {"data": 4, "fsdp": 2},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 2, "tensor": 4},
    "fsdp+tensor": {"data": 1, "fsdp": 2, "tensor": 4},
    "sequence": {"data": 2, "tensor": 4},
    "auto": {"data": 2, "tensor": 4},
}
CASES = [
    *(pytest.param("transformer", preset, id=f"transformer-{preset}") for preset in MESHES),
    *(pytest.param("vit", preset, id=f"vit-{preset}", marks=pytest.mark.slow) for preset in MESHES),
]
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def build(model, preset, mesh, devices):
    blocks = {name: dict(block) for name, block in MODELS[model].items()}
    blocks["data"] |= {"batch_size": B, "held_out": 8}
    blocks["model"] |= {"mlp": F}
    config = ConfigDict(
        {
            **blocks,
            "steps": STEPS,
            "optimizer": {"name": "adamw", "learning_rate": 1e-3},
            "schedule": {"name": "constant"},
            "mesh": mesh,
            "sharding": {"rules": preset},
            "trackers": (),
        }
    )
    return experiment.assemble(experiment.resolve(config), devices=devices)


@functools.cache
def start(model):
    """The state before the first step, on the host."""
    parts = build(model, "data", {"data": 1}, jax.devices()[:1])
    return jax.device_get(initial.create(parts, loading.NOTHING))


def train(parts, state):
    """Returns the losses of the steps, the last state and the program."""
    jitted, (abstract, batch) = compiled.single_step(parts)
    program = jitted.lower(abstract, batch).compile(compiler_options=QUICKLY)
    place = lambda leaf, like: jax.device_put(leaf, like.sharding)
    state = jax.tree.map(place, state, abstract)
    zeros, examples, losses = state.metrics["loss"], parts.dataset.splits["train"], []
    zeros = jax.device_get(zeros)
    for step in range(STEPS):
        rows = [examples[(step * B + i) % len(examples)] for i in range(B)]
        raw = {name: np.stack([np.asarray(row[name]) for row in rows]) for name in rows[0]}
        normal = feeds.normalise(jax.tree.map(jnp.asarray, raw))
        empty = jax.tree.map(place, zeros, abstract.metrics["loss"])
        state = dataclasses.replace(state, metrics=state.metrics | {"loss": empty})
        state = program(state, {name: place(normal[name], batch[name]) for name in batch})
        total, weight = state.metrics["loss"]
        losses.append(float(total) / float(weight))
    return np.array(losses), state, program


@functools.cache
def on_one(model):
    parts = build(model, "data", {"data": 1}, jax.devices()[:1])
    return train(parts, start(model))[0]


@functools.cache
def on_eight(model, preset):
    return train(build(model, preset, MESHES[preset], jax.devices()), start(model))


@pytest.mark.parametrize(("model", "preset"), CASES)
def test_eight_devices_give_the_losses_of_one(model, preset):
    np.testing.assert_allclose(on_eight(model, preset)[0], on_one(model), rtol=1e-5)


# Numbers in the parameters, by what their dimensions are. Matrices of the blocks go between the
# width D and hidden units (F, heads times their units); other arrays have a dimension D, or hidden
# units alone, or neither (norms, the bias of the head).
NUMBERS = {
    "transformer": {
        "blocks": L * (2 * D * H * K + 2 * D * G * K + 3 * D * F),
        "vocabulary": V * D,
        "width": 0,
        "hidden": 0,
        "rest": (2 * L + 1) * D,
    },
    "vit": {
        "blocks": L * (4 * D * D + 2 * D * F),
        "vocabulary": 0,
        "width": (P + 1 + 16 + C) * D + L * 2 * D,
        "hidden": L * (3 * D + F),
        "rest": (2 * L + 1) * 2 * D + C,
    },
}
WHOLE = dict.fromkeys(NUMBERS["vit"], 1)
OVER_ALL = WHOLE | {"blocks": 8, "vocabulary": 8, "width": 8}
MEGATRON = WHOLE | {"blocks": 4, "vocabulary": 4, "hidden": 4}
BOTH = {"blocks": 8, "vocabulary": 8, "width": 2, "hidden": 4, "rest": 1}
WAYS = {  # of parameters and of optimizer state
    "data": (WHOLE, WHOLE),
    "zero1": (WHOLE, OVER_ALL),
    "fsdp": (OVER_ALL, OVER_ALL),
    "tensor": (MEGATRON, MEGATRON),
    "fsdp+tensor": (BOTH, BOTH),
    "sequence": (MEGATRON, MEGATRON),
    "auto": (MEGATRON, MEGATRON),
}


def bytes_on_a_device(tree):
    return sum(leaf.addressable_shards[3].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("model", "preset"), CASES)
def test_a_device_holds_the_bytes_that_theory_gives(model, preset):
    state = on_eight(model, preset)[1]
    numbers = [sum(NUMBERS[model][kind] / ways[kind] for kind in ways) for ways in WAYS[preset]]
    assert bytes_on_a_device(state.params) == pytest.approx(4 * numbers[0], rel=0.05)
    assert bytes_on_a_device(state.optimizer_state) == pytest.approx(8 * numbers[1], rel=0.05)


KINDS = r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


def collectives(program):
    """Counts collectives by kind: in a block's forward pass, in its backward pass, elsewhere."""
    found = {"forward": collections.Counter(), "backward": collections.Counter()}
    found["elsewhere"] = collections.Counter()
    for line in program.as_text().splitlines():
        kind = re.search(r" = .*?" + KINDS, line)
        if kind:
            backward = "transpose(jvp" in line
            place = ("backward" if backward else "forward") if "while/body" in line else "elsewhere"
            found[place][kind[1]] += 1
    return {place: dict(counts) for place, counts in found.items()}


# In a block: 7 matrices of the transformer; 6 matrices and 2 biases with a dimension D of the vit.
GATHERED = {"transformer": (7, 7), "vit": (8, 6)}


@pytest.mark.parametrize(("model", "preset"), CASES)
def test_collectives_are_those_that_the_layout_needs(model, preset):
    found = collectives(on_eight(model, preset)[2])
    print(model, preset, found)
    forward, backward = GATHERED[model]
    expected = {
        # The gradients of a block, in one all-reduce.
        "data": ({}, {"all-reduce": 1}),
        "zero1": ({}, {"all-reduce": 1}),
        # Each matrix is gathered before it is used, in the backward pass again.
        "fsdp": ({"all-gather": forward}, {"all-gather": backward, "all-reduce": 1}),
        # Partial sums after attention and MLP; in the backward pass of what went into them.
        "tensor": ({"all-reduce": 2}, {"all-reduce": 3}),
        "auto": ({"all-reduce": 2}, {"all-reduce": 3}),
        "fsdp+tensor": (
            {"all-gather": forward, "all-reduce": 2},
            {"all-gather": backward, "all-reduce": 3},
        ),
        # The sequence is gathered before attention and MLP. Their partial sums are cut after the
        # all-reduce (on a TPU a reduce-scatter), and norms have seen a part of the sequence each.
        "sequence": (
            {"all-gather": 2, "all-reduce": 2},
            {"all-gather": 2, "all-reduce": 4},
        ),
    }
    assert (found["forward"], found["backward"]) == expected[preset]


def test_activations_between_the_blocks_take_less_memory_when_the_sequence_is_split():
    memory = {
        preset: on_eight("transformer", preset)[2].memory_analysis().temp_size_in_bytes
        for preset in ("tensor", "sequence")
    }
    assert memory["sequence"] < 0.9 * memory["tensor"]


def test_the_optimizer_state_alone_is_split_by_zero1():
    _, state, program = on_eight("transformer", "zero1")
    split = sum(
        not leaf.is_fully_replicated for leaf in jax.tree.leaves(state.optimizer_state[0].mu)
    )
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    assert collectives(program)["elsewhere"]["all-gather"] >= split == 8


def test_the_placement_of_activations_is_shown():
    parts = build("transformer", "sequence", MESHES["sequence"], jax.devices())
    rows = {tuple(row["axes"]): row for row in compiled.activation_rows(parts)}
    stream = rows["batch", "stream", ""]
    assert stream["sharding"] == "data S(0), tensor S(1)"
    assert stream["bytes"] == 4 * B * T * D // 8
    assert {row["before"] for row in rows.values()} == {"", "data S(0), tensor P"}
    assert rows["batch", "length", "mlp"]["sharding"] == "data S(0), tensor S(2)"
