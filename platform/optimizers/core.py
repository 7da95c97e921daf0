"""CoRe: the continual resilient optimizer, between Adam and Rprop, with optional plasticity."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lamina.platform.optimizers.rprop import adapted_sizes, check_bounds, first_rate


class CoReState(NamedTuple):
    """State of `core`.

    Attributes:
        step: int32 []: updates done.
        mu: average of the gradients.
        nu: average of the squared gradients.
        sizes: the step size of each weight.
        scores: the importance of each weight; None without a history.
    """

    step: jax.Array
    mu: Any
    nu: Any
    sizes: Any
    scores: Any


def plasticity(score: jax.Array, frozen: Any) -> jax.Array:
    """Returns 0 for the `int(frozen * size)` weights of the highest scores, else 1.

    Scores within 1e-6 of the lowest frozen one count as equal to it, as in the authors' code.
    """
    number = jnp.floor(jnp.asarray(frozen) * score.size + 1e-6).astype(jnp.int32)
    lowest = jnp.sort(score.ravel())[jnp.clip(score.size - number, 0, score.size - 1)]
    rests = (number > 0) & (score >= lowest - 1e-6 * jnp.abs(lowest))
    return jnp.where(rests, 0.0, 1.0).astype(score.dtype)


def core(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta1_a: float = 0.7375,
    beta1_b: float = 0.8125,
    beta1_c: float = 250.0,
    beta2: float = 0.99,
    eta_minus: float = 0.7375,
    eta_plus: float = 1.2,
    step_size_min: float = 1e-6,
    step_size_max: float = 1e-2,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    score_history: int = 0,
    frozen: float = 0.0,
) -> optax.GradientTransformation:
    """CoRe: Adam's direction, scaled by Rprop's step size of each weight.

    At step t = 1, 2, ..., `b1(t) = b1b + (b1a - b1b) exp(-((t - 1) / b1c)^2)`,
    `m' = b1(t) m + (1 - b1(t)) g`, `h = b2 h + (1 - b2) g^2`; the step size s grows by `eta_plus`
    where `m m' P > 0`, shrinks by `eta_minus` where it is negative, and stays within its bounds;
    `u = m' / (1 - b1(t)^t) / (sqrt(h / (1 - b2^t)) + eps)`;
    `theta <- theta - wd |P u s| theta - P u s`.

    Plasticity P is 1 unless `score_history` = n > 0: then a score `S <- S + m' u P s / n` grows,
    and from step n + 1 on P is 0 for the share `frozen` of each array with the highest scores, and
    S decays by 1 - 1 / n before it grows. The authors' code differs: S decays only where something
    is frozen, and a lowest frozen score that is negative does not freeze its own weight.

    Args:
        learning_rate: the first step size (the paper: 1e-3). The method adapts them itself: a
            schedule's later values have no effect, so use the schedule "constant".
        beta1_a: first decay of the average of the gradients (default: the paper's, as all below).
        beta1_b: its last decay.
        beta1_c: steps in which it changes.
        beta2: decay of the average of the squared gradients.
        eta_minus: factor of the step size after a change of sign.
        eta_plus: factor where the sign stays.
        step_size_min: smallest step size.
        step_size_max: largest: 1e-3 for mini-batches up to 1 for full batches.
        eps: added to the denominator.
        weight_decay: times the size of the update.
        score_history: n; 0 for no plasticity.
        frozen: share of each array that is frozen, in [0, 1).

    Raises:
        ValueError: the smallest step size exceeds the largest.

    References:
        Eilers, West and others, The Continual Resilient (CoRe) Optimizer,
        https://arxiv.org/abs/2307.15663
    """
    check_bounds(step_size_min, step_size_max)

    def init(params):
        zeros = optax.tree.zeros_like
        sizes = optax.tree.full_like(params, first_rate(learning_rate))
        scores = zeros(params) if score_history else None
        return CoReState(jnp.zeros((), jnp.int32), zeros(params), zeros(params), sizes, scores)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("this optimizer needs the parameters: update(updates, state, params)")
        step = state.step + 1
        b1 = beta1_b + (beta1_a - beta1_b) * jnp.exp(-(((step - 1) / beta1_c) ** 2))
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, beta2, 2)
        free = optax.tree.ones_like(updates)
        if score_history:
            frozen_now = jnp.where(step > score_history, frozen, 0.0)
            free = jax.tree.map(lambda s: plasticity(s, frozen_now), state.scores)
        sizes = jax.tree.map(
            lambda s, new, old, p: adapted_sizes(
                s, new * old * p, eta_minus, eta_plus, step_size_min, step_size_max
            ),
            state.sizes,
            mu,
            state.mu,
            free,
        )

        def step_of(m, h, s, p):
            scale = jnp.sqrt(h / (1 - beta2**step)) + eps
            return (p * s * (m / (1 - b1**step)) / scale).astype(m.dtype)

        steps = jax.tree.map(step_of, mu, nu, sizes, free)
        scores = state.scores
        if score_history:
            kept = jnp.where(step > score_history, 1 - 1 / score_history, 1.0)
            scores = jax.tree.map(
                lambda score, m, u: (kept * score + m * u / score_history).astype(score.dtype),
                scores,
                mu,
                steps,
            )
        moves = jax.tree.map(
            lambda u, p: (-u - weight_decay * jnp.abs(u) * p).astype(p.dtype), steps, params
        )
        return moves, CoReState(step, mu, nu, sizes, scores)

    return optax.GradientTransformation(init, update)
