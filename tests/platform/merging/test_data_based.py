"""Fisher merging and RegMean: their formulas, their invariants, and their collectors."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lamina.models.convnet import convnet
from lamina.models.functional import functional
from lamina.models.mlp import mlp
from lamina.models.spec import DataSpec
from lamina.models.vit import vit
from lamina.platform import merging
from lamina.platform.checkpoints import names
from lamina.platform.errors import UserError
from lamina.platform.merging import fisher, grams, statistics

REFERENCE = Path(__file__).with_name("torch_merging.npz")
SHAPES = {"kernel": (6, 3), "bias": (3,), "blocks": (2, 4, 5)}
AXES = {"kernel": ("embed", "mlp"), "bias": ("mlp",), "blocks": ("layers", "embed", "mlp")}


@pytest.fixture(autouse=True)
def _promotion():
    """Models' norms promote dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def reference():
    """The numbers of PyTorch by group: models, Fishers, inputs, merged."""
    with np.load(REFERENCE) as file:
        flat = {name: file[name] for name in file.files if name != "torch"}
    group = lambda prefix: {k.partition("/")[2]: v for k, v in flat.items() if k.startswith(prefix)}
    return group, flat


def forward(p, x):
    hidden = jnp.tanh(x @ p["up/kernel"] + p["up/bias"][None])
    return hidden @ p["down/kernel"] + p["down/bias"][None]


def trees(seed, count, shapes=SHAPES, positive=False):
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.standard_normal(shape)
    made = [{name: draw(shape) for name, shape in shapes.items()} for _ in range(count)]
    return jax.tree.map(np.square, made) if positive else made


def some_grams(seed, count):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        x, y = rng.standard_normal((20, 6)), rng.standard_normal((2, 20, 4))
        made.append({"kernel": x.T @ x / 20, "blocks": y.swapaxes(1, 2) @ y / 20})
    return made


def close(one, other, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


def test_the_exact_fisher_is_that_of_torch_in_float64(reference):
    group, flat = reference
    with jax.enable_x64(True):
        for t in range(2):
            params = jax.tree.map(jnp.asarray, group(f"model{t}/"))
            x = jnp.asarray(flat[f"inputs{t}"])
            labels, key = jnp.zeros(len(x), jnp.int32), jax.random.key(0)
            found = jax.jit(fisher.diagonal, static_argnums=0, static_argnames="kind")(
                forward, params, x, labels, key, kind="exact"
            )
            close(found, group(f"fisher{t}/"), 1e-10)


def test_merges_are_those_of_torch_in_float64(reference):
    group, flat = reference
    with jax.enable_x64(True):
        models = [group(f"model{t}/") for t in range(2)]
        by_fisher = merging.create("fisher")(models, fishers=[group(f"fisher{t}/") for t in (0, 1)])
        close(by_fisher, group("fisher/"), 1e-10)
        gathered = [
            grams.collect(forward, jax.tree.map(jnp.asarray, m), flat[f"inputs{t}"][None])
            for t, m in enumerate(models)
        ]
        assert set(gathered[0]) == {"up/kernel", "down/kernel"}
        close(merging.create("regmean")(models, grams=gathered), group("regmean/"), 1e-10)


def test_a_sampled_fisher_tends_to_the_exact_one_and_does_not_depend_on_the_batch(reference):
    group, flat = reference
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), group("model0/"))
    x = jnp.tile(jnp.asarray(flat["inputs0"], jnp.float32), (200, 1))
    labels, key = jnp.zeros(len(x), jnp.int32), jax.random.key(0)
    found = jax.jit(fisher.diagonal, static_argnums=0)(forward, params, x, labels, key)
    for name, exact in group("fisher0/").items():
        error = np.abs(np.asarray(found[name]) - exact).sum() / exact.sum()
        assert error < 0.15, name
    again = fisher.diagonal(forward, params, x[:12], labels[:12], key)
    prime = fisher.diagonal(forward, params, x[:11], labels[:11], key)
    last = fisher.diagonal(forward, params, x[:1], labels[:1], key)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((again, prime, last)))


def test_an_empirical_fisher_is_the_mean_square_of_the_gradients_for_the_labels(reference):
    group, flat = reference
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), group("model1/"))
    x = jnp.asarray(flat["inputs1"], jnp.float32)
    labels = jnp.arange(len(x), dtype=jnp.int32) % 4
    found = fisher.diagonal(forward, params, x, labels, jax.random.key(0), kind="empirical")
    loss = lambda p, n: jax.nn.log_softmax(forward(p, x[n][None])[0])[labels[n]]
    each = [jax.grad(loss)(params, n) for n in range(len(x))]
    mean = jax.tree.map(lambda *g: sum(np.square(a) for a in g) / len(x), *each)
    close(found, mean, 1e-5)


