"""Weight matching: permuted copies are found again, brute force agrees, nothing ever falls."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina.models.functional import functional
from lamina.models.spec import DataSpec
from lamina.models.table import MODELS
from lamina.platform import merging
from lamina.platform.checkpoints.names import flatten
from lamina.platform.errors import UserError
from lamina.platform.merging import matching, permutations, symmetries

IMAGES = DataSpec((8, 8, 2), "float32", 5)
TOKENS = DataSpec((6,), "int32", 11)
CASES = {
    "mlp": ("mlp", IMAGES, {"widths": (40, 30, 20), "norm": True}),
    "convnet": ("convnet", IMAGES, {"width": 8, "norm": "none"}),
    "convnet_batch": ("convnet", IMAGES, {"width": 8}),
    "resnet_batch": ("resnet", IMAGES, {"preset": "resnet20", "blocks": (2, 1), "width": 8}),
    "resnet_group": (
        "resnet", IMAGES, {"preset": "resnet20", "blocks": (1, 1), "width": 16, "norm": "group"},
    ),
    "bottleneck": ("resnet", IMAGES, {"preset": "resnet50", "blocks": (1, 1), "width": 4}),
    "vit": ("vit", IMAGES, {"patch": 4, "depth": 3, "embed": 24, "heads": 4, "mlp": 32}),
    "vit_unrolled": (
        "vit", IMAGES, {"patch": 4, "depth": 2, "embed": 24, "heads": 2, "mlp": 32, "scan": False},
    ),
    "transformer": (
        "transformer", TOKENS, {"depth": 3, "embed": 48, "heads": 6, "kv_heads": 3, "mlp": 24},
    ),
    "untied": (
        "transformer", TOKENS,
        {"depth": 2, "embed": 16, "heads": 2, "kv_heads": 2, "mlp": 24, "tied": False,
         "ngram_orders": (2,), "ngram_buckets": 16},
    ),
}  # fmt: skip


def trees(case, *seeds):
    """The spec of a model, and random parameters: a start's zeros and ones tell units nothing."""
    name, data, options = CASES[case]
    model = functional(lambda rngs: MODELS[name](rngs, data, jnp.float32, **options))
    found = symmetries.derive(model, data, check=False)
    return found.spec, [random_like(found.abstract, seed) for seed in seeds]


def random_like(abstract, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: random.standard_normal(leaf.shape).astype(np.float32), abstract
    )


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_permuted_copy_is_recovered_exactly(case, anchored):
    spec, (tree,) = trees(case, 0)
    copy = permutations.apply(spec, permutations.draw(spec, 1), tree)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(copy), strict=True)
    )
    found = matching.match(spec, tree, copy, anchored=anchored)
    back = flatten(permutations.apply(spec, found.permutations, copy))
    for name, leaf in flatten(tree).items():
        np.testing.assert_array_equal(back[name], leaf, err_msg=name)


def test_batch_statistics_move_with_the_rest_but_do_not_count():
    spec, (tree,) = trees("convnet_batch", 0)
    moves = permutations.draw(spec, 1)
    copy = permutations.apply(spec, moves, tree)
    other = dict(copy, model_state=random_like(copy["model_state"], 5))
    one, two = (matching.match(spec, tree, each) for each in (copy, other))
    for name in spec.permuted():
        np.testing.assert_array_equal(one.permutations[name], two.permutations[name])


@pytest.mark.parametrize("case", ["mlp", "resnet_group", "vit", "transformer"])
def test_the_inner_product_never_falls_and_is_what_the_result_has(case):
    spec, (one, two) = trees(case, 0, 1)
    found = matching.match(spec, one, two)
    assert (np.diff(found.history) >= 0).all()
    assert found.similarity > found.before
    moved = flatten(permutations.apply(spec, found.permutations, two))
    counted = [n for n in spec.leaves if not n.startswith("model_state/")]
    product = sum(np.vdot(flatten(one)[n].astype(float), moved[n].astype(float)) for n in counted)
    assert product == pytest.approx(found.similarity, rel=1e-5)


