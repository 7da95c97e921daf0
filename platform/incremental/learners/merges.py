"""Learners whose end of an experience is a merge: with the last model, or of task vectors."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lamina.platform import merging
from lamina.platform.incremental import checks
from lamina.platform.training.learners import Learner, Moment, Own, Setup


def ema_merge(*, decay: float = 0.5) -> Learner:
    """Averages the model with that of the last experience: `th <- decay th_old + (1 - decay) th`.

    Marouf et al. (2024, arXiv 2312.08977; their CoMA). th_old is what the last merge gave, so the
    models of all experiences are averaged exponentially; the next experience goes on from the
    merged model, with the optimizer's state as it is. The first experience has nothing to merge.
    The merge is `lamina.platform.merging`'s `linear`.

    Args:
        decay: weight of the old model, in [0, 1]. Default 0.5.

    Raises:
        UserError: the decay is no fraction.
    """
    checks.within(0, 1, decay=decay)
    merger = merging.create("linear", normalize=False)

    def end(own: Own, state: Any, moment: Moment) -> tuple[Own, Any]:
        weight = jnp.where(moment.experience > 0, own["decay"], 0.0)
        weights = jnp.stack([weight, 1 - weight])
        merged = merger([own["old"], state.params], weights=weights)
        return own | {"old": merged}, dataclasses.replace(state, params=merged)

    return Learner(
        init=lambda setup: {"old": jax.tree.map(jnp.copy, setup.params)},
        end=end,
        hyper={"decay": decay},
        needs=frozenset({"boundaries"}),
    )


def task_arithmetic(
    *,
    scale: float = 1.0,
    normalize: bool = True,
    start: Literal["base", "last"] = "base",
) -> Learner:
    """Adds up what each experience changed: `th = th_0 + s sum_t (th_t - th_0)`.

    Ilharco et al. (2023, arXiv 2212.04089). th_0 are the pre-trained parameters and th_t those
    after fine-tuning on experience t; between experiences, and at the end, the model is the merged
    one. Only the sum is kept, whatever the number of experiences. The merge is
    `lamina.platform.merging`'s method of the same name. The optimizer's state goes on.

    Args:
        scale: the paper's lambda.
        normalize: whether `s = scale / T` with T experiences so far, which is their mean for a
            scale of 1, or `s = scale`. Default: the mean.
        start: an experience fine-tunes th_0 ("base", as in the paper) or the "last" th_t.
    """
    merger = merging.create("task_arithmetic")

    def init(setup: Setup) -> Own:
        copy = lambda: jax.tree.map(jnp.copy, setup.params)
        return {"base": copy(), "sum": copy(), "last": copy()}

    def begin(own: Own, state: Any, moment: Moment) -> tuple[Own, Any]:
        del moment
        return own, dataclasses.replace(state, params=own[start])

    def end(own: Own, state: Any, moment: Moment) -> tuple[Own, Any]:
        # th_0 + sum_t tau_t stands for all task vectors so far.
        total = merger([own["sum"], state.params], base=own["base"])
        count = moment.experience + 1 if normalize else 1
        merged = merger([total], base=own["base"], weights=(own["scale"] / count)[None])
        own = own | {"sum": total, "last": state.params}
        return own, dataclasses.replace(state, params=merged)

    return Learner(
        init=init,
        begin=begin,
        end=end,
        hyper={"scale": scale},
        needs=frozenset({"boundaries", "pretrained"}),
    )
