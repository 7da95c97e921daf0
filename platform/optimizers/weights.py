"""The weights to evaluate and to export, where they aren't the ones that training steps on."""

from typing import Any

import jax
from optax import contrib

from lamina.platform.errors import UserError


def eval_params(name: str, optimizer_state: Any, params: Any) -> Any:
    """Returns the parameters to evaluate.

    For schedule-free optimizers these are the averages `x = (y - (1 - b1) z) / b1`, with y the
    trained parameters and z the iterates in the optimizer's state; they are found in the state,
    also inside a chain or in a user's own optimizer. For all others, `params` themselves. Under
    several seeds in one state, map this function over them (`jax.vmap`).

    Args:
        name: the optimizer's name, for messages.
        optimizer_state: its state.
        params: the trained parameters.

    Raises:
        UserError: the state holds several schedule-free parts, so no average is that of all
            parameters.

    References:
        Defazio et al., The Road Less Scheduled, https://arxiv.org/abs/2405.15682
    """
    states = _averages(optimizer_state)
    if not states:
        return params
    if len(states) > 1 or jax.tree.structure(states[0].z) != jax.tree.structure(params):
        raise UserError(
            f"optimizer {name!r} holds {len(states)} schedule-free parts: evaluation needs one "
            "that covers all parameters"
        )
    return contrib.schedule_free_eval_params(states[0], params)


def keeps_average(optimizer_state: Any) -> bool:
    """Returns whether `eval_params` needs the optimizer's state (which may be abstract)."""
    return bool(_averages(optimizer_state))


def _averages(optimizer_state: Any) -> list[contrib.ScheduleFreeState]:
    is_free = lambda node: isinstance(node, contrib.ScheduleFreeState)
    return [s for s in jax.tree.leaves(optimizer_state, is_leaf=is_free) if is_free(s)]
