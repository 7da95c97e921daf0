"""Permutation symmetries of our models: what is found, that it is sound, and who is to blame."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lamina.models.functional import functional
from lamina.models.spec import DataSpec
from lamina.models.table import MODELS
from lamina.platform.checkpoints.names import flatten
from lamina.platform.errors import UserError
from lamina.platform.merging import permutations, symmetries
from lamina.platform.merging.permutations import Factor, Group, Spec

IMAGES = DataSpec((8, 8, 2), "float32", 5)
TOKENS = DataSpec((6,), "int32", 11)
CASES = {
    "mlp": (IMAGES, {"widths": (12, 10), "norm": True}),
    "convnet": (IMAGES, {"width": 4, "stages": 2}),
    "resnet": (IMAGES, {"preset": "resnet20", "blocks": (1, 1), "width": 8, "norm": "group"}),
    "vit": (IMAGES, {"patch": 4, "depth": 2, "embed": 12, "heads": 2, "mlp": 8, "pool": "token"}),
    "transformer": (TOKENS, {"depth": 2, "embed": 24, "heads": 4, "kv_heads": 2, "mlp": 10}),
}


def build(name, **options):
    data, given = CASES[name]
    make = lambda rngs: MODELS[name](rngs, data, jnp.float32, **(given | options))
    return functional(make), data


def units(spec, text):
    """The groups of a leaf's dimension, as (size, depends on so many others)."""
    return sorted(
        (spec.groups[name].size, len(spec.groups[name].given))
        for name in spec.permuted()
        if text in spec.users(name)
    )


@pytest.mark.parametrize("name", CASES)
def test_random_permutations_leave_the_output_as_it_is(name):
    model, data = build(name)
    found = symmetries.derive(model, data)  # which verifies
    moved = permutations.draw(found.spec, 3)
    assert any((moved[n] != permutations.identity(found.spec)[n]).any() for n in moved)


def test_hidden_layers_of_an_mlp_are_groups_with_their_norms():
    model, data = build("mlp")
    spec = symmetries.derive(model, data, check=False).spec
    first, second = spec.permuted()
    assert {spec.groups[first].size, spec.groups[second].size} == {12, 10}
    ten = first if spec.groups[first].size == 10 else second
    assert set(spec.users(ten)) == {
        "layers/1/kernel", "layers/1/bias", "norms/1/scale", "norms/1/bias", "head/kernel",
    }  # fmt: skip


def test_batch_statistics_are_carried():
    model, data = build("convnet")
    spec = symmetries.derive(model, data, check=False).spec
    assert "model_state/norms/0/var" in spec.leaves


def test_channels_before_a_group_norm_stay_in_their_groups():
    model, data = build("resnet")
    spec = symmetries.derive(model, data, check=False).spec
    assert units(spec, "stem/kernel") == [(2, 0), (4, 1)]  # 2 groups, in each of them 4 channels


def test_residual_blocks_share_the_permutation_of_their_stream():
    model, data = build("resnet", norm="batch")
    spec = symmetries.derive(model, data, check=False).spec
    shared = set(spec.groups) & {f.group for f in sum(spec.leaves["stem/kernel"], ())}
    assert "blocks/0/convolutions/1/kernel" in spec.users(*shared)
    assert "blocks/1/shortcut/kernel" in spec.users(*shared)


def test_heads_without_rotary_positions_have_units_that_move_inside_them():
    model, data = build("vit")
    spec = symmetries.derive(model, data, check=False).spec
    query, value = "layers/blocks/query/kernel", "layers/blocks/value/kernel"
    # The stream, then heads (of each layer) and units (of each layer and head).
    assert units(spec, query) == [(2, 1), (6, 2), (12, 0)]
    assert units(spec, value) == [(2, 1), (6, 2), (12, 0)]
    inside = lambda leaf: {n for n in spec.permuted() if leaf in spec.users(n)}
    assert len(inside(query) & inside(value)) == 2  # their units have orders of their own


def test_rotary_positions_forbid_moves_inside_a_query_head():
    model, data = build("transformer")
    spec = symmetries.derive(model, data, check=False).spec
    assert units(spec, "layers/blocks/key/kernel") == [(2, 1), (24, 0)]
    # Two key heads, and the two queries of each.
    assert units(spec, "layers/blocks/query/kernel") == [(2, 1), (2, 2), (24, 0)]
    assert units(spec, "layers/blocks/value/kernel") == [(2, 1), (6, 2), (24, 0)]


def test_tied_embeddings_share_the_stream_and_tokens_stay():
    model, data = build("transformer")
    spec = symmetries.derive(model, data, check=False).spec
    assert [f.group == "" for dim in spec.leaves["embedding"] for f in dim] == [True, False]


@pytest.mark.parametrize("option", [{"scan": False}, {"remat": "full"}])
def test_unrolled_and_rematerialised_stacks_have_the_same_freedom(option):
    one, data = build("vit")
    other, _ = build("vit", **option)
    count = lambda model: symmetries.count(symmetries.derive(model, data, check=False).spec)
    assert count(one) == pytest.approx(count(other))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_both_lowerings_of_convolutions_have_the_same_symmetries(norm):
    found = [
        symmetries.derive(
            build("convnet", norm=norm, lowering=way, width=8)[0], IMAGES, check=False
        )
        for way in ("patches", "conv")
    ]
    assert found[0].spec == found[1].spec


