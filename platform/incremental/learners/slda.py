"""Streaming linear discriminant analysis: class means and one covariance of frozen features."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lamina.platform.incremental import checks
from lamina.platform.incremental.learners import features
from lamina.platform.linear_algebra import one_by_one
from lamina.platform.training.learners import STREAM, Learner, Mixed, Moment, Own, Setup


def slda(*, shrinkage: float = 1e-4) -> Learner:
    """Classifies the features of a frozen model by class means mu and a shared covariance S.

    Hayes and Kanan (2020, arXiv 1909.01520). The t-th row (x, y) gives first `S <- (t S + t/(t+1)
    d d') / (t+1)` with `d = x - mu_y`, then `mu_y <- mu_y + d / (n_y + 1)`; the score of class c is
    `mu_c' L x - mu_c' L mu_c / 2` with `L = ((1 - e) S + e I)^-1`. A batch is added at once, with
    the result of its rows one by one. Nothing of the model is trained, and a class that never came
    is never answered. In another pass rows count again.

    Args:
        shrinkage: e. Default 1e-4: the paper's.

    Raises:
        UserError: the shrinkage is no fraction.
    """
    checks.within(0, 1, shrinkage=shrinkage)

    def init(setup: Setup) -> Own:
        size, classes = features.width(setup, "slda"), setup.space.classes
        return {
            "mean": jnp.zeros((classes, size)),
            "count": jnp.zeros(classes),
            "covariance": jnp.zeros((size, size)),
        }

    def after(own: Own, before: Any, after: Any, gradient: Any, mixed: Mixed, output, moment):
        del gradient, moment
        rows = mixed.of(STREAM)
        x_BxD = output.features[mixed.groups[STREAM]].astype(own["mean"].dtype)
        return own | updated(own, x_BxD, rows["labels"], rows["there"]), frozen(before, after)

    def predict(own: Own, output: Any, moment: Moment) -> jax.Array:
        del moment
        size, precise = len(own["covariance"]), jax.lax.Precision.HIGHEST
        e, mean = own["shrinkage"], own["mean"]
        covariance = (1 - e) * own["covariance"] + e * jnp.eye(size, dtype=mean.dtype)
        weights_DxC = one_by_one(jnp.linalg.solve)(covariance, mean.T)
        bias_C = -0.5 * jnp.sum(mean * weights_DxC.T, axis=-1)
        x_BxD = output.features.astype(mean.dtype)
        scores = jnp.dot(x_BxD, weights_DxC, precision=precise) + bias_C[None]
        return jnp.where(own["count"][None] > 0, scores, -jnp.inf)

    return Learner(
        init=init,
        # The model stays as it is: no gradient need be computed.
        loss=lambda loss, *rest: jax.lax.stop_gradient(loss),
        after=after,
        predict=predict,
        hyper={"shrinkage": shrinkage},
        needs=frozenset({"pretrained", "classes"}),
    )


def updated(own: Own, x_BxD: jax.Array, labels_B: jax.Array, there_B: jax.Array) -> Own:
    """Returns "mean", "count" and "covariance" after the rows, as if they came one by one.

    Args:
        own: the statistics before.
        x_BxD: features.
        labels_B: int.
        there_B: bool: rows that count.
    """
    there = there_B.astype(x_BxD.dtype)
    dot = lambda a, b: jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
    members_BxC = jax.nn.one_hot(labels_B, len(own["count"]), dtype=x_BxD.dtype) * there[:, None]
    earlier_BxB = jnp.tril(dot(members_BxC, members_BxC.T), -1)
    # The mean of a row's class just before it: that of the past, moved by the batch's rows before.
    past_BxD, past_B = own["mean"][labels_B], own["count"][labels_B]
    number_B = past_B + earlier_BxB.sum(-1)
    moved = dot(earlier_BxB, x_BxD) - earlier_BxB.sum(-1, keepdims=True) * past_BxD
    gap_BxD = x_BxD - (past_BxD + moved / jnp.maximum(number_B, 1.0)[:, None])
    total = own["count"].sum()
    t_B = total + jnp.cumsum(there) - there
    share_B = there * t_B / (t_B + 1)
    spread = total * own["covariance"] + dot((gap_BxD * share_B[:, None]).T, gap_BxD)
    new_C = members_BxC.sum(0)
    count = own["count"] + new_C
    rise = dot(members_BxC.T, x_BxD) - new_C[:, None] * own["mean"]
    return {
        "mean": own["mean"] + rise / jnp.maximum(count, 1.0)[:, None],
        "count": count,
        "covariance": spread / jnp.maximum(total + there.sum(), 1.0),
    }


def frozen(before: Any, after: Any) -> Any:
    """Returns the train state after a step that trained nothing."""
    return dataclasses.replace(
        after,
        params=before.params,
        model_state=before.model_state,
        optimizer_state=before.optimizer_state,
        ema=before.ema,
    )
