"""Muon: momentum, orthogonalised, for matrices; AdamW for everything else."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lamina.models.axes import CLASSES, POSITION, VOCAB
from lamina.platform.optimizers.matrices import Axes, path_names, view

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration (reference 1 of `muon`): fast growth of small singular values, and an
end between about 0.7 and 1.2 in place of exactly 1."""

NOT_HIDDEN = frozenset({VOCAB, CLASSES, POSITION})
"""Parameters with one of these logical axes are embeddings and heads: no hidden matrices."""


class MuonState(NamedTuple):
    """State of `scale_by_muon`.

    Attributes:
        momentum: decaying sum of the gradients.
    """

    momentum: Any


def orthogonalised(matrix: jax.Array, steps: int = 5, eps: float = 1e-7) -> jax.Array:
    """Returns about U V^T of the matrix U S V^T, by the Newton-Schulz iteration.

    Args:
        matrix: [rows, columns].
        steps: of the iteration; a plain number.
        eps: added to the norm that the matrix is divided by first.
    """
    a, b, c = COEFFICIENTS
    product = lambda x, y: jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (jnp.linalg.norm(x) + eps)
    for _ in range(steps):
        gram = product(x, x.T)
        x = a * x + product(b * gram + c * product(gram, gram), x)
    return x.T if tall else x


def scale_by_muon(
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    scale: Literal["spectral", "rms"] = "spectral",
    axes: Axes | None = None,
) -> optax.GradientTransformation:
    """Returns the direction of Muon for parameters that are all matrices; see `muon`."""

    def init(params):
        return MuonState(optax.tree.zeros_like(params))

    def update(updates, state, params=None):
        del params
        buffer = jax.tree.map(lambda b, g: momentum * b + g, state.momentum, updates)
        ahead = jax.tree.map(lambda b, g: g + momentum * b, buffer, updates) if nesterov else buffer

        def direction(name, g):
            seen = view(name, g.shape, axes)
            if seen is None:
                raise ValueError(f"{name} of shape {g.shape} is no matrix")
            matrix = seen.matrix(g.astype(jnp.promote_types(g.dtype, jnp.float32)))
            whole = seen.lift(lambda m: orthogonalised(m, ns_steps))(matrix)
            if scale == "spectral":
                factor = max(1.0, seen.columns / seen.rows) ** 0.5
            else:
                factor = 0.2 * max(seen.rows, seen.columns) ** 0.5
            return (factor * whole).reshape(g.shape).astype(g.dtype)

        return jax.tree.map(direction, path_names(ahead), ahead), MuonState(buffer)

    return optax.GradientTransformation(init, update)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    axes: Axes | None = None,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    weight_decay: float = 0.0,
    scale: Literal["spectral", "rms"] = "spectral",
    adam_factor: float = 1.0,
    adam_b1: float = 0.9,
    adam_b2: float = 0.95,
    adam_eps: float = 1e-8,
    adam_weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Muon for hidden matrices, AdamW for vectors, embeddings and heads.

    `B <- mu B + G`, `theta <- theta - a (f orthogonalised(G + mu B) + wd theta)`, where the
    orthogonalised matrix has about the same singular vectors and singular values near 1. f is
    `sqrt(max(1, columns / rows))` ("spectral", columns being outputs; reference 1) or
    `0.2 sqrt(max(rows, columns))` ("rms": updates of the size of AdamW's, so that both can share a
    learning rate; reference 2).

    Attention kernels and convolutions are seen as matrices by their logical axes, and layers that
    are stacked for a scan one by one. Parameters with an axis `vocab`, `classes` or `position` are
    AdamW's. Without `axes`, everything of two or more dimensions is Muon's.
    optax.contrib.muon corrects the bias of the momentum, and so differs from the second step on.
    The iteration is in float32, the authors' in bfloat16.

    Args:
        learning_rate: the step size (reference 1: 0.02; with "rms": that of AdamW).
        axes: path to logical axes of the parameters.
        momentum: mu (default: reference 1's, as all below).
        nesterov: whether the direction looks ahead; otherwise B itself is orthogonalised.
        ns_steps: steps of the Newton-Schulz iteration.
        weight_decay: decoupled weight decay of the matrices, times the learning rate.
        scale: how f depends on the shape.
        adam_factor: learning rate of AdamW as a factor of Muon's.
        adam_b1: of AdamW.
        adam_b2: of AdamW.
        adam_eps: of AdamW.
        adam_weight_decay: of AdamW.

    Raises:
        ValueError: `scale` is neither.

    References:
        1. Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024,
           https://kellerjordan.github.io/posts/muon/
        2. Liu et al., Muon is Scalable for LLM Training, https://arxiv.org/abs/2502.16982
    """
    if scale not in ("spectral", "rms"):
        raise ValueError(f"scale = {scale!r} should be 'spectral' or 'rms'")

    def labels(params):
        def label(name, leaf):
            hidden = not NOT_HIDDEN.intersection((axes or {}).get(name) or ())
            return "muon" if hidden and leaf.size and view(name, leaf.shape, axes) else "adamw"

        return jax.tree.map(label, path_names(params), params)

    hidden = optax.chain(
        scale_by_muon(momentum, nesterov, ns_steps, scale, axes),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    rest = optax.chain(
        optax.scale_by_adam(adam_b1, adam_b2, adam_eps),
        optax.add_decayed_weights(adam_weight_decay),
        optax.scale(adam_factor),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax.partition({"muon": hidden, "adamw": rest}, labels)
