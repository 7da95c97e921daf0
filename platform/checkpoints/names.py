"""Names for the leaves of a pytree: '/'-joined paths, and trees built back from them."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import jax


def path_name(path: Iterable[Any]) -> str:
    """The '/'-joined name of a key path, as `jax.tree_util.tree_flatten_with_path` gives it.

    Example:
        >>> path_name((jax.tree_util.DictKey("params"), jax.tree_util.SequenceKey(0)))
        'params/0'
    """
    return "/".join(_part(key) for key in path)


def _part(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by name, in the tree's own order.

    Dict keys, attributes of registered classes and namedtuples, and list positions become the
    parts of a name: `{"params": {"w": x}, "opt": (Adam(mu=y),)}` gives `params/w` and `opt/0/mu`.

    Raises:
        ValueError: two leaves have one name, or one leaf's name leads into another's, which
            happens when dict keys contain '/'.
    """
    flat: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = path_name(path)
        if name in flat:
            raise ValueError(f"two leaves of the tree are both named {name!r}")
        flat[name] = leaf
    for name in flat:
        parts = name.split("/")
        for end in range(1, len(parts)):
            if "/".join(parts[:end]) in flat:
                raise ValueError(f"the leaf {'/'.join(parts[:end])!r} leads into {name!r}")
    return flat


def unflatten(flat: Mapping[str, Any], like: Any) -> Any:
    """A tree with the structure of `like` whose leaves are looked up in `flat` by name."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree_util.tree_unflatten(treedef, [flat[path_name(path)] for path, _ in paths])


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from named leaves.

    Example:
        >>> nest({"dense/kernel": 1, "dense/bias": 2})
        {'dense': {'kernel': 1, 'bias': 2}}
    """
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A hint for messages: ' (nearest: a, b)', or nothing when no candidate resembles `name`."""
    close = get_close_matches(name, list(candidates), n=2, cutoff=0.5)
    return f" (nearest: {', '.join(close)})" if close else ""
