"""Barriers on the line between two models, and REPAIR: statistics that match those of the ends."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lamina.models.functional import functional
from lamina.models.layers import Dense, head
from lamina.models.norms import RMSNorm
from lamina.models.spec import DataSpec
from lamina.models.stack import Stack
from lamina.models.table import MODELS
from lamina.platform.errors import UserError
from lamina.platform.merging import barrier, repair, symmetries

REFERENCE = Path(__file__).with_name("torch_merging.npz")
IMAGES = DataSpec((8, 8, 2), "float32", 5)


def build(name, **options):
    return functional(lambda rngs: MODELS[name](rngs, IMAGES, jnp.float32, **options))


def random_like(tree, seed):
    random = np.random.default_rng(seed)
    draw = lambda leaf: random.standard_normal(leaf.shape) / max(1, leaf[..., 0].size) ** 0.5
    positive = lambda leaf: random.uniform(0.5, 1.5, leaf.shape)
    return jax.tree.map(
        lambda leaf: jnp.asarray((draw if leaf.ndim > 1 else positive)(leaf), jnp.float32),
        jax.tree.map(lambda leaf: np.zeros(leaf.shape), tree),
    )


@pytest.fixture(scope="module")
def inputs():
    return jax.random.uniform(jax.random.key(0), (3, 16, 8, 8, 2), jnp.float32)


def test_the_barrier_is_its_formula_in_float64():
    rng = np.random.default_rng(0)
    alphas, losses = np.linspace(0, 1, 11), rng.uniform(0, 3, 11)
    line = max(
        v - ((1 - a) * losses[0] + a * losses[-1]) for a, v in zip(alphas, losses, strict=True)
    )
    mean = max(v - (losses[0] + losses[-1]) / 2 for v in losses)
    assert barrier.barrier(alphas, losses) == pytest.approx(line, abs=1e-12)
    assert barrier.barrier(alphas, losses, ends="mean") == pytest.approx(mean, abs=1e-12)
    assert barrier.barrier(alphas, -losses, mode="max") == pytest.approx(line, abs=1e-12)


def test_a_convex_loss_has_no_barrier_and_equal_ends_agree():
    alphas = np.linspace(0, 1, 5)
    assert barrier.barrier(alphas, (alphas - 0.3) ** 2) == 0
    bump = alphas * (1 - alphas)
    assert barrier.barrier(alphas, bump) == barrier.barrier(alphas, bump, ends="mean") == 0.25


def test_a_barrier_needs_both_ends():
    with pytest.raises(ValueError, match="the first 0 and the last 1"):
        barrier.barrier([0.1, 1.0], [1.0, 2.0])


def test_the_line_is_evaluated_at_each_place_and_exact_at_its_ends():
    one = {"w": jnp.asarray([0.1, 3.0]), "n": jnp.asarray(7)}
    other = {"w": jnp.asarray([0.7, -1.0]), "n": jnp.asarray(9)}
    evaluate = lambda tree: {"sum": tree["w"].sum(), "n": tree["n"]}
    found = barrier.along(evaluate, one, other, [0.0, 0.25, 1.0])
    first, last = one["w"].sum(), other["w"].sum()
    np.testing.assert_array_equal(found["sum"][[0, 2]], [first, last])
    assert found["sum"][1] == pytest.approx(float(0.75 * first + 0.25 * last), abs=1e-6)
    assert found["n"].tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    ("name", "options", "alpha", "layers"),
    [
        ("mlp", {"widths": (12, 10)}, 0.25, 2),
        ("mlp", {"widths": (8,) * 11}, 0.5, 11),
        ("convnet", {"width": 4, "stages": 2, "norm": "none"}, 0.5, 2),
        ("convnet", {"width": 8, "stages": 1, "norm": "group"}, 0.5, 2),
    ],
)
def test_units_of_a_repaired_model_have_the_mean_of_the_ends_statistics(
    name, options, alpha, layers, inputs
):
    model = build(name, **options)
    one, other = random_like(model.params, 0), random_like(model.params, 1)
    merged = barrier.interpolate(one, other, alpha)
    fixed = repair.repair(model, one, other, merged, inputs, alpha=alpha)
    stats = jax.jit(lambda tree: repair.layer_statistics(model, tree, inputs))
    a, b, now, before = stats(one), stats(other), stats(fixed), stats(merged)
    assert len(now) == layers
    for layer in now:
        wanted = jax.tree.map(lambda x, y: (1 - alpha) * x + alpha * y, a[layer], b[layer])
        np.testing.assert_allclose(now[layer].std, wanted.std, rtol=2e-3, atol=2e-4)
        assert (before[layer].std < 0.95 * now[layer].std).mean() >= 0.5  # averaging took variance
        if not layer.startswith("convolutions") or options["norm"] == "none":  # has a bias
            np.testing.assert_allclose(now[layer].mean, wanted.mean, rtol=2e-3, atol=2e-4)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = RMSNorm(rngs, 6, jnp.float32)
        self.up = Dense(rngs, (6,), (2, 4), ("embed", "heads", "head_dim"), jnp.float32)
        self.down = Dense(
            rngs, (2, 4), (6,), ("heads", "head_dim", "embed"), jnp.float32, bias=False
        )

    def __call__(self, x, rngs):
        return x + self.down(jnp.tanh(self.up(self.norm(x))))


class Deep(nnx.Module):
    """Two blocks, one after the other or under a scan."""

    def __init__(self, rngs, scan):
        self.layers = Stack(rngs, Block, 2, scan=scan, remat="full")
        self.head = head(rngs, 6, 5, jnp.float32)

    def __call__(self, x):
        return self.head(self.layers(x))


def test_layers_of_a_stack_are_repaired_as_layers_of_their_own():
    models = {scan: functional(lambda rngs, s=scan: Deep(rngs, s)) for scan in (True, False)}
    one, other = (random_like(models[True].params, seed) for seed in (0, 1))
    block = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree["layers"]["blocks"])
    apart = lambda tree: tree | {"layers": {"blocks": {str(i): block(tree, i) for i in range(2)}}}
    inputs = jax.random.normal(jax.random.key(0), (3, 16, 6))

    order = []

    def fix(scan, *ends):
        return repair.repair(models[scan], *ends, barrier.interpolate(*ends, 0.5), inputs)

    @jax.jit  # one compilation
    def all_of_it(one, other):
        stacked, single = fix(True, one, other), fix(False, apart(one), apart(other))
        measure = lambda tree: repair.layer_statistics(models[True], tree, inputs)
        stats = [measure(tree) for tree in (one, other, stacked)]
        order.extend(stats[0])
        return stacked, single, stats

    stacked, single, stats = all_of_it(one, other)
    assert order == [
        f"layers/blocks/{i}/{name}" for i in range(2) for name in ("norm", "up", "down")
    ]
    assert jax.tree.structure(stacked) == jax.tree.structure(one)
    for a, b in zip(jax.tree.leaves(apart(stacked)), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for layer, now in stats[2].items():
        wanted = jax.tree.map(lambda x, y: (x + y) / 2, *(s[layer] for s in stats[:2]))
        np.testing.assert_allclose(now.std, wanted.std, rtol=1e-3, atol=1e-4)
        if layer.endswith("up"):  # those without a bias have nowhere to put the mean
            np.testing.assert_allclose(now.mean, wanted.mean, rtol=1e-3, atol=1e-4)


def test_it_is_a_batch_norm_that_is_put_in_and_fused_as_torch_does_it():
    with np.load(REFERENCE) as file:
        flat = {name: np.float32(file[name]) for name in file.files if name != "torch"}
    model = functional(
        lambda rngs: MODELS["mlp"](rngs, DataSpec((5,), "float32", 4), jnp.float32, widths=(7, 7))
    )
    parts = lambda name, n: {k: flat[f"{name}/{n}/{k}"] for k in ("kernel", "bias")}
    net = lambda name: {"layers": {str(n): parts(name, n) for n in (0, 1)}, "head": parts(name, 2)}
    one, other, expected = net("one"), net("other"), net("repaired")
    inputs = np.stack([flat["inputs0"], flat["inputs1"]])
    merged = barrier.interpolate(one, other, 0.5)
    fixed = repair.repair(model, one, other, merged, jnp.asarray(inputs))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), fixed, expected
    )


def test_a_model_merged_with_itself_stays(inputs):
    model = build("mlp", widths=(12, 10))
    one = random_like(model.params, 0)
    fixed = repair.repair(model, one, one, one, inputs)
    for a, b in zip(jax.tree.leaves(fixed), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_batch_statistics_are_those_of_the_data(inputs):
    model = build("convnet", width=4, stages=2)
    params = random_like(model.params, 0)
    state = random_like(model.model_state, 1)
    fixed = repair.reset_statistics(model, params, state, inputs)
    first = jax.lax.conv_general_dilated(
        inputs.reshape(-1, 8, 8, 2), params["convolutions"]["0"]["kernel"], (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    found = fixed["norms"]["0"]
    np.testing.assert_allclose(found["mean"], first.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["var"], first.var((0, 1, 2)), rtol=1e-3)


def test_a_merged_model_with_batch_norm_has_its_statistics_reset(inputs):
    model = build("convnet", width=4, stages=2)
    one, other = (
        symmetries.joined(random_like(model.params, n), random_like(model.model_state, n))
        for n in (0, 1)
    )
    merged = barrier.interpolate(one, other, 0.5)
    fixed = repair.repair(model, one, other, merged, inputs)
    params, state = symmetries.separate(fixed)
    again = repair.reset_statistics(model, params, state, inputs)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_array_equal(params["head"]["kernel"], merged["head"]["kernel"])


def test_a_model_that_cannot_be_repaired_says_so(inputs):
    spec = DataSpec((8, 8, 2), "float32", 5)

    class Head(nnx.Module):
        def __init__(self, rngs):
            self.head = head(rngs, 128, spec.outputs, jnp.float32)

        def __call__(self, x):
            return self.head(x.reshape(len(x), -1))

    model = functional(Head)
    one = random_like(model.params, 0)
    with pytest.raises(UserError, match="no batch norm, and no hidden layer"):
        repair.repair(model, one, one, one, inputs)


def test_a_layer_in_a_loop_of_the_models_own_stays(inputs):
    class Recurrent(nnx.Module):
        def __init__(self, rngs):
            self.cell, self.after = nnx.Linear(16, 6, rngs=rngs), nnx.Linear(6, 5, rngs=rngs)

        def __call__(self, x):
            rows = x.reshape(len(x), 8, 16).swapaxes(0, 1)
            step = lambda carry, row: (jnp.tanh(carry + self.cell(row)), None)
            return self.after(jax.lax.scan(step, jnp.zeros((len(x), 6)), rows)[0])

    model = functional(Recurrent)
    one, other, merged = (random_like(model.params, seed) for seed in range(3))
    repaired = repair.repair(model, one, other, merged, inputs)
    np.testing.assert_array_equal(repaired["cell"]["kernel"], merged["cell"]["kernel"])
    ends = [repair.layer_statistics(model, end, inputs)["after"] for end in (one, other)]
    found = repair.layer_statistics(model, repaired, inputs)["after"]
    np.testing.assert_allclose(found.std, (ends[0].std + ends[1].std) / 2, rtol=1e-4)
