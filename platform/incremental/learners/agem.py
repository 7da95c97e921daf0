"""Averaged gradient episodic memory: no step against the mean gradient of the past."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lamina.platform.incremental import checks
from lamina.platform.incremental import memory as memories
from lamina.platform.training.learners import Learner, Moment, Own


def agem(*, per_task: int = 100, sample: int = 128) -> Learner:
    """Projects the gradient: if `g . r < 0`, `g - (g . r / r . r) r`, r that of a draw of the past.

    Chaudhry et al. (2019, arXiv 1812.00420). The memory keeps equal numbers of each experience, and
    r is the gradient of the mean loss of rows of earlier experiences. In the first there are none,
    and the gradient stays.

    Args:
        per_task: rows that are kept of each experience.
        sample: rows drawn for r at each step, as far as there are so many.

    Raises:
        UserError: there are fewer than one.
    """
    checks.within(1, per_task=per_task, sample=sample)
    kept = memories.create(0, policy="task", past_only=True, per_task=per_task)

    def gradient(gradient: Any, own: Own, params: Any, of: Any, moment: Moment, memory: Own) -> Any:
        del own, params
        number = min(sample, len(memory["priority"]))
        rows, there = kept.draw(memory, number, moment)
        reference = of(rows | {"weights": there.astype(jnp.float32)})
        return projected(gradient, reference)

    return Learner(gradient=gradient, memory=kept, needs=frozenset({"boundaries"}))


def projected(gradient: Any, reference: Any) -> Any:
    """Returns the gradient without its part against `reference`."""
    along = jnp.asarray(optax.tree.vdot(gradient, reference))
    square = jnp.asarray(optax.tree.vdot(reference, reference))
    factor = jnp.where(along < 0, along / jnp.where(square > 0, square, 1.0), 0.0)
    return jax.tree.map(lambda g, r: g - factor * r, gradient, reference)
