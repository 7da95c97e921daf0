"""The decoder: against an independent reference, and the properties that it promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina.models.functional import functional
from lamina.models.generate import generate
from lamina.models.ngrams import hash_ngrams
from lamina.models.spec import DataSpec
from lamina.models.transformer import rope_angles, rotate, transformer

T, V = 16, 23
SPEC = DataSpec((T,), "int32", V)
TINY = {"depth": 2, "embed": 16, "heads": 4, "kv_heads": 2, "mlp": 24}
TOKENS = jax.random.randint(jax.random.key(5), (2, T), 0, V)


@functools.cache
def build(dtype=jnp.float32, **options):
    model = functional(lambda rngs: transformer(rngs, SPEC, dtype, **{**TINY, **options}))
    return model, jax.jit(model.init)(jax.random.key(0))[0]


@functools.cache
def forward(dtype=jnp.float32, **options):
    model, _ = build(dtype, **options)
    return jax.jit(lambda p, x, c: model.apply(p, {}, x, train=False, **c)[0].logits)


def logits(tokens=TOKENS, params=None, dtype=jnp.float32, **options):
    call = {k: options.pop(k) for k in ("segments", "positions") if k in options}
    own = build(dtype, **options)[1] if params is None else params
    return forward(dtype, **options)(own, tokens, call)


def reference(params, tokens):
    """One text, plain loops over heads and positions."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    def turn(x, position):
        half = len(x) // 2
        angle = position * 10000.0 ** (-np.arange(half) / half)
        pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
        return np.concatenate([pairs.real, pairs.imag])

    x = params["embedding"][tokens] * 4.0
    for i in range(TINY["depth"]):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]["blocks"])
        h = norm(x, p["attention_norm"]["scale"])
        total = np.zeros_like(x)
        for head in range(TINY["heads"]):
            group = head // 2
            q = h @ p["query"]["kernel"][:, head]
            k = h @ p["key"]["kernel"][:, group]
            v = h @ p["value"]["kernel"][:, group]
            for t in range(len(tokens)):
                scores = [turn(q[t], t) @ turn(k[s], s) / 2.0 for s in range(t + 1)]
                weights = np.exp(scores) / np.exp(scores).sum()
                total[t] += (weights @ v[: t + 1]) @ p["output"]["kernel"][head]
        x = x + total
        h = norm(x, p["mlp_norm"]["scale"])
        gate = h @ p["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ p["up"]["kernel"])) @ p["down"]["kernel"]
    return norm(x, params["norm"]["scale"]) @ params["embedding"].T


def test_logits_equal_a_numpy_reference():
    _, params = build()
    got = logits()
    for row in range(2):
        np.testing.assert_allclose(
            got[row], reference(params, np.asarray(TOKENS[row])), rtol=2e-4, atol=2e-5
        )


@functools.cache
def value_and_gradient(**options):
    model, params = build(**options)

    def loss(params):
        output = model.apply(params, {}, TOKENS, train=False)[0].logits
        return (output * jnp.sin(jnp.arange(output.size)).reshape(output.shape)).sum()

    return jax.jit(jax.value_and_grad(loss))(params)


def test_unrolled_blocks_start_as_the_stacked_ones():
    stacked, unrolled = build()[1]["layers"]["blocks"], build(scan=False)[1]["layers"]["blocks"]
    for i in range(2):
        jax.tree.map(
            lambda one, all_, i=i: np.testing.assert_array_equal(one, all_[i]),
            unrolled[str(i)],
            stacked,
        )


@pytest.mark.parametrize(
    ("scan", "remat"), [(True, "full"), (True, "dots"), (False, "none"), (False, "full")]
)
def test_scan_and_remat_change_neither_value_nor_gradient(scan, remat):
    expected, expected_grad = value_and_gradient()
    value, grad = value_and_gradient(scan=scan, remat=remat)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(grad["embedding"], expected_grad["embedding"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("orders", [(), (2, 4)])
def test_future_tokens_do_not_change_the_past(orders):
    changed = TOKENS.at[:, 9].set((TOKENS[:, 9] + 1) % V)
    a = logits(ngram_orders=orders, ngram_buckets=50)
    b = logits(changed, ngram_orders=orders, ngram_buckets=50)
    np.testing.assert_array_equal(a[:, :9], b[:, :9])
    assert np.all(np.any(a[:, 9:] != b[:, 9:], axis=-1))


@pytest.mark.parametrize("orders", [(), (2, 4)])
def test_packed_texts_equal_each_text_alone(orders):
    options = {"ngram_orders": orders, "ngram_buckets": 50}
    segments = jnp.array([[1] * 6 + [2] * 10] * 2)
    positions = jnp.array([[*range(6), *range(10)]] * 2)
    packed = logits(segments=segments, positions=positions, **options)
    first, second = logits(TOKENS[:, :6], **options), logits(TOKENS[:, 6:], **options)
    np.testing.assert_allclose(packed[:, :6], first, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(packed[:, 6:], second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"scan": False, "ngram_orders": (2, 4)}])
def test_cached_decoding_equals_the_full_forward(options):
    model, params = build(**options)
    bound = model.bind(params, {})
    decode = jax.jit(
        lambda tokens, cache: model.apply(params, {}, tokens, cache=cache, train=False)[0]
    )
    cache, parts = bound.empty_cache(2, T), []
    for start, end in ((0, 7), (7, 8), (8, 9), (9, T)):
        output, cache = decode(TOKENS[:, start:end], cache)
        parts.append(output.logits)
    np.testing.assert_allclose(
        jnp.concatenate(parts, axis=1), logits(**options), rtol=1e-3, atol=1e-5
    )


def test_greedy_generation_follows_the_largest_logit():
    model, params = build()
    bound = model.bind(params, {})
    text = generate(bound, TOKENS[:, :5], jax.random.key(0), steps=6, temperature=0.0)
    assert text.shape == (2, 11)
    np.testing.assert_array_equal(text[:, :5], TOKENS[:, :5])
    np.testing.assert_array_equal(text[:, 5:], logits(text).argmax(-1)[:, 4:-1])


def test_top_k_keeps_to_the_k_most_likely_and_the_key_decides():
    model, params = build()
    bound = model.bind(params, {})
    sample = lambda seed: generate(
        bound, TOKENS[:, :5], jax.random.key(seed), steps=6, temperature=5.0, top_k=2
    )
    text = sample(0)
    ranks = (-logits(text)).argsort(-1).argsort(-1)[:, 4:-1]
    chosen = np.take_along_axis(np.asarray(ranks), np.asarray(text[:, 5:, None]), axis=-1)
    assert chosen.max() == 1
    np.testing.assert_array_equal(text, sample(0))
    assert not np.array_equal(text, sample(1))


def test_an_empty_prompt_is_refused():
    model, params = build()
    with pytest.raises(ValueError, match="at least"):
        generate(model.bind(params, {}), TOKENS[:, :0], jax.random.key(0), steps=1)


def test_tied_embeddings_are_one_parameter():
    tied, untied = build()[0], build(tied=False)[0]
    assert "unembedding" not in tied.params
    assert untied.params["unembedding"].shape == (V, 16)


def test_rotary_products_depend_on_the_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    score = lambda a, b: (
        rotate(q, rope_angles(jnp.array([[a]]), 8, 1e4))
        * rotate(k, rope_angles(jnp.array([[b]]), 8, 1e4))
    ).sum()
    np.testing.assert_allclose(score(3, 1), score(103, 101), rtol=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_ngrams_of_equal_text_share_a_bucket_and_partial_ones_are_marked():
    tokens = jnp.array([[1, 2, 3, 9, 1, 2, 3]])
    history = jnp.full((1, 2), -1)
    ids, whole = jax.jit(lambda t, h: hash_ngrams(t, h, None, (2, 3), 1000))(tokens, history)
    assert ids[0, 2, 1] == ids[0, 6, 1]
    assert ids[0, 2, 1] != ids[0, 3, 1]
    assert 0 <= ids[..., 0].min() <= ids[..., 0].max() < 1000 <= ids[..., 1].min()
    assert whole[0].tolist() == [[False, False], [True, False]] + [[True, True]] * 5


def test_dropout_follows_the_key():
    model, params = build(dropout=0.3)
    run = jax.jit(
        lambda seed: model.apply(params, {}, TOKENS, train=True, key=jax.random.key(seed))[0].logits
    )
    np.testing.assert_array_equal(run(1), run(1))
    assert not np.array_equal(run(1), run(2))
    np.testing.assert_array_equal(logits(dropout=0.3), logits())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "embed=16"),
        ({"kv_heads": 3}, "kv_heads=3 must divide heads=4"),
        ({"preset": "huge"}, "small"),
        ({"remat": "some"}, "dots"),
        ({"ngram_orders": (1, 2)}, "from 2 on"),
        ({"ngram_orders": (2,), "ngram_buckets": 0}, "ngram_buckets"),
    ],
)
def test_errors_say_what_would_be_right(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_images_are_refused():
    with pytest.raises(ValueError, match="vit or convnet"):
        functional(lambda r: transformer(r, DataSpec((8, 8, 1), "float32", 10), jnp.float32))