@pytest.fixture(scope="module")
def tiny():
    data = DataSpec((4,), "float32", 3)
    model = functional(lambda rngs: MODELS["mlp"](rngs, data, jnp.float32, widths=(4, 3)))
    found = symmetries.derive(model, data, check=False)
    return found.spec, found.abstract


@pytest.mark.parametrize("seed", range(5))
def test_no_permutation_of_a_tiny_mlp_is_better(tiny, seed):
    spec, abstract = tiny
    one, two = random_like(abstract, seed), random_like(abstract, seed + 100)
    w = lambda tree, name: flatten(tree)[name].astype(float)
    best = -np.inf
    for p, q in itertools.product(*(itertools.permutations(range(n)) for n in (4, 3))):
        p, q = list(p), list(q)
        best = max(
            best,
            (w(one, "layers/0/kernel") * w(two, "layers/0/kernel")[:, p]).sum()
            + (w(one, "layers/0/bias") * w(two, "layers/0/bias")[p]).sum()
            + (w(one, "layers/1/kernel") * w(two, "layers/1/kernel")[p][:, q]).sum()
            + (w(one, "layers/1/bias") * w(two, "layers/1/bias")[q]).sum()
            + (w(one, "head/kernel") * w(two, "head/kernel")[q]).sum(),
        )
    found = matching.match(spec, one, two, restarts=30)
    assert found.similarity == pytest.approx(best, rel=1e-6)


def test_the_same_seed_gives_the_same_and_restarts_are_never_worse():
    spec, (one, two) = trees("mlp", 0, 1)
    first, again = (matching.match(spec, one, two, seed=4, anchored=False) for _ in range(2))
    for name in spec.permuted():
        np.testing.assert_array_equal(first.permutations[name], again.permutations[name])
    more = matching.match(spec, one, two, seed=4, anchored=False, restarts=5)
    assert more.similarity >= first.similarity


def test_the_anchored_start_finds_no_less_here_in_fewer_sweeps():
    spec, (one, two) = trees("mlp", 0, 1)
    noisy = jax.tree.map(lambda a, b: a + 0.5 * b, one, two)
    noisy = permutations.apply(spec, permutations.draw(spec, 2), noisy)
    plain = matching.match(spec, one, noisy, anchored=False)
    anchored = matching.match(spec, one, noisy)
    assert anchored.similarity >= plain.similarity * (1 - 1e-6)
    assert anchored.sweeps <= plain.sweeps


def test_weight_matching_of_permuted_copies_is_the_model_itself():
    spec, (tree,) = trees("mlp", 0)
    copies = [permutations.apply(spec, permutations.draw(spec, n), tree) for n in (1, 2)]
    merged = merging.create("weight_matching")([tree, *copies], spec=spec, weights=(1, 2, 5))
    for name, leaf in flatten(tree).items():
        np.testing.assert_allclose(flatten(merged)[name], leaf, atol=1e-6)


def test_matching_many_models_brings_them_closer_to_each_other():
    spec, models = trees("mlp", 0, 1, 2, 3)
    spread = lambda found: sum(
        float(((np.asarray(a) - np.asarray(b)) ** 2).sum())
        for x, y in itertools.combinations(found, 2)
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    )
    to_first = [models[0], *(matching.align(spec, models[0], m) for m in models[1:])]
    settled = matching.settle(spec, to_first, rounds=10)
    assert spread(settled) < spread(to_first) < spread(models)


def test_refusals(tiny):
    spec, abstract = tiny
    tree = random_like(abstract, 0)
    with pytest.raises(UserError, match="needs spec="):
        merging.create("weight_matching")([tree, tree])
    with pytest.raises(UserError, match="restarts = 0"):
        merging.create("weight_matching", restarts=0)
    lost = {name: leaf for name, leaf in tree.items() if name != "head"}
    with pytest.raises(UserError, match="the other model has no 'head/kernel'"):
        matching.match(spec, tree, lost)
    nan = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), tree)
    with pytest.raises(UserError, match="of the reference has NaN"):
        matching.match(spec, nan, tree)
    other = jax.tree.map(lambda leaf: leaf[:2], tree)
    with pytest.raises(UserError, match="doesn't fit"):
        matching.match(spec, tree, other)
