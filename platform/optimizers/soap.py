"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lamina.platform.optimizers.matrices import Axes, path_names, view


class SOAPState(NamedTuple):
    """State of `scale_by_soap`; each tree has the parameters' structure.

    Attributes:
        step: int32 []: gradients seen; the first only initialises the bases.
        mu: average of the gradients, in the original space.
        nu: average of the squared gradients, in the eigenbases, in the parameters' shapes.
        left: average of G G^T, [*stack, rows, rows]; empty where there is no basis.
        right: average of G^T G, [*stack, columns, columns]; likewise.
        left_basis: its eigenvectors as columns, by falling eigenvalue.
        right_basis: likewise.
    """

    step: jax.Array
    mu: Any
    nu: Any
    left: Any
    right: Any
    left_basis: Any
    right_basis: Any


class _Leaf(NamedTuple):
    """What an update makes of one parameter: its direction, and its part of the state."""

    direction: Any
    mu: Any
    nu: Any
    left: Any
    right: Any
    left_basis: Any
    right_basis: Any


def scale_by_soap(
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    shampoo_beta: float = 0.95,
    precondition_every: int = 10,
    max_dim: int = 10000,
    weight_decay: float = 0.0,
    axes: Axes | None = None,
) -> optax.GradientTransformation:
    """Returns the direction of SOAP, weight decay included; see `soap`."""

    def side(columns: bool):
        """Returns the empty average, or basis, of the rows or the columns of each parameter."""

        def empty(name, param):
            seen = view(name, param.shape, axes)
            if seen is None:
                return jnp.zeros((0, 0), param.dtype)
            size = seen.columns if columns else seen.rows
            size = size if size <= max_dim else 0
            return jnp.zeros((*seen.stack, size, size), param.dtype)

        return empty

    def init(params):
        names, zeros = path_names(params), optax.tree.zeros_like
        rows, columns = side(columns=False), side(columns=True)
        return SOAPState(
            jnp.zeros((), jnp.int32),
            zeros(params),
            zeros(params),
            left=jax.tree.map(rows, names, params),
            right=jax.tree.map(columns, names, params),
            left_basis=jax.tree.map(rows, names, params),
            right_basis=jax.tree.map(columns, names, params),
        )

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("this optimizer needs the parameters: update(updates, state, params)")
        taken = state.step  # steps taken with this one: the first call takes none
        count = jnp.maximum(taken, 1)
        correction = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        basis_action = jnp.where(
            taken == 0, _NEW, jnp.where(taken % precondition_every, _KEEP, _TURN)
        )

        def of_matrix(g, mu, nu, left, right, left_basis, right_basis):
            """The state before is that of the last call, as all but `g` are."""
            new_mu = b1 * mu + (1 - b1) * g
            new_nu = b2 * nu + (1 - b2) * _rotate(g, left_basis, right_basis) ** 2
            rotated = _rotate(new_mu, left_basis, right_basis) / (jnp.sqrt(new_nu) + eps)
            direction = correction * _rotate_back(rotated, left_basis, right_basis)
            mu, nu, direction = jax.tree.map(
                lambda new, old: jnp.where(taken > 0, new, old).astype(g.dtype),
                (new_mu, new_nu, direction),
                (mu, nu, jnp.zeros_like(g)),
            )
            if left.size:
                left = shampoo_beta * left + (1 - shampoo_beta) * _product(g, g.T)
            if right.size:
                right = shampoo_beta * right + (1 - shampoo_beta) * _product(g.T, g)
            if left.size or right.size:
                nu, left_basis, right_basis = jax.lax.switch(
                    basis_action,
                    (_new_bases, _turned_bases, lambda nu, *rest: (nu, *rest[2:])),
                    *(nu, left, right, left_basis, right_basis),
                )
            return _Leaf(direction, mu, nu, left, right, left_basis, right_basis)

        def of_leaf(name, g, *rest):
            seen = view(name, g.shape, axes)
            if seen is None:
                return of_matrix(g, *rest)
            mu, nu, *sides = rest
            leaf = seen.lift(of_matrix)(*map(seen.matrix, (g, mu, nu)), *sides)
            shaped = {k: getattr(leaf, k).reshape(g.shape) for k in ("direction", "mu", "nu")}
            return leaf._replace(**shaped)

        leaves = jax.tree.map(of_leaf, path_names(updates), updates, *state[1:])
        outer, inner = jax.tree.structure(updates), jax.tree.structure(_Leaf(*range(7)))
        directions, *trees = jax.tree.transpose(outer, inner, leaves)
        decay = jnp.where(taken > 0, weight_decay, 0.0)
        directions = jax.tree.map(lambda d, p: (d + decay * p).astype(p.dtype), directions, params)
        return directions, SOAPState(state.step + 1, *trees)

    return optax.GradientTransformation(init, update)