def test_equal_fishers_give_the_weighted_mean():
    models, (one,) = trees(0, 3), trees(1, 1, positive=True)
    merged = merging.create("fisher", floor=1e-12)(models, fishers=[one] * 3, weights=(1, 2, 3))
    close(merged, merging.create("linear")(models, weights=(1, 2, 3)), 1e-6)


def test_fisher_merging_stays_between_the_models_and_takes_the_one_that_is_sure():
    models, fishers = trees(0, 3), trees(1, 3, positive=True)
    fishers[1]["bias"][:] = [0, 1e9, 0]
    merged = merging.create("fisher", normalize=False)(models, fishers=fishers)
    for name, leaf in merged.items():
        each = np.stack([m[name] for m in models])
        assert (leaf <= each.max(0) + 1e-6).all()
        assert (leaf >= each.min(0) - 1e-6).all()
    np.testing.assert_allclose(merged["bias"][1], models[1]["bias"][1], atol=1e-6)


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_copies_of_a_model_give_the_model(name):
    models = trees(0, 1) * 3
    given = {"fishers": trees(1, 3, positive=True)} if name == "fisher" else {}
    given = given or {"grams": some_grams(2, 3)}
    close(merging.create(name)(models, axes=AXES, **given), models[0], 1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_shared_grams_give_the_mean(alpha):
    models, shared = trees(0, 3), some_grams(1, 1) * 3
    merged = merging.create("regmean", alpha=alpha)(models, grams=shared)
    close(merged, merging.create("linear")(models), 1e-5)


def test_regmean_solves_the_normal_equations_layer_by_layer():
    models, given = trees(0, 3), some_grams(1, 3)
    with jax.enable_x64(True):
        merged = merging.create("regmean", alpha=0.7)(
            models, grams=given, weights=(1, 2, 3), axes=AXES
        )
    shrink = lambda g: 0.7 * g + 0.3 * np.diag(np.diagonal(g))
    for name, layers in (("kernel", [...]), ("blocks", [0, 1])):
        for layer in layers:
            rest = sum(
                w * shrink(g[name][layer]) @ (np.asarray(merged[name])[layer] - m[name][layer])
                for w, g, m in zip((1, 2, 3), given, models, strict=True)
            )
            np.testing.assert_allclose(rest, 0, atol=1e-10)


def test_inputs_that_are_always_zero_keep_the_mean():
    models, given = trees(0, 2), some_grams(1, 2)
    for gram in given:
        gram["kernel"][2], gram["kernel"][:, 2] = 0, 0
    for alpha in (0.9, 1.0):
        merged = merging.create("regmean", alpha=alpha)(models, grams=given)["kernel"]
        mean = (models[0]["kernel"][2] + models[1]["kernel"][2]) / 2
        np.testing.assert_allclose(merged[2], mean, atol=1e-5)
        assert np.isfinite(merged).all()


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_sharded_merges_are_the_plain_ones(name):
    models = [jax.tree.map(jnp.float32, m) for m in trees(0, 2, SHAPES | {"kernel": (6, 8)})]
    shapes = SHAPES | {"kernel": (6, 8)}
    given = {"fishers": trees(1, 2, shapes, positive=True)}
    given = given if name == "fisher" else {"grams": some_grams(2, 2)}
    given = jax.tree.map(jnp.float32, given)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec(None, "x"))
    sharded = [m | {"kernel": jax.device_put(m["kernel"], split)} for m in models]
    merger = merging.create(name)
    merged = jax.jit(lambda models: merger(models, **given))(sharded)
    close(merged, merger(models, **given), 1e-5)


def model_of(kind):
    spec = DataSpec((8, 8, 1), "float32", 5)
    makers = {
        "mlp": lambda r: mlp(r, spec, jnp.float32, widths=(6, 7)),
        "vit": lambda r: vit(r, spec, jnp.float32, patch=4, depth=2, embed=10, heads=2, mlp=6),
        "unrolled": lambda r: vit(
            r, spec, jnp.float32, patch=4, depth=2, embed=10, heads=2, mlp=6, scan=False
        ),
    }
    model = functional(makers[kind])
    params, state = model.init(jax.random.key(0))
    logits = lambda p, x: model.apply(p, state, x, train=False)[0].logits
    return logits, params


@pytest.mark.parametrize("kind", ["mlp", "vit", "unrolled"])
def test_a_model_has_a_gram_matrix_for_each_dense_kernel(kind):
    logits, params = model_of(kind)
    x = jax.random.uniform(jax.random.key(1), (2, 4, 8, 8, 1))
    found = jax.jit(lambda p, x: grams.collect(logits, p, x))(params, x)
    kernels = {name for name in names.flatten(params) if name.endswith("kernel")}
    assert set(found) == kernels
    flat = np.asarray(x).reshape(8, 64)
    if kind != "mlp":
        patches = np.asarray(x).reshape(8, 2, 4, 2, 4).swapaxes(2, 3)
        flat = patches.reshape(32, 16)
    (first,) = [gram for gram in found.values() if gram.shape == (flat.shape[1],) * 2]
    np.testing.assert_allclose(first, flat.T @ flat / len(flat), atol=1e-5)


