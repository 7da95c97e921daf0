"""The weights to evaluate and to export, where they aren't the ones that training steps on."""

from typing import Any

import jax
import optax

from lamina.platform.errors import UserError
from lamina.platform.optimizers import schedule_free


def eval_params(name: str, optimizer_state: Any, params: Any) -> Any:
    """Returns the parameters to evaluate.

    For schedule-free optimizers these are the averages `x = (y - (1 - b1) z) / b1`, with y the
    trained parameters and z the iterates in the optimizer's state; they are found in the state,
    also inside a chain or a partition. For all others, `params` themselves. Under several seeds in
    one state, map this function over them (`jax.vmap`).

    Args:
        name: the optimizer's name, for messages.
        optimizer_state: its state.
        params: the trained parameters.

    Raises:
        UserError: two schedule-free parts of the state have the same parameter.

    References:
        Defazio et al., The Road Less Scheduled, https://arxiv.org/abs/2405.15682
    """
    states = _averages(optimizer_state)
    leaves, tree = jax.tree.flatten(params)
    owners = [0] * len(leaves)
    result = list(leaves)
    for state in states:
        for i, z in enumerate(tree.flatten_up_to(state.z)):
            if not isinstance(z, optax.MaskedNode):
                owners[i] += 1
                result[i] = schedule_free.average(state.b1, leaves[i], z)
    if max(owners, default=0) > 1:
        raise UserError(
            f"optimizer {name!r} holds {len(states)} schedule-free parts with the same parameters: "
            "evaluation needs one for each parameter"
        )
    return jax.tree.unflatten(tree, result)


def keeps_average(optimizer_state: Any) -> bool:
    """Returns whether `eval_params` needs the optimizer's state (which may be abstract)."""
    return bool(_averages(optimizer_state))


def _averages(optimizer_state: Any) -> list[schedule_free.ScheduleFreeState]:
    is_free = lambda node: isinstance(node, schedule_free.ScheduleFreeState)
    return [s for s in jax.tree.leaves(optimizer_state, is_leaf=is_free) if is_free(s)]
