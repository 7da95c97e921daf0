"""Dark experience replay: the memory keeps what the model answered, and the model is held to it."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from lamina.platform.incremental import checks
from lamina.platform.incremental import memory as memories
from lamina.platform.training.learners import Draw, Learner, Mixed, Moment, Own

CLASSES = frozenset({"classes"})


def der(
    *,
    memory: int = 500,
    replay: int = 0,
    alpha: float = 0.3,
    policy: Literal["reservoir", "balanced"] = "reservoir",
) -> Learner:
    """Dark experience replay: `loss + alpha * mean (z(x_m) - z_m)^2`.

    Buzzega et al. (2020, arXiv 2004.07211). z_m are the logits at the time of insertion, before the
    step that inserts them. Each pass over an experience inserts its rows anew, as in the paper's
    algorithm, so that a memory of many passes isn't one of the logits of the first. The squared
    error is the mean over rows and classes, as in the authors' code (the paper writes the squared
    norm: alpha would be C times smaller).

    Args:
        memory: rows in the memory.
        replay: rows drawn at each step; 0: as many as the stream's batch has.
        alpha: weight of the squared error. Default 0.3: the paper's for Split-CIFAR-10.
        policy: of the memory; the paper's is "reservoir".

    Raises:
        UserError: the memory holds less than is drawn, or a weight is negative.
    """
    memories.check_size(memory, replay)
    checks.within(0, alpha=alpha)
    draws = {"logits": Draw(replay, labelled=False)}
    kept = memories.create(memory, policy=policy, draws=draws, stores=("logits",))
    return Learner(loss=_loss, memory=kept, hyper={"alpha": alpha, "beta": 0.0}, needs=CLASSES)


def derpp(
    *,
    memory: int = 500,
    replay: int = 0,
    alpha: float = 0.3,
    beta: float = 0.5,
    policy: Literal["reservoir", "balanced"] = "reservoir",
) -> Learner:
    """DER++: `der`, and `beta` times the cross-entropy of a second draw from the memory.

    Buzzega et al. (2020, arXiv 2004.07211).

    Args:
        memory: rows in the memory.
        replay: rows of each of the two draws; 0: as many as the stream's batch has.
        alpha: weight of the squared error of the logits.
        beta: weight of the cross-entropy. Default 0.5: the paper's for Split-CIFAR-10.
        policy: of the memory; the paper's is "reservoir".

    Raises:
        UserError: the memory holds less than is drawn, or a weight is negative.
    """
    memories.check_size(memory, replay)
    checks.within(0, alpha=alpha, beta=beta)
    draws = {"logits": Draw(replay, labelled=False), "labels": Draw(replay, labelled=False)}
    kept = memories.create(memory, policy=policy, draws=draws, stores=("logits",))
    return Learner(loss=_loss, memory=kept, hyper={"alpha": alpha, "beta": beta}, needs=CLASSES)


def _loss(loss: jax.Array, own: Own, params: Any, mixed: Mixed, output: Any, moment: Moment, *rest):
    del params, moment, rest
    rows = mixed.of("logits")
    error_M = jnp.mean((output.logits[mixed.groups["logits"]] - rows["logits"]) ** 2, axis=-1)
    loss += own["alpha"] * memories.mean(error_M, rows["there"])
    if "labels" in mixed.groups:
        rows = mixed.of("labels")
        log_p_MxC = jax.nn.log_softmax(output.logits[mixed.groups["labels"]])
        chosen_M = jnp.take_along_axis(log_p_MxC, rows["labels"][:, None], axis=-1)[:, 0]
        loss += own["beta"] * memories.mean(-chosen_M, rows["there"])
    return loss
