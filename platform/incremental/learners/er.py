"""Experience replay: every batch with rows of a memory beside it."""

from typing import Literal

from lamina.platform.incremental import memory as memories
from lamina.platform.training.learners import Draw, Learner


def er(
    *,
    memory: int = 500,
    replay: int = 0,
    policy: Literal["reservoir", "balanced"] = "balanced",
    past_only: bool = False,
) -> Learner:
    """Replays rows of a memory: one mean of the loss over the rows of the stream and of the memory.

    Chaudhry et al. (2019, arXiv 1902.10486). As long as the memory holds less than is drawn, the
    missing rows count nothing, so that the first step is one of fine-tuning.

    Args:
        memory: rows in the memory. Default 500: the smaller of the usual budgets.
        replay: rows drawn at each step, without replacement; 0: as many as the stream's batch has.
        policy: "reservoir" keeps a uniform sample of the stream, "balanced" equal numbers of each
            class.
        past_only: whether the memory holds earlier experiences alone: it takes rows of the present
            one at its end, in one pass over them. It needs boundaries.

    Raises:
        UserError: the memory holds less than is drawn.
    """
    memories.check_size(memory, replay)
    draws = {"replay": Draw(replay, labelled=True)}
    needs = {"boundaries"} if past_only else set()
    needs |= {"classes"} if policy == "balanced" else set()
    at_end = "drawn" if past_only else ""
    kept = memories.create(memory, policy=policy, draws=draws, at_end=at_end)
    return Learner(memory=kept, needs=frozenset(needs))
