"""The numbers of fusion_bench 0.2.33 on a small network (tests/references/fusion_bench_numbers.py).

What it calls by other names, and where it differs, each test says. All in float64, to 1e-10.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lamina.platform import merging
from lamina.platform.merging import learned

NUMBERS = np.load(Path(__file__).parent / "fusion_bench.npz")
WEIGHTS = (0.5, 0.2, 0.3)


@pytest.fixture(autouse=True)
def _wide():
    """Float64, and the promotions of optax."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def group(name):
    """Parameters by their Flax names, kernels as [in, out]; they sort as torch's do."""
    found = {}
    for key in NUMBERS.files:
        if key.startswith(f"{name}/") and key != f"{name}/coefficients":
            value = NUMBERS[key]
            path = key.removeprefix(f"{name}/").replace(".", "/")
            found[path.replace("weight", "weights")] = value.T if value.ndim == 2 else value
    return found


BASE, *MODELS = (group(f"model{number}") for number in range(4))
SIZE = sum(value.size for value in BASE.values())


def agree(found, expected, atol=1e-10):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("percent", [10, 30])
def test_ties_over_the_whole_model_with_one_entry_more(normalize, percent):
    kept = int(SIZE * percent / 100)
    expected = group(f"ties_{'mean' if normalize else 'sum'}_{percent}")
    ties = lambda entries: merging.create(
        "ties", density=(entries + 0.5) / SIZE, scale=0.3, normalize=normalize
    )(MODELS, base=BASE)
    agree(ties(kept + 1), expected)
    with pytest.raises(AssertionError):
        agree(ties(kept), expected)


@pytest.mark.parametrize(("percent", "sign"), [(10, -1), (30, 1)])
def test_where_task_vectors_cancel_ties_takes_the_sign_of_the_majority(percent, sign):
    merged = group(f"ties_mean_{percent}")["up/bias"]  # of +2, -2 and 0, in some order, times 0.3
    np.testing.assert_allclose(merged[:3], [sign * 0.6] * 3, rtol=0, atol=1e-12)
    merger = merging.create("ties_per_tensor", density=percent / 100, scale=0.3)
    assert (merger(MODELS, base=BASE)["up/bias"][:3] > -1e-12).all()  # mergekit's rule: plus


def test_iso_c():
    delta = group("iso_c")
    expected = {name: BASE[name] + 1.3 * delta[name] for name in BASE}
    agree(merging.create("iso_c", scale=1.3)(MODELS, base=BASE), expected)


@pytest.mark.parametrize(("name", "floor"), [("fisher", 1e-6), ("fisher_floor", 1e-2)])
def test_fisher_whose_floor_is_added_before_the_norm_divides(name, floor):
    fishers = [group(f"fishers{t}") for t in range(3)]
    ours = merging.create("fisher", floor=floor)(MODELS, fishers=fishers, weights=WEIGHTS)
    differs = max(np.abs(ours[n] - value).max() for n, value in group(name).items())
    assert differs > 1e-6  # our floor is the least that a normalised entry counts
    for t, fisher in enumerate(fishers):
        norm = np.sqrt(sum((value**2).sum() for value in fisher.values()))
        fishers[t] = {n: (value + floor) / (norm + floor) for n, value in fisher.items()}
    plain = merging.create("fisher", normalize=False, floor=1e-30)
    agree(plain(MODELS, fishers=fishers, weights=WEIGHTS), group(name))


@pytest.mark.parametrize("alpha", [0.9, 0.5])
def test_regmean(alpha):
    up, down = (NUMBERS["data"][:, 0], [])
    for model, rows in zip(MODELS, up, strict=True):
        down.append(np.tanh(rows @ model["up/weights"] + model["up/bias"]))
    gram = lambda x: x.T @ x / len(x)
    grams = [
        {"up/weights": gram(x), "down/weights": gram(h)} for x, h in zip(up, down, strict=True)
    ]
    agree(merging.create("regmean", alpha=alpha)(MODELS, grams=grams), group(f"regmean_{alpha}"))


def entropy(params, batch, heads):
    """Summed over the tasks; with the 1e-8 inside the logarithm that fusion_bench has."""
    hidden = jnp.tanh(batch @ params["up/weights"] + params["up/bias"][None, None])
    features = hidden @ params["down/weights"] + params["down/bias"][None, None]
    p = jax.nn.softmax(jnp.einsum("tbd,tdc->tbc", features, heads))
    return -(p * jnp.log(p + 1e-8)).sum(-1).mean(-1).sum()


def coefficients(name):
    """[models] of all tensors, or by tensor, in the order in which torch has them."""
    given = NUMBERS[f"{name}/coefficients"]
    if given.ndim == 1:
        return {"all": given}
    names = ["up/weights", "up/bias", "down/weights", "down/bias"]
    return dict(zip(names, given.T, strict=True))


@pytest.mark.parametrize("kind", ["task", "layer"])
def test_adamerging(kind):
    merger = merging.create("adamerging", coefficients=kind, learning_rate=0.02)
    batches, heads = NUMBERS["data"].swapaxes(0, 1), NUMBERS["heads"]
    found = merger.fit(MODELS, base=BASE, loss=entropy, batches=batches, held=heads)
    agree(found.coefficients, coefficients(f"adamerging_{kind}"))
    agree(found.params, group(f"adamerging_{kind}"))


def test_adamerging_beyond_one_clamps_the_coefficients_that_it_uses_and_not_those_it_keeps():
    expected = coefficients("adamerging_clamped")
    assert max(value.max() for value in expected.values()) > 1.05
    deltas = [{n: m[n] - BASE[n] for n in BASE} for m in MODELS]
    merge = lambda c: {
        n: BASE[n] + sum(jnp.clip(c[n][t], 0, 1) * delta[n] for t, delta in enumerate(deltas))
        for n in BASE
    }
    start = {name: jnp.full(3, 0.95) for name in BASE}
    batches, heads = jnp.asarray(NUMBERS["data"].swapaxes(0, 1)), jnp.asarray(NUMBERS["heads"])
    found = learned.learn(merge, start, entropy, batches, heads, optax.adam(0.02))
    agree(found.coefficients, expected)
    merger = merging.create("adamerging", start=0.95, learning_rate=0.02)
    ours = merger.fit(MODELS, base=BASE, loss=entropy, batches=batches, held=heads)
    assert max(float(value.max()) for value in ours.coefficients.values()) <= 1
    agree(ours.params, group("adamerging_clamped"), atol=0.2)  # near, and not the same
    with pytest.raises(AssertionError):
        agree(ours.params, group("adamerging_clamped"))
