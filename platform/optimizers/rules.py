"""Rules by parameter path: another optimizer, weight decay or learning rate for some parameters.

    config.optimizer.rules = dict(
        plain=dict(paths=("bias$", "norm"), weight_decay=0.0),
        head=dict(paths=("^head/",), learning_rate_factor=10.0),
        table=dict(paths=("embedding",), name="sgd", momentum=0.9),
    )

A rule without a `name` is the main optimizer with other keys; one with a `name` has that
optimizer's defaults.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import optax

from lamina.platform.checkpoints import transfer
from lamina.platform.errors import UserError
from lamina.platform.optimizers import binding
from lamina.platform.optimizers.matrices import path_names

WHOLE = ("lbfgs", "sophia")
"""Optimizers that evaluate the loss of all parameters: they can't have some of them."""

MAIN = ""
"""The label of the parameters that no rule selects."""

Make = Callable[..., optax.GradientTransformationExtraArgs]
"""`(name, learning_rate, **keys)` to an optimizer."""


def create(
    make: Make,
    name: Any,
    learning_rate: optax.ScalarOrSchedule,
    keys: Mapping[str, Any],
    rules: Mapping[str, Mapping[str, Any]],
    paths: Sequence[str],
) -> optax.GradientTransformationExtraArgs:
    """Creates an optimizer whose rules give some parameters another one.

    What an optimizer takes over all its parameters, such as the norm of a gradient, it takes over
    those of its rule.

    Args:
        make: creates one optimizer.
        name: of the main optimizer.
        learning_rate: of the main optimizer.
        keys: of the main optimizer.
        rules: a rule's name to its `paths` (regular expressions that are searched for in the
            parameters' paths), `name`, `learning_rate_factor` and further keys.
        paths: of all trained parameters, `a/b/kernel`.

    Raises:
        UserError: a rule selects nothing, or what another one selects; unknown keys or names.
    """
    main = make(name, learning_rate, **keys)
    if not rules:
        return main
    owners = _owners(rules, paths)
    parts: dict[Hashable, optax.GradientTransformation] = {}
    if len(owners) < len(set(paths)):  # not every optimizer can do with no parameters at all
        parts[MAIN] = main
    for rule, block in rules.items():
        own = {k: v for k, v in block.items() if k not in ("paths", "name", "learning_rate_factor")}
        other = block.get("name", name)
        if other in WHOLE or name in WHOLE:
            raise UserError(f"optimizer.rules: {', '.join(WHOLE)} need all parameters")
        factor = _factor(rule, block)
        arguments = own if "name" in block else {**keys, **own}
        try:
            parts[rule] = make(other, _scaled(learning_rate, factor), **arguments)
        except UserError as error:
            raise UserError(f"optimizer.rules.{rule}: {error}") from error

    def labels(tree: Any) -> Any:
        return jax.tree.map(lambda path: owners.get(path, MAIN), path_names(tree))

    return optax.partition(parts, labels, mask_compatible_extra_args=True)


def _owners(rules: Mapping[str, Mapping[str, Any]], paths: Sequence[str]) -> dict[str, str]:
    """Returns path to the rule that selects it."""
    owners: dict[str, str] = {}
    for rule, block in rules.items():
        where = f"optimizer.rules.{rule}"
        if not hasattr(block, "items"):
            raise UserError(f"{where} = {block!r} should be a block: dict(paths=(...), ...)")
        patterns = block.get("paths")
        if not (
            isinstance(patterns, tuple) and patterns and all(isinstance(p, str) for p in patterns)
        ):
            raise UserError(
                f"{where}.paths = {patterns!r} should be regular expressions: ('bias$',)"
            )
        for path in sorted(transfer.select(paths, patterns, f"{where}.paths")):
            if path in owners:
                raise UserError(
                    f"{path} is selected by optimizer.rules.{owners[path]} and by {where}: a "
                    "parameter has one rule"
                )
            owners[path] = rule
    return owners


def _factor(rule: str, block: Mapping[str, Any]) -> Any:
    factor = block.get("learning_rate_factor", 1.0)
    label = f"rules.{rule}"
    if isinstance(factor, bool | str | tuple):
        raise UserError(f"optimizer {label!r}: learning_rate_factor = {factor!r} is no number")
    binding.in_range(label, "learning_rate_factor", factor)
    return factor


def _scaled(learning_rate: optax.ScalarOrSchedule, factor: Any) -> Any:
    if callable(learning_rate):
        return lambda count: factor * learning_rate(count)
    return factor * learning_rate
