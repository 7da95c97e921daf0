"""Optimizers that optax has in another form than the training step calls: adapted here.

Every factory takes `learning_rate` (a number, or a function count -> number) first, and its config
keys by keyword. The update functions take `(grads, state, params, *, value, grad, value_fn, ...)`.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib


def lbfgs(
    learning_rate: optax.ScalarOrSchedule,
    *,
    memory_size: int = 10,
    scale_init_precond: bool = True,
    line_search: Literal["zoom", "backtracking", "none"] = "zoom",
) -> optax.GradientTransformationExtraArgs:
    """Limited-memory BFGS, for small problems and full batches.

    The line search evaluates the loss of the current batch (`value_fn`) at several points. It
    starts from the full step times `learning_rate`, so 1.0 is the natural learning rate. Without
    it, a step is `learning_rate` times the quasi-Newton direction; on mini-batches that diverges
    easily.

    Args:
        learning_rate: factor of the direction before the line search.
        memory_size: pairs of differences kept (default: optax's).
        scale_init_precond: scale the first direction to the gradient's norm.
        line_search: "zoom" (strong Wolfe conditions, at most 20 evaluations; default: optax's),
            "backtracking" (Armijo, at most 20) or "none".

    Raises:
        ValueError: there is no such line search.

    References:
        Nocedal and Wright, Numerical Optimization, 1999, algorithm 7.5
    """
    searches = {
        "zoom": optax.scale_by_zoom_linesearch(20, initial_guess_strategy="one"),
        "backtracking": optax.scale_by_backtracking_linesearch(20),
        "none": None,
    }
    if line_search not in searches:
        raise ValueError(f"line_search = {line_search!r} should be one of {', '.join(searches)}")
    search = _describable(searches[line_search]) if searches[line_search] else None
    inner = optax.lbfgs(learning_rate, memory_size, scale_init_precond, search)

    def update(updates, state, params=None, *, value=None, grad=None, value_fn=None, **unused):
        del unused  # the line search would hand them on to value_fn
        return inner.update(updates, state, params, value=value, grad=grad, value_fn=value_fn)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _describable(search: Any) -> optax.GradientTransformationExtraArgs:
    """Returns optax's line search with a state that `optax.tree_utils.tree_map_params` knows.

    That asks for the state of parameters without any array, for which optax looks in vain.
    """

    def init(params):
        if jax.tree.leaves(params):
            return search.init(params)
        state = search.init(jnp.zeros(()))
        return state if state.grad is None else state._replace(grad=params)

    return optax.GradientTransformationExtraArgs(init, search.update)


def noisy_sgd(
    learning_rate: optax.ScalarOrSchedule, *, eta: float = 0.01, gamma: float = 0.55, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """SGD with Gaussian noise of variance `eta / (1 + t)^gamma` added to the gradient.

    Args:
        learning_rate: the step size.
        eta: variance of the noise at the first step (default: the paper's).
        gamma: how fast the variance falls (default: the paper's).
        seed: of the noise. Runs of several seeds share it: they see the same noise.

    References:
        Neelakantan et al., Adding Gradient Noise Improves Learning for Very Deep Networks,
        https://arxiv.org/abs/1511.06807
    """
    return optax.noisy_sgd(learning_rate, eta=eta, gamma=gamma, key=seed)


def polyak_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    max_step: float = 1.0,
    f_min: float = 0.0,
    eps: float = 0.0,
    variant: Literal["sps", "sps+"] = "sps",
) -> optax.GradientTransformationExtraArgs:
    """SGD with the stochastic Polyak step size.

    `x <- x - learning_rate * min((f(x) - f_min) / (|g|^2 + eps), max_step) * g`.
    optax.polyak_sgd scales the gradient before the step size is computed from it, so that a smaller
    scaling there makes larger steps; here the step size is scaled. Both agree at 1.0.

    Args:
        learning_rate: factor of the Polyak step (1.0 is the method as published).
        max_step: largest Polyak step (default: optax's).
        f_min: the smallest possible loss.
        eps: added to the squared norm of the gradient.
        variant: "sps+" uses the positive part of `f(x) - f_min`.

    References:
        Loizou et al., Stochastic Polyak Step-size for SGD, https://arxiv.org/abs/2002.10542
    """
    return optax.chain(
        optax.scale_by_polyak(f_min, max_step, eps, variant),
        optax.scale_by_learning_rate(learning_rate),
    )


def sm3(
    learning_rate: optax.ScalarOrSchedule, *, momentum: float = 0.9
) -> optax.GradientTransformationExtraArgs:
    """SM3: AdaGrad with one accumulator per row and column; optax.sm3 with schedules and scalars.

    Args:
        learning_rate: the step size.
        momentum: decay of the average of the preconditioned gradients (default: the paper's).

    References:
        Anil et al., Memory-Efficient Adaptive Optimization, https://arxiv.org/abs/1901.11150
    """
    return optax.chain(_scale_by_sm3(momentum), optax.scale_by_learning_rate(learning_rate))


def _scale_by_sm3(momentum: Any) -> optax.GradientTransformation:
    """Returns optax's, whose state has one vector for each parameter in place of a list of them.

    So the state is a tree like the parameters, which can be split over devices with them.
    """
    inner = optax.scale_by_sm3(momentum)

    def as_vectors(tree):
        return jax.tree.map(lambda x: x if x.ndim else x[None], tree)

    def packed(like, state):
        join = lambda _, parts: jnp.concatenate(parts)
        return state._replace(mu=jax.tree.map(join, like, state.mu))

    def unpacked(like, state):
        cut = lambda x, vector: jnp.split(vector, np.cumsum(x.shape)[:-1])
        return state._replace(mu=jax.tree.map(cut, like, state.mu))

    def init(params):
        params = as_vectors(params)
        return packed(params, inner.init(params))

    def update(updates, state, params=None):
        del params
        vectors = as_vectors(updates)
        found, state = inner.update(vectors, unpacked(vectors, state))
        found = jax.tree.map(lambda new, old: new.reshape(old.shape), found, updates)
        return found, packed(vectors, state)

    return optax.GradientTransformation(init, update)


@functools.wraps(contrib.sophia)
def sophia(learning_rate, **options) -> optax.GradientTransformationExtraArgs:
    """Sophia-H; the step's `value_fn` is the function whose Hessian it estimates.

    The estimate's random vectors come from a fixed key: runs of several seeds share them.
    """
    inner = contrib.sophia(learning_rate, **options)

    def update(updates, state, params=None, *, value_fn=None, **unused):
        del unused  # sophia would hand them on to the Hessian estimate
        return inner.update(updates, state, params, obj_fn=value_fn)

    return optax.GradientTransformationExtraArgs(inner.init, update)
