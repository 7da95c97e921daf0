"""The learners by name: what `config.learner.name` may be."""

from collections.abc import Callable, Mapping
from typing import Any

from lamina.platform import config as configs
from lamina.platform.errors import UserError
from lamina.platform.incremental.learners.agem import agem
from lamina.platform.incremental.learners.chain import chain
from lamina.platform.incremental.learners.cumulative import cumulative
from lamina.platform.incremental.learners.der import der, derpp
from lamina.platform.incremental.learners.er import er
from lamina.platform.incremental.learners.ewc import ewc
from lamina.platform.incremental.learners.finetune import finetune
from lamina.platform.incremental.learners.gem import gem
from lamina.platform.incremental.learners.icarl import icarl
from lamina.platform.incremental.learners.joint import joint
from lamina.platform.incremental.learners.l2p import l2p
from lamina.platform.incremental.learners.lwf import lwf
from lamina.platform.incremental.learners.merges import ema_merge, task_arithmetic
from lamina.platform.incremental.learners.si import si
from lamina.platform.incremental.learners.slda import slda
from lamina.platform.training.learners import Learner


def chained(*, links: tuple[str, ...], options: Mapping[str, Any] = configs.thaw({})) -> Learner:
    """Several learners as one; they share one memory.

    Args:
        links: names of learners, in the order in which they act.
        options: name to that learner's keys.

    Raises:
        UserError: there are no links, a name is unknown or stands twice, or there are options of
            one that isn't there.
    """
    if not links:
        raise UserError("learner.links is empty: name the learners of the chain")
    if len(set(links)) < len(links):
        raise UserError(f"learner.links = {links}: a name stands twice")
    for name in options:
        if name not in links:
            raise UserError(f"learner.options.{name}: {name!r} is none of {links}")
        if not isinstance(options[name], Mapping):
            raise UserError(
                f"learner.options.{name} = {options[name]!r} should have the keys of {name!r}, "
                "such as dict(memory=500)"
            )
    return chain(**{name: _link(name, options.get(name, {})) for name in links})


def _link(name: str, options: Mapping[str, Any]) -> Learner:
    """Returns one learner of a chain; what is wrong with it is said with its name."""
    try:
        return create(name, **dict(options))
    except UserError as error:
        raise UserError(f"learner.links, {name!r}: {error}") from error


LEARNERS: Mapping[str, Callable[..., Learner]] = {
    "agem": agem,
    "chain": chained,
    "cumulative": cumulative,
    "der": der,
    "derpp": derpp,
    "ema_merge": ema_merge,
    "er": er,
    "ewc": ewc,
    "finetune": finetune,
    "gem": gem,
    "icarl": icarl,
    "joint": joint,
    "l2p": l2p,
    "lwf": lwf,
    "si": si,
    "slda": slda,
    "task_arithmetic": task_arithmetic,
}
"""The explicit table of learners."""

KIND = configs.Kind(LEARNERS, makes=Learner)


def create(name: str, **options: Any) -> Learner:
    """Returns a learner.

    Args:
        name: one of `LEARNERS`, or `"package.module:factory"`.
        **options: its keys, as in a config.

    Raises:
        UserError: an unknown name, or keys that don't fit.

    Example:
        >>> create("er", memory=500, replay=128).memory.slots
        500
    """
    schema = configs.Schema(configs.NoSettings, {}, {"learner": KIND})
    resolved = configs.resolve({"learner": {"name": name, **options}}, schema)
    return configs.build(resolved["learner"], KIND, "learner", configs.EVERYONE)
