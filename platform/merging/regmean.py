"""RegMean: each dense kernel by the linear regression that all models' kernels solve together."""

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lamina.platform.checkpoints.names import nearest
from lamina.platform.linear_algebra import one_by_one
from lamina.platform.merging import mergers
from lamina.platform.merging.mergers import Merger
from lamina.platform.merging.method import Method, weighted_sum

Tree = Any
Grams = Mapping[str, Any]


def merger(alpha: float) -> Merger:
    """Returns the merger; see `with_data.regmean`."""
    plain = Method(None, base=False, weighted="shares")

    def apply(
        models: Sequence[Tree],
        *,
        base: Tree,
        weights: Any,
        axes: Tree,
        grams: Sequence[Grams] = (),
    ) -> Tree:
        grams = list(grams)
        if len(grams) != len(models):
            raise ValueError(f"needs grams=, one mapping for each of the {len(models)} models")
        leaves = mergers.fit(models, None, axes)
        _check(leaves, grams)
        weights = plain.weights(len(models), weights)
        merged = [each[0] for each in leaves.models]
        for n, name in enumerate(leaves.names):
            if not leaves.floating(n):
                continue
            values = leaves.models[n]
            own = [jnp.asarray(g[name]) for g in grams] if name in grams[0] else []
            dtype = mergers.work_dtype([*values, *own])
            factors = jnp.asarray(weights, dtype)
            values = [value.astype(dtype) for value in values]
            mean = weighted_sum(values, factors) / factors.sum()
            if own:
                solve = lambda g, v, m, f=factors: _solve(g, v, m, f, alpha)
                solve = jax.vmap(solve) if own[0].ndim == 3 else solve
                mean = solve([g.astype(dtype) for g in own], values, mean)
            merged[n] = mean.astype(leaves.models[n][0].dtype)
        return leaves.rebuild(merged)

    return Merger("regmean", apply, False, False, needs="grams")


def _check(leaves: mergers.Leaves, grams: Sequence[Grams]) -> None:
    for t, given in enumerate(grams):
        if set(given) != set(grams[0]):
            name = next(iter(set(given) ^ set(grams[0])))
            raise ValueError(f"the Gram matrices of model {t} and model 0 differ: {name!r}")
        for name in given:
            if name not in leaves.names:
                raise ValueError(
                    f"there is a Gram matrix of {name!r}, which is no parameter"
                    + nearest(name, leaves.names)
                )
            shape = leaves.models[leaves.names.index(name)][0].shape
            if not _fits(jnp.shape(given[name]), shape):
                raise ValueError(
                    f"the Gram matrix of {name!r} in model {t} has shape "
                    f"{jnp.shape(given[name])}, which doesn't fit a kernel of {shape}"
                )


def _fits(gram: tuple[int, ...], kernel: tuple[int, ...]) -> bool:
    """Tells whether a Gram matrix (or a stack) is of a kernel's leading dimensions."""
    if len(gram) not in (2, 3) or gram[-1] != gram[-2] or gram[:-2] != kernel[: len(gram) - 2]:
        return False
    return gram[-1] in itertools.accumulate(kernel[len(gram) - 2 : -1], operator.mul)


def _pseudo_inverse(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.pinv(matrix, hermitian=True)


def _solve(
    grams: Sequence[jax.Array],
    kernels: Sequence[jax.Array],
    mean: jax.Array,
    weights: jax.Array,
    alpha: float,
) -> jax.Array:
    """Solves for one kernel."""
    size = grams[0].shape[0]
    on, off = jnp.eye(size, dtype=mean.dtype), jnp.asarray(alpha, mean.dtype)
    shrunk = [gram * (off + (1 - off) * on) for gram in grams]
    total = weighted_sum(shrunk, weights)
    # Around the mean, so that what no model's data tell stays there.
    residual = [
        gram @ (kernel - mean).reshape(size, -1)
        for gram, kernel in zip(shrunk, kernels, strict=True)
    ]
    wanted = weighted_sum(residual, weights)
    if alpha == 1:
        change = one_by_one(_pseudo_inverse)(total) @ wanted
    else:
        scale = jnp.diagonal(total)
        scale = jax.lax.rsqrt(jnp.where(scale > 0, scale, jnp.ones_like(scale)))[:, None]
        even = total * scale * scale.T
        even = even + jnp.diag((jnp.diagonal(even) == 0).astype(even.dtype))
        change = scale * one_by_one(jnp.linalg.solve)(even, scale * wanted)
    return mean + change.reshape(mean.shape)