class Own(nnx.Module):
    """A model of a user's: no logical axes, a residual layer, and units that are in an order."""

    def __init__(self, rngs):
        self.first = nnx.Linear(8, 6, rngs=rngs)
        self.inner = nnx.Linear(6, 6, rngs=rngs)
        self.ordered = nnx.Linear(6, 7, rngs=rngs)
        self.last = nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(x))
        x = x + nnx.relu(self.inner(x))
        return self.last(jnp.cumsum(self.ordered(x), axis=-1))


def test_a_users_model_without_logical_axes():
    model = functional(lambda rngs: Own(rngs))
    spec = symmetries.derive(model, DataSpec((8,), "float32", 3)).spec
    (stream,) = spec.permuted()  # what the cumulative sum runs over stays
    assert spec.groups[stream].size == 6
    assert spec.leaves["inner/kernel"] == ((Factor(stream, 6),),) * 2


class Fused(nnx.Module):
    """Of a user's too: a kernel for queries, keys and values, a gated layer, experts, no biases."""

    def __init__(self, rngs):
        dense = lambda i, o: nnx.Linear(i, o, use_bias=False, rngs=rngs)
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.fused, self.out, self.gated, self.down = (
            dense(8, 24),
            dense(8, 8),
            dense(8, 10),
            dense(5, 8),
        )
        self.experts = nnx.Param(jnp.ones((3, 8, 7)))
        self.gate, self.head = dense(8, 3), dense(7, 11)

    def __call__(self, x):
        x = self.embed(x)
        query, key, value = (
            part.reshape(*x.shape[:2], 2, 4) for part in jnp.split(self.fused(x), 3, axis=-1)
        )
        x = x + self.out(jax.nn.dot_product_attention(query, key, value).reshape(x.shape))
        x = x + self.down(nnx.glu(self.gated(x)))
        shares, chosen = jax.lax.top_k(nnx.softmax(self.gate(x)), 2)
        each = jnp.einsum("bti,btkio->btko", x, self.experts[...][chosen])
        return self.head((shares[..., None] * nnx.relu(each)).sum(-2))


def test_the_parts_of_a_fused_kernel_are_permuted_alike():
    spec = symmetries.derive(functional(Fused), TOKENS).spec
    assert units(spec, "fused/kernel") == [(2, 0), (4, 1), (8, 0)]  # heads, inside a head, stream
    assert units(spec, "gated/kernel") == [(5, 0), (8, 0)]
    assert units(spec, "experts") == [(7, 0), (8, 0)]  # which expert is the third is in an order
    assert units(spec, "embed/embedding") == [(8, 0)]


class Grouped(nnx.Module):
    """Convolutions of a user's, with groups and by channel."""

    def __init__(self, rngs):
        conv = lambda i, o, groups: nnx.Conv(i, o, (3, 3), feature_group_count=groups, rngs=rngs)
        self.first, self.grouped, self.by_channel = conv(2, 8, 1), conv(8, 12, 2), conv(12, 12, 12)
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.grouped(nnx.relu(self.first(x))))
        return self.head(nnx.relu(self.by_channel(x)).mean((1, 2)))


def test_channels_of_a_grouped_convolution_stay_in_their_groups():
    spec = symmetries.derive(functional(Grouped), IMAGES).spec
    assert units(spec, "first/kernel") == [(2, 0), (4, 1)]
    assert units(spec, "grouped/kernel") == [(2, 0), (4, 1), (6, 1)]
    assert units(spec, "by_channel/kernel") == [(2, 0), (6, 1)]


def test_numpy_and_jax_permute_alike_and_dtypes_stay():
    model, data = build("vit")
    spec = symmetries.derive(model, data, check=False).spec
    draw = lambda leaf: np.random.default_rng(leaf.size).standard_normal(leaf.shape)
    params = jax.tree.map(lambda leaf: jnp.asarray(draw(leaf), jnp.bfloat16), model.params)
    moves = permutations.draw(spec, 0)
    ours = permutations.apply(spec, moves, params)
    theirs = permutations.apply(spec, moves, jax.tree.map(np.asarray, params))
    for name, leaf in flatten(ours).items():
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, flatten(theirs)[name])


def test_applying_a_permutation_is_indexing():
    spec = Spec({"h": Group(2), "u": Group(3, ("h",))}, {"w": ((Factor("h", 2), Factor("u", 3)),)})
    moves = {"h": np.asarray([1, 0]), "u": np.asarray([[2, 0, 1], [0, 2, 1]])}
    w = np.arange(6)  # head 0: 0 1 2, head 1: 3 4 5
    assert permutations.apply(spec, moves, {"w": w})["w"].tolist() == [5, 3, 4, 0, 2, 1]


@pytest.fixture(scope="module")
def wrong():
    model, data = build("mlp", norm=False)
    return symmetries.derive(model, data, check=False)


def test_a_leaf_that_should_stay_is_named(wrong):
    spec = Spec({"alone": Group(12)}, {"layers/0/bias": ((Factor("alone", 12),),)})
    with pytest.raises(UserError, match=r"'alone' changes .*'layers/0/bias' should not be"):
        permutations.verify(spec, wrong.forward, wrong.abstract)


def test_a_leaf_too_few_is_told_with_its_group(wrong):
    spec = wrong.spec
    leaves = {name: dims for name, dims in spec.leaves.items() if name != "head/kernel"}
    with pytest.raises(UserError, match="a parameter is missing among its leaves"):
        permutations.verify(Spec(spec.groups, leaves), wrong.forward, wrong.abstract)


def test_a_leaf_that_the_model_has_not_is_named(wrong):
    leaves = {**wrong.spec.leaves, "layers/9/kernel": ()}
    with pytest.raises(UserError, match="'layers/9/kernel', which the model has not"):
        permutations.verify(wrong.spec._replace(leaves=leaves), wrong.forward, wrong.abstract)
