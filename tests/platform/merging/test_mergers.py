"""What holds for all mergers of trees: invariants, jit, vmap, devices, layers, refusals."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lamina.platform import merging
from lamina.platform.errors import UserError
from lamina.platform.merging import trimming
from lamina.platform.merging.table import MERGERS

KEYS = json.loads(Path(__file__).with_name("keys.json").read_text())
MEANS = ("linear", "slerp", "model_stock", "ties_per_tensor")
LEAFWISE = sorted(KEYS)


def merge(name, models, base, axes=None, **keys):
    if name == "slerp":
        models = models[:2]
    return merging.create(name, **(KEYS[name] | keys))(models, base=base, axes=axes)


def close(one, other, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


def same(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), one, other)


def test_every_leafwise_method_is_tested_here():
    made = {name: merging.create(name) for name in MERGERS}
    assert {name for name, one in made.items() if one.leafwise and not one.needs} == set(KEYS)


@pytest.mark.parametrize("name", LEAFWISE)
def test_shapes_dtypes_and_structure_stay(name, models, base, axes):
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), base)
    merged = merge(name, models, half, axes) if name not in ("linear", "slerp") else None
    if merged is None:
        merged = merge(
            name,
            [jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), m) for m in models],
            None,
            axes,
        )
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.map(np.shape, merged) == jax.tree.map(np.shape, base)


@pytest.mark.parametrize("name", MEANS)
def test_copies_of_a_model_give_the_model(name, models, base, axes):
    keys = {"density": 1.0, "scale": 1.0} if "ties" in name else {}
    close(merge(name, [models[0]] * 3, base, axes, **keys), models[0])


@pytest.mark.parametrize("name", sorted(set(KEYS) - {"linear", "slerp"}))
def test_models_that_are_the_base_give_the_base(name, base, axes):
    same(merge(name, [base] * 3, base, axes), base)


@pytest.mark.parametrize("name", sorted(set(KEYS) - {"slerp", "dare", "dare_l1"}))
def test_the_order_of_models_does_not_matter(name, models, base, axes):
    merger = merging.create(name, **KEYS[name])
    one, other = (merger(m, base=base, axes=axes) for m in (models, models[::-1]))
    close(one, other, 1e-5)


def test_one_weight_of_linear_gives_that_model_exactly(models):
    same(merging.create("linear")(models, weights=(0, 2.5, 0)), models[1])


def test_scaling_all_weights_of_linear_changes_nothing(models):
    merger = merging.create("linear")
    close(merger(models, weights=(1, 2, 3)), merger(models, weights=(10, 20, 30)))


def test_task_arithmetic_of_scale_zero_gives_the_base(models, base):
    same(merge("task_arithmetic", models, base, scale=0.0), base)


def test_task_arithmetic_with_one_over_the_number_of_models_is_their_mean(models, base):
    merged = merge("task_arithmetic", models, base, scale=1 / 3)
    close(merged, merge("linear", models, base))


def test_slerp_keeps_the_norm_of_tensors_of_equal_norm(models):
    unit = [jax.tree.map(lambda x: x / np.linalg.norm(x), model) for model in models[:2]]
    unit[1] = jax.tree.map(lambda x: -x[::-1], unit[1])
    merged = merging.create("slerp", t=0.4)(unit)
    for leaf in jax.tree.leaves(merged):
        np.testing.assert_allclose(np.linalg.norm(leaf), 1, rtol=1e-5)


@pytest.mark.parametrize("density", [0.29])
def test_ties_keeps_exactly_its_fraction_of_the_model(density, models, base):
    merged = merge("ties", models[:1], base, density=density, scale=1.0)
    changed = jax.tree.map(lambda a, b: int((a != b).sum()), merged, base)
    size = sum(leaf.size for leaf in jax.tree.leaves(base))
    assert sum(jax.tree.leaves(changed)) == int(density * size)


def test_ties_keeps_exactly_its_fraction_among_equal_magnitudes():
    base, model = {"w": np.zeros(100, np.float32)}, {"w": np.ones(100, np.float32)}
    merged = merging.create("ties", density=0.37)([model], base=base)
    np.testing.assert_array_equal(merged["w"], np.arange(100) < 37)


def test_ties_counts_models_of_more_than_two_to_the_32_entries():
    many = {f"layer{n}": jax.ShapeDtypeStruct((2**15, 2**15), jnp.bfloat16) for n in range(5)}
    merger = merging.create("ties", density=0.9)
    merged = jax.eval_shape(lambda one, base: merger([one], base=base), many, many)
    assert merged == many
    numbers = [2**32 - 1, 7, 2**31 + 2**16, 2**32 - 2]
    value = lambda pair: int(pair[0]) * 2**16 + int(pair[1])
    both = trimming.total([jnp.uint32(n) for n in numbers])
    assert value(both) == sum(numbers)
    for other in (0, 1, 2**16, 2**32 - 1, 2**33 + 5, sum(numbers)):
        assert value(trimming.minus(both, trimming.wide(other))) == sum(numbers) - other
        assert bool(trimming.at_least(both, trimming.wide(other)))
        assert bool(trimming.at_least(trimming.wide(other), both)) == (other == sum(numbers))


def test_dare_of_density_one_is_task_arithmetic(models, base):
    close(
        merge("dare", models, base, density=1.0), merge("task_arithmetic", models, base, scale=1.0)
    )


@pytest.mark.slow
def test_the_mean_of_dare_over_seeds_is_task_arithmetic():
    base, model = {"w": np.zeros(500, np.float32)}, {"w": np.ones(500, np.float32)}
    drawn = [
        np.asarray(merging.create("dare", density=0.25, seed=seed)([model], base=base)["w"])
        for seed in range(40)
    ]
    assert set(np.unique(drawn)) == {0.0, 4.0}
    error = np.sqrt(0.75 / 0.25 / (40 * 500))
    assert abs(np.mean(drawn) - 1) < 4 * error
    # Each place by itself too: no place is kept always or never.
    assert np.abs(np.mean(drawn, axis=0) - 1).max() < 5.5 * np.sqrt(3 / 40)


def test_the_draws_of_dare_belong_to_the_path_and_not_to_the_order(models, base):
    drop = lambda tree: {"query": tree["query"]}
    whole = merge("dare", models, base)
    same(merge("dare", [drop(m) for m in models], drop(base)), drop(whole))


def test_dare_l1_keeps_the_sum_of_magnitudes_of_each_layer(models, base, axes):
    merged = merge("dare_l1", models[:1], base, axes)
    for layer in range(3):
        before = np.abs(models[0]["blocks"]["kernel"] - base["blocks"]["kernel"])[layer].sum()
        after = np.abs(merged["blocks"]["kernel"] - base["blocks"]["kernel"])[layer].sum()
        np.testing.assert_allclose(after, before, rtol=1e-4)


def test_model_stock_of_orthogonal_task_vectors_is_the_base():
    base = {"w": np.full(4, 2.0, np.float32)}
    models = [{"w": base["w"] + np.eye(4, dtype=np.float32)[number]} for number in range(3)]
    same(merging.create("model_stock")(models, base=base), base)


def test_iso_c_gives_equal_singular_values_in_every_layer_and_view(models, base, axes):
    merged = merge("iso_c", models, base, axes)
    views = {
        "conv": (merged["conv"] - base["conv"]).reshape(18, 4),
        "query": (merged["query"]["kernel"] - base["query"]["kernel"]).reshape(8, 8),
    }
    for layer in range(3):
        views[f"layer {layer}"] = (merged["blocks"]["kernel"] - base["blocks"]["kernel"])[layer]
    for name, view in views.items():
        values = np.linalg.svd(np.asarray(view), compute_uv=False)
        assert values.std() / values.mean() < 1e-5, name


def test_iso_c_takes_the_bias_of_an_attention_for_a_vector(models, base, axes):
    merged = merge("iso_c", models, base, axes, scale=1.0)
    mean = np.mean([m["query"]["bias"] for m in models], axis=0)
    np.testing.assert_allclose(merged["query"]["bias"], mean, atol=1e-6)


@pytest.mark.parametrize("name", ["slerp", "model_stock", "ties_per_tensor", "iso_c"])
def test_layers_of_a_stack_are_merged_one_by_one(name, models, base, axes):
    merger = merging.create(name, **KEYS[name])
    models = models[:2]
    stack = lambda tree: {"kernel": tree["blocks"]["kernel"]}
    merged = merger([stack(m) for m in models], base=stack(base), axes=axes["blocks"])
    for layer in range(3):
        cut = lambda tree, layer=layer: {"kernel": tree["kernel"][layer]}
        inputs = [cut(stack(m)) for m in models]
        alone = merger(inputs, base=cut(stack(base)), axes={"kernel": ("embed", "mlp")})
        close(cut(merged), alone)


def two(tree):
    """Two tensors are enough, and compile faster."""
    return {name: tree[name] for name in ("blocks", "conv")}


@pytest.mark.parametrize("name", LEAFWISE)
def test_jit_vmap_and_eight_devices_give_the_plain_numbers(name, models, base, axes):
    base, models, axes = two(base), [two(m) for m in models], two(axes)
    plain = merge(name, models, base, axes)
    run = lambda models, base: merge(name, models, base, axes)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def place(x):
        cut = [size % 8 == 0 for size in x.shape]
        spec = ["data" if c and i == cut.index(True) else None for i, c in enumerate(cut)]
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    sharded = jax.tree.map(place, (models, base))
    assert len(sharded[1]["blocks"]["kernel"].sharding.device_set) == 8
    close(jax.jit(run)(*sharded), plain)

    flipped = jax.tree.map(lambda x: -x, (models, base))
    both = jax.vmap(run)(*jax.tree.map(lambda a, b: np.stack([a, b]), (models, base), flipped))
    close(jax.tree.map(lambda x: x[0], both), plain, 2e-6)
    if "ties" not in name:  # whose sign of opposed equal entries isn't symmetric
        close(jax.tree.map(lambda x: -x[1], both), plain, 2e-6)


def test_leaves_that_are_no_floats_come_from_the_base(base, models):
    with_count = [{**tree, "count": np.int32(n)} for n, tree in enumerate([base, *models])]
    assert merge("linear", with_count[1:], None)["count"] == 1
    assert merge("ties", with_count[1:], with_count[0])["count"] == 0


class Pair(NamedTuple):
    kernel: Any
    rest: Any


def test_axes_of_lists_tuples_and_named_tuples_are_those_of_dicts(models, base, axes):
    nest = lambda tree: ([tree["conv"]], Pair(tree["blocks"]["kernel"], (tree["query"],)))
    one = merge("iso_c", [nest(m) for m in models], nest(base), nest(axes))
    same(one, nest(merge("iso_c", models, base, axes)))
    with pytest.raises(UserError, match="axes of '0/0' are None"):
        merge("linear", [nest(m) for m in models], None, ([], nest(axes)[1]))


def test_keys_may_be_numbers_of_numpy_and_jax(models, base):
    expected = merge("task_arithmetic", models, base, scale=0.5)
    for half in (np.float32(0.5), np.asarray(0.5), jnp.float32(0.5)):
        same(merge("task_arithmetic", models, base, scale=half), expected)


@pytest.mark.parametrize("name", LEAFWISE)
def test_trees_without_a_number_to_merge_stay(name):
    trees = [{"count": np.arange(3), "none": np.zeros((0, 2), np.float32)}] * 2
    same(merge(name, trees, trees[0]), trees[0])
    assert merge(name, [{}, {}], {}) == {}


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (np.ones(2, np.float32), np.arange(2), r"'w' is int32 in model 1 and float32 in model 0"),
        (np.arange(2), np.ones(2, np.float32), r"'w' is float32 in model 1 and int32 in model 0"),
        (np.ones(2, np.complex64), np.ones(2, np.complex64), "'w' in model 0 is complex64"),
        ("text", "text", "'w' in model 0 is no array: str"),
    ],
)
def test_leaves_that_are_no_numbers_of_one_kind_are_refused(one, other, message):
    with pytest.raises(UserError, match=message):
        merging.create("linear")([{"w": one}, {"w": other}])


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("linear", {"fishers": []}, "linear takes no fishers="),
        ("regmean", {"fishers": []}, "regmean takes no fishers="),
        ("linear", {"weights": {"a": 1}}, "should be numbers"),
        ("iso_c", {"weights": (1, -1, 0)}, "sum of the weights"),
        ("regmean", {"weights": (0, 0, 0), "grams": [{}] * 3}, "sum of the weights"),
        ("regmean", {"weights": (2, -1, 1), "grams": [{}] * 3}, "should not be negative"),
    ],
)
def test_arguments_that_are_not_taken_are_refused(name, given, message, models, base):
    with pytest.raises(UserError, match=message):
        merging.create(name)(models, base=base, **given)
    with pytest.raises(UserError, match="a sequence of trees, not one dict"):
        merging.create(name)({"one": models[0], "other": models[1]})


def test_what_does_not_fit_is_refused_with_its_name(models, base):
    with pytest.raises(UserError, match="needs a base"):
        merging.create("ties")(models)
    with pytest.raises(UserError, match=r"model 1 has no 'conv'"):
        merging.create("linear")([models[0], {k: v for k, v in models[1].items() if k != "conv"}])
    with pytest.raises(UserError, match=r"model 1 has 'more'"):
        merging.create("linear")([models[0], {**models[1], "more": base["conv"]}])
    with pytest.raises(UserError, match=r"'conv' has shape \(2,\) in the base"):
        merging.create("ties")(models, base={**base, "conv": np.ones(2)})
    with pytest.raises(UserError, match="2 models, not 3"):
        merging.create("slerp")(models)
    with pytest.raises(UserError, match="2 or more models, not 1"):
        merging.create("model_stock")(models[:1], base=base)
    with pytest.raises(UserError, match="no models"):
        merging.create("linear")([])
    with pytest.raises(UserError, match="not one NoneType"):
        merging.create("linear")(None)
    with pytest.raises(UserError, match="needs 3 weights"):
        merging.create("linear")(models, weights=(1, 2))
    with pytest.raises(UserError, match="takes no weights"):
        merging.create("model_stock")(models, base=base, weights=(1, 2, 3))
    with pytest.raises(UserError, match="sum of the weights"):
        merging.create("linear")(models, weights=(1, -1, 0))
    with pytest.raises(UserError, match="finite"):
        merging.create("linear")(models, weights=(1, float("nan"), 0))


def test_unknown_methods_and_keys_are_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"'tie' is unknown \(did you mean 'ties'"):
        merging.create("tie")
    with pytest.raises(UserError, match=r"densty is not a key \(did you mean 'density'"):
        merging.create("ties", densty=0.2)
    with pytest.raises(UserError, match="should lie in"):
        merging.create("dare", density=0.0)
    with pytest.raises(UserError, match="should be a float"):
        merging.create("ties", density="much")
    for keys in ({"t": 1.5}, {"t": -0.1}, {"tolerance": -1.0}):
        with pytest.raises(UserError, match="should lie in"):
            merging.create("slerp", **keys)
    with pytest.raises(UserError, match="gives a str, where a Method or Merger should be"):
        merging.create("os:getcwd")
