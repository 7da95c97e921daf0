"""Elastic weight consolidation: parameters that mattered for old experiences are held."""

from typing import Any, Literal, cast

import jax
import jax.numpy as jnp

from lamina.platform.incremental import checks
from lamina.platform.incremental.learners import penalty
from lamina.platform.merging import fisher as information
from lamina.platform.training.learners import Learner, Mixed, Moment, Own, Setup, Sweep

NEEDS = frozenset({"boundaries", "classes"})


def ewc(
    *,
    strength: float = 100.0,
    fisher: Literal["sampled", "exact", "empirical", "predicted", "batch"] = "sampled",
    mode: Literal["separate", "online"] = "separate",
    decay: float = 1.0,
    batches: int = 8,
) -> Learner:
    """Adds `strength/2 sum_k sum_i F_k,i (th_i - th*_k,i)^2` over the earlier experiences k.

    Kirkpatrick et al. (2017, arXiv 1612.00796). F is the diagonal of the Fisher information at the
    end of an experience, `mean_x (d log p(y|x) / d th)^2`, with one gradient for each example.

    The separate penalties are kept as one: quadratics of importances F and F' about m and m' add up
    to F + F' about (F m + F' m') / (F + F'), and a constant. So the state is two copies of the
    parameters whatever the number of experiences, and value and gradient are those of the sum.

    Args:
        strength: lambda. Defaults in use go from 1e2 to 1e10: tune it.
        fisher: y is "sampled" from the model's prediction (the true Fisher, estimated with one
            sample: noisy where it rests on improbable classes), every class with its probability
            ("exact", C times the work; van de Ven 2025, arXiv 2502.11756), the label ("empirical"),
            or the most probable class ("predicted"). "batch" is Avalanche's: squares of the
            gradient of the mean loss of a whole batch of labels, which are about B times smaller.
        mode: "separate" keeps each experience's own anchor, "online" one at the last parameters
            (Schwarz et al. 2018, arXiv 1805.06370).
        decay: gamma of the online mode: F <- gamma F + F_k.
        batches: of the experience's first pass, from which F is estimated; 0: all.

    Raises:
        UserError: a number is negative, the decay is above 1, or there are too many batches.
    """
    checks.within(0, strength=strength)
    checks.within(0, 2**30, batches=batches)
    checks.within(0, 1, decay=decay)

    def init(setup: Setup) -> Own:
        none = penalty.zeros(setup.params)
        return {"importance": none, "anchor": none, "level": jnp.zeros(())}

    def loss(loss, own: Own, params: Any, mixed: Mixed, output: Any, moment: Moment, forward: Any):
        del mixed, output, moment, forward
        value = penalty.quadratic(own["importance"], own["anchor"], params) + own["level"]
        return loss + own["strength"] / 2 * value

    def start(own: Own, params: Any, moment: Moment) -> Any:
        del own, moment
        return {"sum": penalty.zeros(params), "count": jnp.zeros(())}

    def add(carry: Any, own: Own, params: Any, mixed: Mixed, forward: Any, moment: Moment) -> Any:
        del own
        squares, count = squared_gradients(fisher, params, mixed.batch, forward, moment.key)
        return {
            "sum": jax.tree.map(jnp.add, carry["sum"], squares),
            "count": carry["count"] + count,
        }

    def finish(carry: Any, own: Own, params: Any, moment: Moment) -> Own:
        del moment
        new = jax.tree.map(lambda s: s / jnp.maximum(carry["count"], 1.0), carry["sum"])
        if mode == "online":
            kept = jax.tree.map(lambda f, n: own["decay"] * f + n, own["importance"], new)
            return own | {"importance": kept, "anchor": params}
        return own | joined(own, new, params)

    hyper = {"strength": strength, "decay": decay}
    sweep = Sweep(start, add, finish, batches)
    return Learner(init=init, loss=loss, sweep=sweep, hyper=hyper, needs=NEEDS)


def joined(own: Own, importance: Any, anchor: Any) -> Own:
    """Returns the one quadratic that is the sum of a learner's and of a new one.

    Args:
        own: "importance", "anchor" and "level" of the learner.
        importance: of the new quadratic.
        anchor: of the new quadratic.
    """
    total = jax.tree.map(jnp.add, own["importance"], importance)
    share = jax.tree.map(lambda new, t: jnp.where(t > 0, new / t, 1.0), importance, total)
    between = jax.tree.map(
        lambda f, s, a, m: jnp.sum(f * s * (a - m) ** 2),
        own["importance"],
        share,
        anchor,
        own["anchor"],
    )
    middle = jax.tree.map(lambda m, s, a: m + s * (a - m), own["anchor"], share, anchor)
    level = own["level"] + sum(jax.tree.leaves(between))
    return {"importance": total, "anchor": middle, "level": level}


def squared_gradients(
    fisher: str, params: Any, batch: Any, forward: Any, key: jax.Array
) -> tuple[Any, jax.Array]:
    """Returns the sum of squared gradients of log p(y|x) over a batch, and their number.

    Args:
        fisher: which labels y, as `ewc` has it; "batch" squares the gradient of the batch's mean.
        params: trained parameters.
        batch: rows; those of weight 0 count nothing.
        forward: `(params, batch) -> Output`.
        key: draws the labels.
    """
    weights, labels = batch["weights"], batch["labels"]
    rows = {k: v for k, v in batch.items() if k not in ("weights", "there")}
    logits = lambda params, rows: forward(params, rows).logits
    if fisher == "batch":

        def mean(params: Any) -> jax.Array:
            log_p = jax.nn.log_softmax(logits(params, rows))
            values = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
            return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1.0)

        whole = (jnp.sum(weights) > 0).astype(jnp.float32)
        return jax.tree.map(lambda g: whole * g**2, jax.grad(mean)(params)), whole
    if fisher == "predicted":
        labels, fisher = jnp.argmax(logits(params, rows), axis=-1), "empirical"
    kind = cast(information.Labels, fisher)
    total = information.squares(logits, params, rows, labels, weights, key, kind=kind)
    return total, jnp.sum(weights)
