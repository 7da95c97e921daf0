"""AdEMAMix: AdamW with a second, slow average of the gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class AdEMAMixState(NamedTuple):
    """State of `scale_by_ademamix`.

    Attributes:
        step: int32 []: updates done.
        fast: average of the gradients over about 1 / (1 - b1) steps.
        slow: the same over up to 1 / (1 - b3) steps.
        nu: average of the squared gradients.
    """

    step: jax.Array
    fast: Any
    slow: Any
    nu: Any


def scale_by_ademamix(
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    alpha: float = 5.0,
    eps: float = 1e-8,
    warmup_steps: int = 0,
) -> optax.GradientTransformation:
    """Returns the direction of AdEMAMix; see `ademamix`."""

    def init(params):
        zeros = optax.tree.zeros_like
        return AdEMAMixState(jnp.zeros((), jnp.int32), zeros(params), zeros(params), zeros(params))

    def update(updates, state, params=None):
        del params
        count = state.step + 1
        share = jnp.minimum(count / jnp.maximum(warmup_steps, 1.0), 1.0)
        share = jnp.where(jnp.asarray(warmup_steps) > 0, share, 1.0)
        # 1 - b3 is small: taken as such, it keeps its digits, which 1 - exp(...) would not.
        log_b1, log_b3 = jnp.log(jnp.maximum(b1, 1e-8)), jnp.log1p(-(1 - b3))
        memory = -jnp.expm1(log_b1 * log_b3 / ((1 - share) * log_b3 + share * log_b1))
        new_share = jnp.where(share < 1, jnp.maximum(memory, 1 - b3), 1 - b3)
        fast = optax.tree.update_moment(updates, state.fast, b1, 1)
        slow = jax.tree.map(
            lambda s, g: s + (new_share * (g - s)).astype(s.dtype), state.slow, updates
        )
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        unbiased = optax.tree.bias_correction(fast, b1, count)
        scale = optax.tree.bias_correction(nu, b2, count)
        direction = jax.tree.map(
            lambda m, s, v: ((m + alpha * share * s) / (jnp.sqrt(v) + eps)).astype(m.dtype),
            unbiased,
            slow,
            scale,
        )
        return direction, AdEMAMixState(count, fast, slow, nu)

    return optax.GradientTransformation(init, update)


def ademamix(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    alpha: float = 5.0,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
) -> optax.GradientTransformation:
    """AdEMAMix: AdamW with a second, slow average of the gradients.

    `theta <- theta - a ((m1 / (1 - b1^t) + alpha_t m2) / (sqrt(v / (1 - b2^t)) + eps) + wd theta)`
    with `m2` an average of the gradients with decay `b3_t`, without bias correction. With
    `T = warmup_steps > 0` it is brought in gradually, at step t = 1, 2, ...:
    `alpha_t = min(t alpha / T, alpha)` and
    `b3_t = min(exp(ln b1 ln b3 / ((1 - t/T) ln b3 + (t/T) ln b1)), b3)`.
    optax.contrib.ademamix hands schedules a count from 0; here they get t from 1, as in the paper.

    Args:
        learning_rate: the step size.
        b1: decay of the fast average of the gradients (default: the paper's, as all below).
        b2: decay of the average of the squared gradients.
        b3: final decay of the slow average of the gradients.
        alpha: final weight of the slow average; optax's default, the paper uses 4 to 10.
        eps: added to the denominator.
        weight_decay: decoupled weight decay, times the learning rate.
        warmup_steps: T; 0 uses `alpha` and `b3` from the start. The paper uses the run's steps.

    References:
        Pagliardini et al., The AdEMAMix Optimizer, https://arxiv.org/abs/2409.03137
    """
    return optax.chain(
        scale_by_ademamix(b1, b2, b3, alpha, eps, warmup_steps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
