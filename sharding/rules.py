"""Partition rules: from a parameter's logical axes to its sharding on a mesh."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lamina.sharding.mesh import BATCH_AXES

Rules = Mapping[str, str | tuple[str, ...]]

FSDP: Rules = {
    "embed": "fsdp",
    "conv_out": "fsdp",
}
"""Each large parameter is split along one of its axes (ZeRO-3; Rajbhandari et al. 2020,
arXiv 1910.02054)."""

TENSOR: Rules = {
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "conv_out": "tensor",
}
"""Column and row splits of attention and MLP blocks (Megatron-LM; Shoeybi et al. 2019,
arXiv 1909.08053)."""

PRESETS: Mapping[str, Rules] = {
    "data": {},
    "fsdp": FSDP,
    "tensor": TENSOR,
    "fsdp+tensor": {**FSDP, **TENSOR},
}


def partition_spec(
    axes: Sequence[str | None], shape: Sequence[int], rules: Rules, mesh: Mesh, path: str
) -> P:
    """Returns how a parameter is split.

    A logical axis without a rule, or whose mesh axis has size 1, is not split. Where two axes of
    one parameter ask for the same mesh axis, the first one gets it.

    Args:
        axes: logical axis name of each dimension (None: never split).
        shape: the parameter's shape.
        rules: logical axis to mesh axis (or axes).
        mesh: the mesh.
        path: the parameter's path, for messages.

    Raises:
        ValueError: a rule names an axis that the mesh lacks, or a dimension doesn't divide.
    """
    used: set[str] = set()
    parts: list[Any] = []
    for axis, size in zip(axes, shape, strict=True):
        wanted = rules.get(axis, ()) if axis else ()
        names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        for name in names:
            if name not in mesh.shape:
                raise ValueError(
                    f"sharding: the rule {axis!r}: {name!r} names no axis of the mesh "
                    f"({', '.join(mesh.shape)})"
                )
        names = tuple(n for n in names if mesh.shape[n] > 1 and n not in used)
        ways = 1
        for name in names:
            ways *= mesh.shape[name]
        if size % ways:
            raise ValueError(
                f"sharding: dimension {axis!r} of {path} has size {size}, which doesn't divide by "
                f"{ways} ({' x '.join(names)}): change the model or the mesh"
            )
        used.update(names)
        parts.append(names[0] if len(names) == 1 else names or None)
    while parts and parts[-1] is None:
        parts.pop()
    return P(*parts)


def shardings(tree: Any, axes: Any, rules: Rules, mesh: Mesh) -> Any:
    """Returns a `NamedSharding` for every array of a parameter tree.

    Args:
        tree: nested dict of arrays or `jax.ShapeDtypeStruct`s.
        axes: the same nesting, with a tuple of logical axes at each leaf.
        rules: logical axis to mesh axis.
        mesh: the mesh.

    Raises:
        ValueError: as `partition_spec`.
    """
    return jax.tree.map_with_path(
        lambda path, leaf, names: NamedSharding(
            mesh, partition_spec(names, leaf.shape, rules, mesh, path_name(path))
        ),
        tree,
        axes,
    )


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Returns the sharding of a batch whose rows stand behind `leading` unsplit dimensions."""
    return NamedSharding(mesh, P(*[None] * leading, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device has whole."""
    return NamedSharding(mesh, P())


def path_name(path: Sequence[Any]) -> str:
    """Returns a key path of `jax.tree_util` as `a/b/c`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")
