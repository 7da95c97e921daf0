"""DeMo: islands keep their momentum apart, and exchange its strongest frequencies.

Letters: I islands, T tiles of a parameter, R x C the shape of a tile, N = R C, K coefficients kept.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lamina.platform.optimizers.islands.method import AXIS, Exchange, Whole, check_number

_INDEX_BYTES = 2
_LARGEST_CHUNK = 256
"""Tiles of 256 x 256 have as many places as a 16-bit index tells apart."""


class Tiling(NamedTuple):
    """How a parameter is cut into tiles: its last two dimensions, each in equal parts.

    Attributes:
        leading: product of the dimensions before these.
        rows: parts and size of a part of the last dimension but one (1 x 1 of a vector).
        columns: likewise of the last.
    """

    leading: int
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def tiles(self) -> int:
        """T."""
        return self.leading * self.rows[0] * self.columns[0]

    @property
    def size(self) -> int:
        """N."""
        return self.rows[1] * self.columns[1]


def tiling(shape: tuple[int, ...], chunk: int) -> Tiling:
    """Returns the tiles of a parameter: the largest divisors of its dimensions up to `chunk`."""
    *leading, rows, columns = (1, 1, *shape)
    cut = lambda size: next((size // c, c) for c in range(min(chunk, size), 0, -1) if size % c == 0)
    return Tiling(math.prod(leading), cut(rows), cut(columns))


def cosines(size: int) -> np.ndarray:
    """Returns the orthonormal DCT-II of length n as a matrix [n, n]: coefficients = matrix @ x."""
    k, i = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    basis = np.cos(np.pi * (2 * i + 1) * k / (2 * size)) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


def to_frequencies(x: jax.Array, cut: Tiling) -> jax.Array:
    """Returns the DCT coefficients of a parameter's tiles, [T, N]."""
    (r, rows), (c, columns) = cut.rows, cut.columns
    tiles = x.reshape(cut.leading, r, rows, c, columns)
    over_rows, over_columns = (jnp.asarray(cosines(n), x.dtype) for n in (rows, columns))
    found = jnp.einsum("lrxcy,ux,vy->lrcuv", tiles, over_rows, over_columns)
    return found.reshape(cut.tiles, cut.size)


def from_frequencies(coefficients: jax.Array, cut: Tiling, shape: tuple[int, ...]) -> jax.Array:
    """Returns the parameter of which `to_frequencies` gave the coefficients [T, N]."""
    (r, rows), (c, columns) = cut.rows, cut.columns
    tiles = coefficients.reshape(cut.leading, r, c, rows, columns)
    over_rows, over_columns = (jnp.asarray(cosines(n), tiles.dtype) for n in (rows, columns))
    return jnp.einsum("lrcuv,ux,vy->lrxcy", tiles, over_rows, over_columns).reshape(shape)


def strongest(coefficients: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns values [T, K] and indices uint16 [T, K] of the largest coefficients of each tile."""
    _, index = jax.lax.top_k(jnp.abs(coefficients), k)
    return jnp.take_along_axis(coefficients, index, axis=1), index.astype(jnp.uint16)


def placed(values: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """Returns coefficients [T, N], 0 but for `values` at `index` (both [T, K])."""
    zero = jnp.zeros((values.shape[0], size), values.dtype)
    return jax.vmap(lambda row, i, v: row.at[i].set(v))(zero, index.astype(jnp.int32), values)


def mean_of_senders(values: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """Returns coefficients [T, N]: at each place the mean over the islands that sent it.

    Args:
        values: [I, T, K].
        index: uint16 [I, T, K].
        size: N.
    """

    def tile(values, index):  # [I, K]
        index, zero = index.astype(jnp.int32).ravel(), jnp.zeros(size, values.dtype)
        total = zero.at[index].add(values.ravel())
        return total / jnp.maximum(zero.at[index].add(1), 1)

    return jax.vmap(tile, in_axes=1)(values, index)


def extract(x: jax.Array, cut: Tiling, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (what stays, values, indices) of a momentum of which the strongest are sent."""
    values, index = strongest(to_frequencies(x, cut), k)
    sent = from_frequencies(placed(values, index, cut.size), cut, x.shape)
    return x - sent, values, index


def demo(
    whole: Whole, *, number: int, beta: float = 0.999, topk: int = 32, chunk: int = 64
) -> Exchange:
    """DeMo: decoupled momentum, of which the fast components are exchanged at every step.

    Each island i has a momentum of its own. At every step, with `top` the `topk` largest
    coefficients of the orthonormal DCT-II of each tile of a parameter:
    `m_i <- beta m_i + g_i`, `q_i = IDCT(top(DCT(m_i)))`, `m_i <- m_i - q_i`. What the optimizer
    (`config.optimizer`) is given in place of a gradient is `Q = IDCT(mean_i top(DCT(m_i)))`, where
    at each place the mean is over the islands that sent it.

    With `sgd` this is the paper's algorithm; with `sign_sgd` the variant with signs, which the
    authors' code always takes, and with `lion` at b1 = 0 the same with weight decay. The authors'
    code adds the gradient times the learning rate to the momentum, which is the same (but for the
    scale that `sgd` sees) as long as the rate is constant. It knows vectors and matrices; here the
    last two dimensions of an array are cut into tiles, whatever stands before them.

    Args:
        whole: sends an array to all islands.
        number: of islands; they divide the batch.
        beta: decay of the momentum (default: the paper's, as all below).
        topk: coefficients that are sent of each tile, six bytes each.
        chunk: largest edge of a tile; each dimension is cut by its largest divisor up to that.

    Raises:
        ValueError: a value is out of range.

    References:
        Peng, Quesnelle, Kingma 2024, DeMo: Decoupled Momentum Optimization,
        https://arxiv.org/abs/2411.19870
    """
    check_number(number)
    if not 0 <= beta < 1:
        raise ValueError(f"beta = {beta} should lie in [0, 1)")
    if topk < 1 or not 1 <= chunk <= _LARGEST_CHUNK:
        raise ValueError(
            f"topk = {topk} should be at least 1, and chunk = {chunk} lie between 1 and "
            f"{_LARGEST_CHUNK}"
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params

        def one(gradient: jax.Array, momentum: jax.Array) -> tuple[jax.Array, jax.Array]:
            cut = tiling(gradient.shape, chunk)
            kept, *sent = extract(beta * momentum + gradient, cut, min(topk, cut.size))
            values, index = (whole(jax.lax.all_gather(part, AXIS)) for part in sent)
            mean = mean_of_senders(values, index, cut.size)
            return from_frequencies(mean, cut, gradient.shape), kept

        pairs = jax.tree.map(one, updates, state)
        return jax.tree.transpose(jax.tree.structure(updates), jax.tree.structure((0, 0)), pairs)

    def sent(params: Any) -> int:
        cuts = [tiling(leaf.shape, chunk) for leaf in jax.tree.leaves(params)]
        return sum(cut.tiles * min(topk, cut.size) * (4 + _INDEX_BYTES) for cut in cuts)

    init = lambda params: jax.tree.map(jnp.zeros_like, params)
    return Exchange(number, optax.GradientTransformation(init, update), sent)