def test_a_scanned_stack_has_the_matrices_of_its_layers_and_does_not_depend_on_the_batches():
    x = jax.random.uniform(jax.random.key(1), (2, 4, 8, 8, 1))
    (one, p), (other, q) = model_of("vit"), model_of("unrolled")
    stacked = jax.jit(lambda p, x: grams.collect(one, p, x))(p, x)
    apart = jax.jit(lambda p, x: grams.collect(other, p, x))(q, x.reshape(1, 8, 8, 8, 1))
    for name, matrix in apart.items():
        layered = name.replace("blocks/0", "blocks").replace("blocks/1", "blocks")
        layer = 1 if "blocks/1" in name else 0
        same = stacked[layered][layer] if layered != name else stacked[name]
        np.testing.assert_allclose(same, matrix, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "way",
    [
        {"kernel_size": (3, 2), "strides": 2, "padding": "SAME"},
        {
            "kernel_size": (2, 3),
            "kernel_dilation": 2,
            "input_dilation": 2,
            "padding": ((1, 0), (2, 1)),
        },
        {"kernel_size": 3, "padding": "CIRCULAR"},
    ],
)
def test_a_convolution_has_the_gram_matrix_of_its_patches(way):
    """The sum of squares of what any kernel w gives is `rows w^T G w`."""
    model = functional(lambda rngs: nnx.Conv(2, 3, use_bias=False, rngs=rngs, **way))
    apply = lambda params, x: model.apply(params, {}, x, train=False)[0].logits
    space = (6,) if way["kernel_size"] == 3 else (6, 5)
    x = jax.random.normal(jax.random.key(1), (2, 4, *space, 2))
    params, _ = model.init(jax.random.key(0))
    gram = np.asarray(jax.jit(lambda p, x: grams.collect(apply, p, x))(params, x)["kernel"])
    w = jax.random.normal(jax.random.key(2), params["kernel"].shape)
    given = np.asarray(apply({"kernel": w}, x.reshape(8, *x.shape[2:])))
    flat, rows = np.asarray(w).reshape(-1, 3), given.size / 3
    np.testing.assert_allclose(rows * np.vdot(flat, gram @ flat), (given**2).sum(), rtol=1e-5)


def test_both_lowerings_of_a_convnet_have_the_same_gram_matrices():
    spec, x = (
        DataSpec((8, 8, 1), "float32", 5),
        jax.random.uniform(jax.random.key(1), (1, 4, 8, 8, 1)),
    )
    found = {}
    for way in ("patches", "conv"):
        make = lambda r, way=way: convnet(r, spec, jnp.float32, width=2, stages=2, lowering=way)
        model = functional(make)
        params, state = model.init(jax.random.key(0))
        logits = lambda p, x, m=model, s=state: m.apply(p, s, x, train=False)[0].logits
        found[way] = jax.jit(lambda p, x, f=logits: grams.collect(f, p, x))(params, x)
    close(found["patches"], found["conv"], 1e-5)


def test_statistics_are_read_as_they_were_written(tmp_path):
    params = {"dense": {"kernel": np.ones((2, 3), np.float32)}}
    statistics.save(tmp_path / "f.safetensors", params, "fishers", {"examples": "4"})
    statistics.save(
        tmp_path / "g.safetensors", {"dense/kernel": np.eye(2, dtype=np.float32)}, "grams"
    )
    close(statistics.load(tmp_path / "f.safetensors", "fishers", params), params, 0)
    assert set(statistics.load(tmp_path / "g.safetensors", "grams")) == {"dense/kernel"}
    with pytest.raises(UserError, match="holds no fishers"):
        statistics.load(tmp_path / "g.safetensors", "fishers")
    other = {"dense": {"kernel": np.ones((2, 4), np.float32)}}
    with pytest.raises(UserError, match="dense/kernel"):
        statistics.load(tmp_path / "f.safetensors", "fishers", other)


@pytest.mark.parametrize(
    ("name", "keys", "given", "message"),
    [
        ("fisher", {"floor": 0.0}, {}, "floor"),
        ("fisher", {}, {}, "fishers="),
        ("regmean", {"alpha": 1.5}, {}, "alpha"),
        ("regmean", {}, {"grams": [{}]}, "grams="),
        ("regmean", {}, {"grams": [{"kernal": np.eye(6)}] * 2}, "kernal"),
        ("regmean", {}, {"grams": [{"kernel": np.eye(5)}] * 2}, "doesn't fit"),
        ("regmean", {}, {"grams": [{"kernel": np.eye(6)}, {}]}, "differ"),
    ],
)
def test_what_does_not_fit_is_the_users_mistake(name, keys, given, message):
    with pytest.raises(UserError, match=message):
        merging.create(name, **keys)(trees(0, 2), **given)
