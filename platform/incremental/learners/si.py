"""Synaptic intelligence: importance from each parameter's share in the fall of the loss."""

from typing import Any

import jax
import jax.numpy as jnp

from lamina.platform.errors import UserError
from lamina.platform.incremental import checks
from lamina.platform.incremental.learners import penalty
from lamina.platform.training.learners import Learner, Mixed, Moment, Own, Setup


def si(*, strength: float = 0.1, damping: float = 0.1, clamp: tuple[float, ...] = ()) -> Learner:
    """Adds `strength sum_i Omega_i (th_i - th*_i)^2`.

    Zenke et al. (2017, arXiv 1703.04200). Along the way `w_i -= g_i dth_i`; at the end of an
    experience `Omega_i += w_i / ((th_i - th_start,i)^2 + damping)`, where g is the gradient of the
    task's loss without the penalty. Omega isn't clamped and may be negative, as in the paper.
    Avalanche differs: its factor is c / 2, its xi 1e-7, its g has the gradient of the penalty in
    it, and its Omega is clipped above at 1e-3, which is `clamp=(-1e30, 1e-3)`.

    Args:
        strength: c. Default 0.1: the paper's for permuted MNIST.
        damping: xi. Default 0.1: the paper's.
        clamp: least and greatest Omega; (): any.

    Raises:
        UserError: the strength is negative, the damping not positive, or the clamp no two numbers
            in order.
    """
    checks.within(0, strength=strength)
    checks.positive(damping=damping)
    if clamp and (len(clamp) != 2 or clamp[0] > clamp[1]):
        raise UserError(f"learner.clamp = {clamp} should be (least, greatest), or ()")
    clamped = lambda omega: jnp.clip(omega, *clamp) if clamp else omega

    def init(setup: Setup) -> Own:
        none = penalty.zeros(setup.params)
        start = jax.tree.map(jnp.copy, setup.params)
        return {"path": none, "importance": none, "anchor": start}

    def loss(loss, own: Own, params: Any, mixed: Mixed, output: Any, moment: Moment, forward: Any):
        del mixed, output, moment, forward
        return loss + own["strength"] * penalty.quadratic(own["importance"], own["anchor"], params)

    def after(own: Own, before: Any, after: Any, gradient: Any, *rest: Any):
        del rest
        # The penalty's own gradient is known: taking it off leaves that of the rest of the loss.
        path = jax.tree.map(
            lambda w, g, f, m, old, new: (
                w - (g - 2 * own["strength"] * f * (old - m)) * (new - old)
            ),
            own["path"],
            gradient,
            own["importance"],
            own["anchor"],
            before.params,
            after.params,
        )
        return own | {"path": path}, after

    def end(own: Own, state: Any, moment: Moment) -> tuple[Own, Any]:
        del moment
        importance = jax.tree.map(
            lambda f, w, p, m: clamped(f + w / ((p - m) ** 2 + own["damping"])),
            own["importance"],
            own["path"],
            state.params,
            own["anchor"],
        )
        done = {
            "importance": importance,
            "anchor": state.params,
            "path": penalty.zeros(own["path"]),
        }
        return own | done, state

    hyper = {"strength": strength, "damping": damping}
    needs = frozenset({"boundaries"})
    return Learner(init=init, loss=loss, after=after, end=end, hyper=hyper, needs=needs)
