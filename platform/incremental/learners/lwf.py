"""Learning without forgetting: the model of the last experience teaches the new one."""

from typing import Any

import jax
import jax.numpy as jnp

from lamina.platform.incremental import checks
from lamina.platform.training.learners import STREAM, Learner, Mixed, Moment, Own, Setup


def lwf(*, alpha: float = 1.0, temperature: float = 2.0) -> Learner:
    """Distils the old model: `loss + alpha T^2 mean_x(-sum_c p_T,old(c) log p_T(c))`.

    Li and Hoiem (2016, arXiv 1606.09282), on one head. The soft-maxes at temperature T are over the
    classes seen in earlier experiences, both of them; in the first experience there is nothing to
    distil. The old model answers in evaluation mode.

    Args:
        alpha: weight of the distillation. Default 1.0: that of FACIL and Avalanche.
        temperature: T. Default 2.0: the paper's.

    Raises:
        UserError: alpha is negative, or the temperature not positive.
    """
    checks.within(0, alpha=alpha)
    checks.positive(temperature=temperature)

    def init(setup: Setup) -> Own:
        return {
            "teacher": jax.tree.map(jnp.copy, setup.params),
            "old": jnp.zeros(setup.space.classes, bool),
        }

    def loss(loss, own: Own, params: Any, mixed: Mixed, output: Any, moment: Moment, forward: Any):
        del params, moment
        rows = mixed.of(STREAM)
        teacher = forward(own["teacher"], rows).logits
        student = output.logits[mixed.groups[STREAM]]
        hot = own["temperature"]
        losses_B = distillation(teacher, student, own["old"], hot)
        weights_B = rows["weights"]
        mean = jnp.sum(losses_B * weights_B) / jnp.maximum(jnp.sum(weights_B), 1.0)
        return loss + own["alpha"] * hot**2 * mean

    def end(own: Own, state: Any, moment: Moment) -> tuple[Own, Any]:
        return own | {"teacher": state.params, "old": moment.seen}, state

    return Learner(
        init=init,
        loss=loss,
        end=end,
        hyper={"alpha": alpha, "temperature": temperature},
        needs=frozenset({"boundaries", "classes"}),
    )


def distillation(
    teacher: jax.Array, student: jax.Array, classes: jax.Array, temperature: jax.Array
) -> jax.Array:
    """Returns the cross-entropy of two soft-maxes over some of the classes, float32 [B].

    Args:
        teacher: logits [B, C]; nothing is differentiated through them.
        student: logits [B, C].
        classes: bool [C]; where none is True, the result is 0.
        temperature: of both.
    """
    there = classes[None, :]
    masked = lambda logits: jnp.where(there, logits / temperature, -1e9)
    target = jax.nn.softmax(masked(jax.lax.stop_gradient(teacher)))
    entropy = -jnp.where(there, target * jax.nn.log_softmax(masked(student)), 0.0).sum(-1)
    return jnp.where(jnp.any(classes), entropy, 0.0)