_NEW, _TURN, _KEEP = range(3)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _rotate(g: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns `g` in the bases; an empty basis stands for the identity."""
    g = _product(left.T, g) if left.size else g
    return _product(g, right) if right.size else g


def _rotate_back(g: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    g = _product(left, g) if left.size else g
    return _product(g, right.T) if right.size else g


def _new_bases(nu, left, right, left_basis, right_basis):
    """Returns the eigenvectors, by falling eigenvalue."""
    eigenvectors = lambda matrix: jnp.linalg.eigh(matrix)[1][:, ::-1]
    left_basis = eigenvectors(left) if left.size else left_basis
    right_basis = eigenvectors(right) if right.size else right_basis
    return nu, left_basis, right_basis


def _turned_bases(nu, left, right, left_basis, right_basis):
    """Sorts the bases by their eigenvalues, as they are estimated now, and turns them.

    They make one step of the power iteration, followed by a QR decomposition.
    """

    def turned(matrix, basis):
        estimates = jnp.sum(basis * _product(matrix, basis), axis=0)
        order = jnp.argsort(-estimates)
        return jnp.linalg.qr(_product(matrix, basis[:, order]))[0], order

    if left.size:
        left_basis, order = turned(left, left_basis)
        nu = nu[order]
    if right.size:
        right_basis, order = turned(right, right_basis)
        nu = nu[:, order]
    return nu, left_basis, right_basis


def soap(
    learning_rate: optax.ScalarOrSchedule,
    axes: Axes | None = None,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    shampoo_beta: float = 0.95,
    precondition_every: int = 10,
    max_dim: int = 10000,
) -> optax.GradientTransformation:
    """SOAP: Adam in the eigenbasis of Shampoo's preconditioner.

    For a matrix with gradient G: `L <- beta L + (1 - beta) G G^T`, `R <- beta R + (1 - beta) G^T G`
    with eigenvectors `Q_L`, `Q_R`. Adam's second moment v is that of `Q_L^T G Q_R`, its first
    moment M is rotated likewise, and the step is
    `theta <- theta - a (c Q_L [Q_L^T M Q_R / (sqrt(v) + eps)] Q_R^T + wd theta)`,
    `c = sqrt(1 - b2^k) / (1 - b1^k)` at the k-th step. The first gradient only gives the bases: it
    makes no step. Every `precondition_every` steps the bases make one step of the power iteration.

    Attention kernels, convolutions and stacked layers are seen as matrices by their logical axes.
    Vectors get Adam with the same constants. L and R lie whole on every device.
    The weight decay is AdamW's, from the parameters before the step (the authors' code: after).
    A gradient whose rank is not full leaves a part of the basis arbitrary: implementations differ
    there, by the signs and the order that their eigensolvers happen to return.

    Args:
        learning_rate: the step size (the paper: 3e-3).
        axes: path to logical axes of the parameters.
        b1: decay of the average of the gradients (default: the paper's, as all below).
        b2: decay of the average of the squared, rotated gradients.
        eps: added to the denominator.
        weight_decay: decoupled weight decay, times the learning rate.
        shampoo_beta: decay of L and R.
        precondition_every: steps between two turns of the bases.
        max_dim: sides larger than this are not rotated.

    References:
        Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam,
        https://arxiv.org/abs/2409.11321
    """
    return optax.chain(
        scale_by_soap(b1, b2, eps, shampoo_beta, precondition_every, max_dim, weight_decay, axes),
        optax.scale_by_learning_rate(learning_rate),
    )
