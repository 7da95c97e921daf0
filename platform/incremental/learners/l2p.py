"""Learning to prompt: a pool of prompts and a head, trained on a frozen model."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from lamina.platform.data.feed import normalise
from lamina.platform.errors import UserError
from lamina.platform.incremental import checks
from lamina.platform.training.learners import STREAM, Learner, Mixed, Moment, Own, Setup


def l2p(*, pull: float = 0.5, classes: Literal["now", "all"] = "now") -> Learner:
    """Trains prompts for a frozen transformer: `loss - pull mean_x sum_k cos(q(x), key_k)`.

    Wang et al. (2022, arXiv 2112.08654). The pool is the model's: `vit` with `prompts`, whose
    query q(x) are the features without prompts, and whose chosen prompts stand before the tokens.
    What stays frozen the config says: all but the pool and the head with
    `init_from_rules.freeze = ("^(?!prompts|head)",)`. The optimizer's state goes on from one
    experience to the next, where the authors begin anew, and each example chooses its own prompts,
    where the authors' code lets a batch vote.

    Args:
        pull: weight of the similarity. Default 0.5: the paper's.
        classes: logits of the stream's rows that count in training: "now", those of the experience,
            as in the authors' code, or "all".

    Raises:
        UserError: the weight is negative.
    """
    checks.within(0, pull=pull)

    def init(setup: Setup) -> Own:
        answer = lambda params, batch: setup.forward(params, normalise(batch)).similarity
        if jax.eval_shape(answer, setup.params, dict(setup.batch)) is None:
            raise UserError(
                "learner 'l2p' needs a model with a pool of prompts: use model.name = 'vit' with "
                "model.prompts, such as 10"
            )
        return {}

    def output(own: Own, output: Any, mixed: Mixed, moment: Moment) -> Any:
        del own
        if classes == "all":
            return output
        stream = jnp.zeros(len(output.logits), bool).at[mixed.groups[STREAM]].set(True)
        there = moment.now[None] | ~stream[:, None]
        return output._replace(logits=jnp.where(there, output.logits, -1e9))

    def loss(loss, own: Own, params: Any, mixed: Mixed, output: Any, moment: Moment, forward: Any):
        del params, moment, forward
        weights_R = mixed.batch["weights"]
        mean = jnp.sum(output.similarity * weights_R) / jnp.maximum(jnp.sum(weights_R), 1.0)
        return loss - own["pull"] * mean

    needs = {"pretrained", "boundaries"} if classes == "now" else {"pretrained"}
    return Learner(
        init=init, output=output, loss=loss, hyper={"pull": pull}, needs=frozenset(needs)
    )
