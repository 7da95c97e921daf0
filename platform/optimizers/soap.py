"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lamina.platform.linear_algebra import one_by_one
from lamina.platform.optimizers.matrices import Axes, path_names, view


class SOAPState(NamedTuple):
    """State of `scale_by_soap`; each tree has the parameters' structure.

    Attributes:
        step: int32 []: gradients seen; the first only initialises the bases.
        mu: average of the gradients, in the original space.
        nu: average of the squared gradients, in the eigenbases, in the parameters' shapes.
        left: average of G G^T, [*stack, rows, rows], at least float32, as the bases are; empty
            where there is no basis.
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


class _Own(NamedTuple):
    """The part of the state that one parameter, or one matrix of a stack, has; see `SOAPState`."""

    mu: Any
    nu: Any
    left: Any
    right: Any
    left_basis: Any
    right_basis: Any


class _Constants(NamedTuple):
    """Keys of `soap` that a step of one matrix needs; see there."""

    b1: Any
    b2: Any
    eps: Any
    shampoo_beta: Any
    precondition_every: Any


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
    constants = _Constants(b1, b2, eps, shampoo_beta, precondition_every)

    def side(columns: bool):
        """Returns the empty average, or basis, of the rows or the columns of each parameter."""

        def empty(name, param):
            seen = view(name, param.shape, axes)
            if seen is None:
                return jnp.zeros((0, 0), _accurate(param))
            size = seen.columns if columns else seen.rows
            size = size if size <= max_dim else 0
            return jnp.zeros((*seen.stack, size, size), _accurate(param))

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

        def of_leaf(name, gradient, own):
            seen = view(name, gradient.shape, axes)
            shaped = (gradient, own.mu, own.nu)
            g, mu, nu = (a.astype(_accurate(a)) for a in shaped)
            if seen is None:
                direction, new = _step(constants, taken, g, own._replace(mu=mu, nu=nu))
            else:
                own = own._replace(mu=seen.matrix(mu), nu=seen.matrix(nu))
                lifted = seen.lift(lambda g, own: _step(constants, taken, g, own))
                direction, new = lifted(seen.matrix(g), own)
            as_before = lambda new, old: new.reshape(old.shape).astype(old.dtype)
            direction, mu, nu = map(as_before, (direction, new.mu, new.nu), shaped)
            return direction, new._replace(mu=mu, nu=nu)

        tree = jax.tree.structure(updates)
        columns = map(tree.flatten_up_to, (path_names(updates), updates, *state[1:]))
        found = [of_leaf(name, g, _Own(*own)) for name, g, *own in zip(*columns, strict=True)]
        trees = [tree.unflatten([own[i] for _, own in found]) for i in range(len(_Own._fields))]
        decay = jnp.where(taken > 0, weight_decay, 0.0)
        directions = jax.tree.map(
            lambda d, p: (d + decay * p).astype(p.dtype),
            tree.unflatten([direction for direction, _ in found]),
            params,
        )
        return directions, SOAPState(state.step + 1, *trees)

    return optax.GradientTransformation(init, update)


def _accurate(array: Any) -> Any:
    """Returns the type to calculate in: that of the array, or float32 if it is a shorter one."""
    return jnp.promote_types(array.dtype, jnp.float32)


def _step(c: _Constants, taken: jax.Array, g: jax.Array, own: _Own) -> tuple[jax.Array, _Own]:
    """Returns the direction of a matrix or vector, and its part of the state.

    Args:
        c: the keys.
        taken: int32 []: steps taken with this one; at 0 the direction is 0.
        g: its gradient.
        own: its part of the state; an empty side or basis is none.
    """
    count = jnp.maximum(taken, 1)
    correction = jnp.sqrt(1 - c.b2**count) / (1 - c.b1**count)
    # Both averages take the same rotated array of what is new: where a gradient comes again its
    # entries beside the diagonal are rounding errors, and a quotient of two of them has no bound.
    new = _rotate(g, own.left_basis, own.right_basis)
    before = _rotate(own.mu, own.left_basis, own.right_basis)
    mu = c.b1 * own.mu + (1 - c.b1) * g
    nu = c.b2 * own.nu + (1 - c.b2) * new**2
    rotated = (c.b1 * before + (1 - c.b1) * new) / (jnp.sqrt(nu) + c.eps)
    direction = correction * _rotate_back(rotated, own.left_basis, own.right_basis)
    mu, nu, direction = jax.tree.map(
        lambda new, old: jnp.where(taken > 0, new, old).astype(g.dtype),
        (mu, nu, direction),
        (own.mu, own.nu, jnp.zeros_like(g)),
    )
    own = own._replace(mu=mu, nu=nu)
    average = lambda side, new: c.shampoo_beta * side + (1 - c.shampoo_beta) * new
    if own.left.size:
        own = own._replace(left=average(own.left, _product(g, g.T)))
    if own.right.size:
        own = own._replace(right=average(own.right, _product(g.T, g)))
    if own.left.size or own.right.size:
        turns = jnp.where(taken % c.precondition_every, _KEEP, _TURN)
        action = jnp.where(taken == 0, _NEW, turns)
        own = jax.lax.switch(action, (_new_bases, _turned_bases, lambda own: own), own)
    return direction, own


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


def _new_bases(own: _Own) -> _Own:
    """Returns the state with the eigenvectors, by falling eigenvalue."""
    eigenvectors = lambda matrix: one_by_one(jnp.linalg.eigh)(matrix)[1][:, ::-1]
    if own.left.size:
        own = own._replace(left_basis=eigenvectors(own.left))
    if own.right.size:
        own = own._replace(right_basis=eigenvectors(own.right))
    return own


def _turned_bases(own: _Own) -> _Own:
    """Sorts the bases by their eigenvalues, as they are estimated now, and turns them.

    They make one step of the power iteration, followed by a QR decomposition.
    """

    def turned(matrix, basis):
        estimates = jnp.sum(basis * _product(matrix, basis), axis=0)
        order = jnp.argsort(-estimates)
        return one_by_one(jnp.linalg.qr)(_product(matrix, basis[:, order]))[0], order

    if own.left.size:
        basis, order = turned(own.left, own.left_basis)
        own = own._replace(left_basis=basis, nu=own.nu[order])
    if own.right.size:
        basis, order = turned(own.right, own.right_basis)
        own = own._replace(right_basis=basis, nu=own.nu[:, order])
    return own


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
