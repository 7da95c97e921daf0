"""Starting from other parameters: which of them go where, and which parameters stay frozen."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lamina.platform.checkpoints.names import flatten, nearest, unflatten
from lamina.platform.errors import UserError

_MAX_LISTED = 10


class Transferred(NamedTuple):
    """Parameters with a part taken from elsewhere, and what became of everything."""

    params: Any  # the target's structure, dtypes and placement
    loaded: dict[str, str]  # target name -> name in the source
    left: tuple[str, ...]  # target names that keep their own values
    unused: tuple[str, ...]  # source names that went nowhere

    def report(self) -> str:
        """One line: what was loaded, left and unused, with the first names of each."""
        parts = [f"loaded {len(self.loaded)} arrays"]
        if self.left:
            parts.append(f"left {len(self.left)} as initialised ({_some(self.left)})")
        if self.unused:
            parts.append(f"{len(self.unused)} of the source unused ({_some(self.unused)})")
        return "; ".join(parts)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _compiled(patterns: Sequence[str], option: str) -> list[re.Pattern[str]]:
    try:
        return [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise UserError(f"{option}: {error.pattern!r} is no regular expression: {error}") from error


def select(names: Sequence[str], patterns: Sequence[str], option: str) -> set[str]:
    """The names in which a pattern is found (`re.search`: anchor with ^ and $ to say more).

    Args:
        names: '/'-joined names.
        patterns: regular expressions; a name is selected if any is found in it.
        option: what the patterns are called in messages.

    Raises:
        UserError: a pattern is no regular expression, or is found in no name.
    """
    chosen: set[str] = set()
    for pattern in _compiled(patterns, option):
        found = {name for name in names if pattern.search(name)}
        if not found:
            raise UserError(
                f"{option}: {pattern.pattern!r} is found in no name"
                f"{nearest(pattern.pattern, names)}; the names begin with {_some(sorted(names))}"
            )
        chosen |= found
    return chosen


def transfer(
    source: Any,
    target: Any,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rename: Sequence[Sequence[str]] = (),
) -> Transferred:
    r"""Takes parameters of `target` from `source`, by name.

    The source's names are rewritten by every pair of `rename` in turn (`re.sub`). Then each target
    parameter that is included (all, without `include`) and not excluded must be there under its
    name with its shape, and takes its values, cast to its dtype and placed by its sharding.
    Nothing is loaded in part: any mismatch is an error, and all are listed at once.

    Args:
        source: any tree of arrays (numpy or jax).
        target: the tree to fill: jax.Arrays, such as a fresh initialisation.
        include: regular expressions on target names. Default: all.
        exclude: regular expressions on target names. Default: none.
        rename: (regular expression, replacement) pairs on source names; `\1` is a group.

    Raises:
        UserError: a parameter is missing in the source (with the nearest names), has another shape
            or kind of dtype; a pattern fits nothing; two source arrays have one name.

    Example:
        >>> old, new = {"encoder": jnp.ones(2)}, {"body": jnp.zeros(2), "head": jnp.zeros(3)}
        >>> done = transfer(old, new, exclude=("head",), rename=(("^encoder", "body"),))
        >>> done.report()
        'loaded 1 arrays; left 1 as initialised (head)'
    """
    wanted = flatten(target)
    original = _renamed(flatten(source), rename)
    values = {new: leaf for new, (_, leaf) in original.items()}
    names = list(wanted)
    chosen = select(names, include, "include") if include else set(names)
    chosen -= select(names, exclude, "exclude")
    problems = [
        problem
        for name in names
        if name in chosen and (problem := _mismatch(name, wanted[name], values))
    ]
    if problems:
        more = len(problems) - _MAX_LISTED
        listed = "\n".join(f"  {line}" for line in problems[:_MAX_LISTED])
        raise UserError(
            f"the source does not fit this model ({len(problems)} of {len(chosen)} parameters):\n"
            f"{listed}" + (f"\n  and {more} more" if more > 0 else "") + "\n"
            "Use include, exclude and rename to say what goes where."
        )
    filled = {n: _placed(values[n], leaf) if n in chosen else leaf for n, leaf in wanted.items()}
    return Transferred(
        params=unflatten(filled, target),
        loaded={name: original[name][0] for name in names if name in chosen},
        left=tuple(name for name in names if name not in chosen),
        unused=tuple(old for new, (old, _) in original.items() if new not in chosen),
    )


def _renamed(source: dict[str, Any], rename: Sequence[Sequence[str]]) -> dict[str, tuple[str, Any]]:
    """New name -> (old name, leaf)."""
    current = {name: name for name in source}
    for pair in rename:
        if len(pair) != 2:
            raise UserError(f"rename: {pair!r} is no (regular expression, replacement) pair")
        pattern = _compiled(pair[:1], "rename")[0]
        select(list(current.values()), pair[:1], "rename")
        try:
            current = {old: pattern.sub(pair[1], new) for old, new in current.items()}
        except (re.error, IndexError) as error:
            raise UserError(f"rename: {pair[1]!r} is no replacement: {error}") from error
    result: dict[str, tuple[str, Any]] = {}
    for old, new in current.items():
        if new in result:
            raise UserError(f"rename: both {result[new][0]} and {old} of the source become {new}")
        result[new] = (old, source[old])
    return result


def _mismatch(name: str, leaf: Any, source: dict[str, Any]) -> str:
    if name not in source:
        return f"{name}: not in the source{nearest(name, source)}"
    found = source[name]
    if tuple(found.shape) != tuple(leaf.shape):
        return f"{name}: shape {tuple(found.shape)} in the source, {tuple(leaf.shape)} here"
    floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in (found, leaf)]
    if found.dtype != leaf.dtype and not all(floating):
        return f"{name}: {found.dtype} in the source, {leaf.dtype} here"
    return ""


def _placed(value: Any, leaf: jax.Array) -> jax.Array:
    """Puts a value (an array, or one that is read when indexed) where the leaf lies."""
    if isinstance(value, jax.Array):
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)
    return jax.make_array_from_callback(
        tuple(value.shape),
        leaf.sharding,
        lambda index: np.asarray(value[index]).astype(leaf.dtype, copy=False),
    )
