"""What holds for every model of the table, and the sizes of known ones."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lamina.models import axes
from lamina.models.functional import functional, parameter_count
from lamina.models.spec import DataSpec, Output
from lamina.models.table import MODELS

IMAGE = DataSpec((8, 8, 3), "float32", 5)
TOKENS = DataSpec((8,), "int32", 11)
CASES = {
    "mlp": (IMAGE, {"widths": (16, 12), "norm": True}),
    "convnet": (IMAGE, {"width": 4, "stages": 2}),
    "resnet": (IMAGE, {"width": 4, "blocks": (1,)}),
    "vit": (IMAGE, {"depth": 2, "embed": 16, "heads": 2, "patch": 4}),
    "transformer": (TOKENS, {"depth": 2, "embed": 16, "heads": 2, "ngram_orders": (2,)}),
}
VARIANTS = {
    **CASES,
    "convnet-plain": (IMAGE, {"width": 4, "norm": "none"}),
    "resnet-group": (IMAGE, {"width": 4, "blocks": (1, 1), "norm": "group"}),
    "resnet-large": (
        IMAGE,
        {"preset": "resnet50", "width": 4, "blocks": (1, 1), "stem": "imagenet"},
    ),
    "vit-gap": (IMAGE, {**CASES["vit"][1], "pool": "gap", "scan": False}),
    "transformer-plain": (TOKENS, {**CASES["transformer"][1], "scan": False, "tied": False}),
}


@functools.cache
def abstract(case, dtype=jnp.float32):
    spec, options = VARIANTS[case]
    return functional(lambda rngs: MODELS[case.split("-")[0]](rngs, spec, dtype, **options))


@functools.cache
def build(case):
    model = abstract(case)
    return model, *jax.jit(model.init)(jax.random.key(0))


def inputs_of(case):
    spec = VARIANTS[case][0]
    if spec.input_dtype == "int32":
        return jax.random.randint(jax.random.key(1), (2, *spec.input_shape), 0, spec.outputs)
    return jax.random.uniform(jax.random.key(1), (2, *spec.input_shape))


def test_there_is_a_case_for_every_model():
    assert set(CASES) == set(MODELS)


@pytest.mark.parametrize("case", VARIANTS)
def test_every_parameter_has_logical_axes_of_its_rank(case):
    model = abstract(case)

    def check(leaf, names):
        assert len(names) == leaf.ndim
        assert all(name in axes.VOCABULARY for name in names)

    jax.tree.map(check, model.params, model.axes)


@pytest.mark.parametrize("case", ["vit", "transformer"])
def test_stacked_parameters_have_the_layers_axis_first(case):
    model = abstract(case)
    stacked = model.axes["layers"]["blocks"]
    names = jax.tree.leaves(stacked, is_leaf=lambda n: isinstance(n, tuple))
    assert {n[0] for n in names} == {"layers"}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(model.params["layers"]["blocks"])} == {2}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", VARIANTS)
def test_logits_and_parameters_are_float32_whatever_the_compute_dtype(case, dtype):
    model, spec = abstract(case, dtype), VARIANTS[case][0]
    leaves = jax.tree.leaves((model.params, model.model_state))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    output, state = jax.eval_shape(
        functools.partial(model.apply, train=True),
        model.params,
        model.model_state,
        inputs_of(case),
        key=jax.random.key(2),
    )
    rows = (2, *spec.input_shape) if spec.input_dtype == "int32" else (2,)
    assert isinstance(output, Output)
    assert output.logits.shape == (*rows, spec.outputs)
    assert output.logits.dtype == jnp.float32
    assert output.features.dtype == dtype
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, model.model_state)


@pytest.mark.parametrize("case", ["mlp", "transformer"])
def test_seeds_under_vmap_equal_single_inits(case):
    model, params, state = build(case)
    many = jax.jit(jax.vmap(model.init))(jnp.stack([jax.random.key(0), jax.random.key(1)]))
    jax.tree.map(
        lambda m, one: np.testing.assert_allclose(m[0], one, rtol=1e-6, atol=1e-7),
        many,
        (params, state),
    )


@pytest.mark.parametrize("name", MODELS)
def test_options_are_keyword_only_and_have_defaults(name):
    parameters = list(inspect.signature(MODELS[name]).parameters.values())
    assert [p.name for p in parameters[:3]] == ["rngs", "spec", "dtype"]
    for parameter in parameters[3:]:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not inspect.Parameter.empty
        assert parameter.annotation in (int, float, bool, str, tuple[int, ...])


@pytest.mark.parametrize("case", ["convnet", "resnet"])
def test_batch_norm_updates_in_training_and_rests_in_evaluation(case):
    model, params, state = build(case)
    run = jax.jit(model.apply, static_argnames="train")
    _, trained = run(params, state, inputs_of(case), train=True)
    output, evaluated = run(params, state, inputs_of(case), train=False)
    jax.tree.map(np.testing.assert_array_equal, evaluated, state)
    assert all(
        np.any(a != b)
        for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(state), strict=True)
    )
    one, _ = run(params, state, inputs_of(case)[:1], train=False)
    np.testing.assert_allclose(one.logits, output.logits[:1], rtol=1e-4, atol=1e-5)


def test_conv_lowerings_give_the_same_network():
    x = inputs_of("convnet")

    def run(lowering):
        model = functional(
            lambda rngs: MODELS["convnet"](rngs, IMAGE, jnp.float32, width=4, lowering=lowering)
        )
        params, state = model.init(jax.random.key(0))
        return jax.jit(lambda p: model.apply(p, state, x, train=False)[0].logits)(params)

    np.testing.assert_allclose(run("patches"), run("conv"), rtol=1e-4, atol=1e-5)


LARGE = DataSpec((224, 224, 3), "float32", 1000)
BYTES = DataSpec((8,), "int32", 256)


@pytest.mark.parametrize(
    ("name", "spec", "options", "count"),
    [
        ("resnet", LARGE, {"preset": "resnet18"}, 11_689_512),
        ("resnet", LARGE, {"preset": "resnet34"}, 21_797_672),
        ("resnet", LARGE, {"preset": "resnet50"}, 25_557_032),
        ("vit", LARGE, {"preset": "ti"}, 5_717_416),
        ("vit", LARGE, {"preset": "s"}, 22_050_664),
        ("vit", LARGE, {"preset": "b"}, 86_567_656),
        # 128,256 x 4096 twice; 32 x (2 x 4096^2 + 2 x 4096 x 1024 + 3 x 4096 x 14336 + 2 x 4096)
        # and the last norm: the published count of Llama 3 8B.
        (
            "transformer",
            BYTES._replace(outputs=128256),
            {"preset": "llama3-8b", "tied": False},
            8_030_261_248,
        ),
        # 256 x 128; 4 x (4 x 128^2 + 3 x 128 x 384 + 2 x 128); 128.
        ("transformer", BYTES, {"preset": "nano"}, 885_888),
        ("mlp", DataSpec((28, 28, 1), "float32", 10), {"widths": (400, 400)}, 478_410),
    ],
)
def test_parameter_counts_are_the_published_ones(name, spec, options, count):
    model = functional(lambda rngs: MODELS[name](rngs, spec, jnp.float32, **options))
    assert parameter_count(model.params) == count


@pytest.mark.parametrize(
    ("name", "spec", "options", "message"),
    [
        ("vit", IMAGE, {"patch": 3}, r"these do: \[1, 2, 4, 8\]"),
        ("vit", IMAGE, {"patch": 4, "heads": 5}, "must divide embed=384"),
        ("vit", TOKENS, {}, "transformer"),
        ("vit", IMAGE, {"patch": 4, "pool": "max"}, "gap"),
        ("resnet", IMAGE, {"preset": "resnet9"}, "resnet18"),
        ("resnet", IMAGE, {"norm": "layer"}, "group"),
        ("convnet", IMAGE, {"width": 0}, "at least 1"),
        ("convnet", DataSpec((64,), "float32", 2), {}, "height, width, channels"),
        ("mlp", IMAGE, {"activation": "sine"}, "gelu"),
        ("mlp", TOKENS, {}, "tokens"),
        ("mlp", IMAGE, {"widths": (8, 0)}, "widths=.* at least 1"),
        ("mlp", IMAGE, {"dropout": 2.0}, "dropout=2.0 is a rate"),
        ("vit", IMAGE, {"patch": 4, "heads": -1}, "heads=-1 must be at least 1"),
        ("vit", IMAGE, {"patch": 0}, "patch=0 must be at least 1"),
        ("resnet", IMAGE, {"blocks": (2, 0)}, "blocks=.* at least 1"),
        ("transformer", TOKENS, {"embed": -64}, "embed=-64 must be at least 1"),
    ],
)
def test_errors_say_what_would_be_right(name, spec, options, message):
    with pytest.raises(ValueError, match=message):
        MODELS[name](nnx.Rngs(0), spec, jnp.float32, **options)
