"""What islands exchange, against the papers' formulas in numpy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from lamina.platform.errors import UserError
from lamina.platform.optimizers.islands import compression, demo
from lamina.platform.optimizers.islands.method import AXIS
from lamina.platform.optimizers.islands.rounds import diloco, local_sgd

ISLANDS = 3
RNG = np.random.default_rng(0)
START = {"matrix": RNG.normal(size=(6, 8)), "vector": RNG.normal(size=8)}
ROUNDS = {name: RNG.normal(size=(4, ISLANDS, *x.shape)) for name, x in START.items()}
"""Four rounds: by how much each island moves in them."""


def settled(method):
    """Returns the common parameters after each round."""
    params = jax.tree.map(jnp.asarray, START)
    state, path = method.outer.init(params), []
    for r in range(4):
        own = {name: params[name][None] + ROUNDS[name][r] for name in params}
        difference = {name: params[name][None] - own[name] for name in params}
        updates, state = method.outer.update(method.average(difference), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        path.append(params)
    return path


@pytest.mark.usefixtures("x64")
def test_diloco_moves_the_common_parameters_as_in_the_paper():
    path = settled(diloco(lambda x: x, number=ISLANDS))
    for name, x in START.items():
        b = 0
        for r in range(4):
            d = -ROUNDS[name][r].mean(axis=0)
            b = 0.9 * b + d
            x = x - 0.7 * (d + 0.9 * b)
            np.testing.assert_allclose(path[r][name], x, atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_an_outer_block_without_a_name_changes_keys_of_the_default():
    changed = settled(diloco(lambda x: x, number=ISLANDS, outer={"learning_rate": 0.5}))
    named = {"name": "sgd", "learning_rate": 0.5, "momentum": 0.9, "nesterov": True}
    expected = settled(diloco(lambda x: x, number=ISLANDS, outer=named))
    jax.tree.map(np.testing.assert_array_equal, changed, expected)
    with pytest.raises(UserError, match=r"islands.outer: .*momentun is not a key"):
        diloco(lambda x: x, number=ISLANDS, outer={"momentun": 0.9})


@pytest.mark.usefixtures("x64")
def test_local_sgd_is_the_mean_of_the_islands_and_diloco_without_momentum():
    plain = {"name": "sgd", "learning_rate": 1.0}
    mean, outer = (
        settled(method)
        for method in (
            local_sgd(lambda x: x, number=ISLANDS),
            diloco(lambda x: x, number=ISLANDS, outer=plain),
        )
    )
    for name, x in START.items():
        for r in range(4):
            x = (x + ROUNDS[name][r]).mean(axis=0)
            np.testing.assert_allclose(mean[r][name], x, atol=1e-10)
            np.testing.assert_array_equal(mean[r][name], outer[r][name])


def test_a_code_of_eight_bits_is_wrong_by_at_most_half_a_scale():
    x = jnp.asarray(RNG.normal(size=(7, 5, 11)) * np.geomspace(1e-6, 1e3, 11), jnp.float32)
    code, scale = compression.encode_int8(x)
    assert (code.dtype, scale.shape) == (jnp.int8, (1, 1, 11))
    np.testing.assert_allclose(scale[0, 0], np.abs(x).max(axis=(0, 1)) / 127, rtol=1e-6)
    error = np.abs(compression.decode_int8(code, scale) - x)
    assert (error <= 0.5001 * np.asarray(scale)).all()
    assert (np.asarray(compression.decode_int8(*compression.encode_int8(0 * x))) == 0).all()


def test_a_code_keeps_zeros_and_tells_what_is_not_finite():
    arrives = lambda x: np.asarray(compression.decode_int8(*compression.encode_int8(x)))
    for dtype in (jnp.float32, jnp.bfloat16):
        np.testing.assert_array_equal(arrives(jnp.zeros((3, 2), dtype)), 0)
    assert arrives(jnp.zeros((0, 2))).shape == (0, 2)
    assert np.isfinite(arrives(jnp.array([3e38, -1e38]))).all()
    column = arrives(jnp.array([[jnp.nan, 1.0], [2.0, 1.0]]))
    assert np.isnan(column[:, 0]).all()
    np.testing.assert_allclose(column[:, 1], 1.0)
    assert not np.isfinite(arrives(jnp.array([jnp.inf, 1.0]))).any()


def test_bytes_are_those_of_the_arrays_that_are_sent():
    tree = {name: jnp.asarray(x, jnp.float32) for name, x in START.items()}
    for name, code in compression.COMPRESSIONS.items():
        sent = [part.nbytes for x in tree.values() for part in code.encode(x)]
        assert compression.size(name)(tree) == sum(sent)
    method = demo.demo(lambda x: x, number=2, topk=3, chunk=4)
    cuts = [demo.tiling(x.shape, 4) for x in tree.values()]
    sent = [
        demo.extract(x, cut, min(3, cut.size))[1:]
        for x, cut in zip(tree.values(), cuts, strict=True)
    ]
    assert method.sent(tree) == sum(part.nbytes for pair in sent for part in pair)


def test_tiles_are_the_largest_parts_that_divide():
    assert demo.tiling((784, 256), 64) == (1, (14, 56), (4, 64))
    assert demo.tiling((3, 3, 16, 24), 64) == (9, (1, 16), (1, 24))
    assert demo.tiling((10,), 4) == (1, (1, 1), (5, 2))
    assert demo.tiling((), 64) == (1, (1, 1), (1, 1))


def exchange(method, grads, momentum):
    """Returns (what the optimizer is given on each island, the momenta after it)."""
    step = jax.vmap(method.transformation.update, axis_name=AXIS)
    return step(grads, momentum)


def steps_of(method, steps):
    """Gives gradients, directions and momenta of some steps."""
    rng = np.random.default_rng(1)
    zero = {name: jnp.zeros((ISLANDS, *x.shape)) for name, x in START.items()}
    momentum = zero
    for _ in range(steps):
        grads = {name: jnp.asarray(rng.normal(size=zero[name].shape)) for name in zero}
        before = momentum
        direction, momentum = exchange(method, grads, before)
        yield grads, before, direction, momentum


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_demo_exchanges_the_strongest_frequencies_of_each_momentum():
    chunk, k, beta = 4, 3, 0.9
    method = demo.demo(lambda x: x, number=ISLANDS, beta=beta, topk=k, chunk=chunk)
    own = {name: np.zeros((ISLANDS, *x.shape)) for name, x in START.items()}
    for grads, _, direction, momentum in steps_of(method, 5):
        for name in START:
            matrix = np.atleast_2d(START[name])
            rows, columns = (
                [c for c in range(1, chunk + 1) if n % c == 0][-1] for n in matrix.shape
            )
            expected = np.zeros(matrix.shape)
            for i in np.ndindex(matrix.shape[0] // rows, matrix.shape[1] // columns):
                place = tuple(
                    slice(i[a] * size, (i[a] + 1) * size) for a, size in enumerate((rows, columns))
                )
                total, count = np.zeros((rows, columns)), np.zeros((rows, columns))
                for island in range(ISLANDS):
                    tile = np.atleast_2d(own[name][island])[place]
                    tile = beta * tile + np.atleast_2d(np.asarray(grads[name][island]))[place]
                    found = scipy.fft.dctn(tile, norm="ortho")
                    kept = np.zeros(found.size)
                    largest = np.argsort(-np.abs(found.ravel()))[: min(k, found.size)]
                    kept[largest] = found.ravel()[largest]
                    kept = kept.reshape(found.shape)
                    total, count = total + kept, count + (kept != 0)
                    np.atleast_2d(own[name][island])[place] = tile - scipy.fft.idctn(
                        kept, norm="ortho"
                    )
                expected[place] = scipy.fft.idctn(total / np.maximum(count, 1), norm="ortho")
            for island in range(ISLANDS):
                given = np.atleast_2d(direction[name][island])
                np.testing.assert_allclose(given, expected, atol=1e-10)
            np.testing.assert_allclose(momentum[name], own[name], atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_demo_conserves_what_is_sent_and_kept_are_the_momentum():
    alone = demo.demo(lambda x: x, number=1, beta=0.9, topk=2, chunk=4)
    momentum = jax.tree.map(lambda x: jnp.zeros((1, *x.shape)), START)
    for r in range(4):
        grads = {name: jnp.asarray(ROUNDS[name][r, :1]) for name in START}
        sent, kept = exchange(alone, grads, momentum)
        for name in START:
            whole = 0.9 * momentum[name] + grads[name]
            np.testing.assert_allclose(sent[name] + kept[name], whole, atol=1e-12)
            assert 0 < np.sum(np.square(kept[name])) < np.sum(np.square(whole))
        momentum = kept


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_demo_that_sends_everything_gives_the_mean_gradient_and_keeps_nothing():
    method = demo.demo(lambda x: x, number=ISLANDS, topk=64, chunk=8)
    for grads, _, direction, momentum in steps_of(method, 2):
        for name in START:
            mean = np.broadcast_to(grads[name].mean(axis=0), grads[name].shape)
            np.testing.assert_allclose(direction[name], mean, atol=1e-10)
            np.testing.assert_allclose(momentum[name], 0, atol=1e-10)


def test_a_bad_outer_optimizer_and_bad_numbers_are_refused():
    whole = lambda x: x
    with pytest.raises(UserError, match=r"islands.outer: .*'sdg' is unknown"):
        diloco(whole, number=2, outer={"name": "sdg", "learning_rate": 1.0})
    with pytest.raises(UserError, match=r"islands.outer.learning_rate is missing"):
        diloco(whole, number=2, outer={"name": "sgd"})
    for name in ("lbfgs", "momo", "polyak_sgd", "sophia"):
        with pytest.raises(UserError, match=f"islands.outer.name = '{name}' asks for the loss"):
            diloco(whole, number=2, outer={"name": name, "learning_rate": 1.0})
    with pytest.raises(ValueError, match="every = 0 should be at least 1 step"):
        local_sgd(whole, number=2, every=0)
    with pytest.raises(ValueError, match="number = 0"):
        demo.demo(whole, number=0)
    with pytest.raises(ValueError, match=r"beta = 1.0"):
        demo.demo(whole, number=2, beta=1.0)
