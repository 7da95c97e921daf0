"""Partition rules: from the logical axes of arrays to their shardings on a mesh."""

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lamina.sharding.mesh import BATCH_AXES

MeshAxes = str | tuple[str, ...]
"""What a rule asks for: a mesh axis, or several in a tuple, or "" for a dimension that stays whole.
"tensor?" asks for `tensor` only where the dimension divides by it."""

AxisRules = Mapping[str, MeshAxes]
"""Logical axis to mesh axes."""

_NOTHING: AxisRules = MappingProxyType({})

UNNAMED = "*"
"""Stands for the largest dimension that divides, of an array of two or more dimensions of which
none has a name."""


class Rules(NamedTuple):
    """Where the arrays of a training run go.

    Attributes:
        parameters: of a preset, for the dimensions of parameters. Where two dimensions of one
            parameter ask for the same mesh axis, the first one gets it.
        state: of a preset, for optimizer moments and moving averages, over `parameters`.
        activations: of a preset, for the dimensions of activations. What isn't named here is left
            to the compiler.
        derived: path of a parameter to a rule for each dimension, instead of `parameters`.
        explicit: the user's, for the dimensions of parameters, over those of the preset.
        paths: the user's, for single parameters: a regular expression, and a rule for each
            dimension. The first that is found in a parameter's path decides.
    """

    parameters: AxisRules
    state: AxisRules = _NOTHING
    activations: AxisRules = _NOTHING
    derived: Mapping[str, Sequence[MeshAxes]] = MappingProxyType({})
    explicit: AxisRules = _NOTHING
    paths: Sequence[tuple[str, Sequence[MeshAxes]]] = ()


FSDP: AxisRules = {"embed": "fsdp", "conv_out": "fsdp", UNNAMED: "fsdp"}
TENSOR: AxisRules = {
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "conv_out": "tensor",
}
ZERO: AxisRules = {name: ("data", "fsdp") for name in FSDP}
ROWS: AxisRules = {"batch": BATCH_AXES, "length": "sequence", "stream": "sequence"}
HIDDEN: AxisRules = {name: "tensor" for name in ("mlp", "heads", "kv_heads", "vocab")}

PRESETS: Mapping[str, Rules] = {
    # Every device has all parameters.
    "data": Rules({}, activations=ROWS),
    # Optimizer state is split, parameters are whole (ZeRO-1; Rajbhandari et al. 2020, 1910.02054).
    "zero1": Rules({}, state=ZERO, activations=ROWS),
    # Each large parameter is split along one of its dimensions (ZeRO-3, the same paper).
    "fsdp": Rules(FSDP, activations=ROWS),
    # Column and row splits of attention and MLP blocks (Megatron-LM; Shoeybi et al. 2019,
    # 1909.08053).
    "tensor": Rules(TENSOR, activations={**ROWS, **HIDDEN}),
    "fsdp+tensor": Rules({**FSDP, **TENSOR}, activations={**ROWS, **HIDDEN}),
    # `tensor`, and between the blocks each device of a tensor group has a part of the sequence
    # (Korthikanti et al. 2022, 2205.05198).
    "sequence": Rules(TENSOR, activations={**ROWS, **HIDDEN, "stream": ("sequence", "tensor")}),
    # `derived`, from `lamina.sharding.auto`; the compiler splits activations as they follow.
    "auto": Rules({}, activations=ROWS),
}


def preset(
    name: str,
    axes: AxisRules = _NOTHING,
    paths: Sequence[tuple[str, Sequence[MeshAxes]]] = (),
    activations: AxisRules = _NOTHING,
) -> Rules:
    """Returns the rules of a preset with explicit ones over them.

    Args:
        name: of `PRESETS`.
        axes: logical axis of parameters to mesh axes.
        paths: (regular expression, a rule for each dimension) of single parameters.
        activations: logical axis of activations to mesh axes.

    Raises:
        ValueError: there is no such preset, or an expression is invalid.
    """
    if name not in PRESETS:
        raise ValueError(f"sharding.rules = {name!r} is unknown: one of {', '.join(PRESETS)}")
    for pattern, _ in paths:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"sharding.paths: {pattern!r} is no regular expression: {error}"
            ) from error
    base = PRESETS[name]
    return base._replace(
        explicit=axes, paths=tuple(paths), activations={**base.activations, **activations}
    )


def partition_spec(
    names: Sequence[str | None],
    shape: Sequence[int],
    rules: Rules,
    mesh: Mesh,
    path: str,
    *,
    state: bool = False,
) -> P:
    """Returns how a parameter is split.

    A dimension without a rule is not split, and a mesh axis of size 1 splits nothing.

    Args:
        names: logical axis of each dimension; None has no rule.
        shape: the parameter's shape.
        rules: where dimensions go.
        mesh: the mesh.
        path: the parameter's path.
        state: whether it is for the parameter's optimizer state and moving average.

    Raises:
        ValueError: a rule names an axis that the mesh lacks; a dimension doesn't divide; explicit
            rules ask for one mesh axis twice in the parameter.
    """
    claims = _claims(names, shape, rules, mesh, path, state)
    taken: dict[str, int] = {}  # mesh axis to the dimension that has it
    parts: list[tuple[str, ...]] = []
    for dimension, (size, claim) in enumerate(zip(shape, claims, strict=True)):
        got: list[str] = []
        for wanted in _listed(claim.wanted):
            axis, optional = wanted.removesuffix("?"), wanted.endswith("?")
            if axis not in mesh.shape:
                raise ValueError(
                    f"sharding: {claim.rule} names no axis of the mesh ({', '.join(mesh.shape)})"
                )
            if mesh.shape[axis] == 1:
                continue
            if axis in taken:
                if claim.explicit or claims[taken[axis]].explicit:
                    raise ValueError(_twice(path, names, axis, taken[axis], dimension, claims))
                continue
            ways = math.prod(mesh.shape[a] for a in got) * mesh.shape[axis]
            if size % ways and optional:
                continue
            if size % ways:
                raise ValueError(
                    f"sharding: dimension {names[dimension] or dimension!r} of {path} has size "
                    f"{size}, which doesn't divide by {ways} ({' x '.join([*got, axis])}): change "
                    f"the model or the mesh, or ask for {axis + '?'!r}, which leaves whole what "
                    "doesn't divide"
                )
            taken[axis] = dimension
            got.append(axis)
        parts.append(tuple(got))
    return _spec(parts)


class _Claim(NamedTuple):
    """What one dimension asks for, whether the user wrote it, and the rule in words."""

    wanted: MeshAxes
    explicit: bool
    rule: str


def _claims(
    names: Sequence[str | None],
    shape: Sequence[int],
    rules: Rules,
    mesh: Mesh,
    path: str,
    state: bool,
) -> list[_Claim]:
    for pattern, wanted in rules.paths:
        if re.search(pattern, path):
            stacked = list(names[:1]) == ["layers"] and len(wanted) == len(shape) - 1
            each = ("", *wanted) if stacked else tuple(wanted)
            if len(each) != len(shape):
                raise ValueError(
                    f"sharding.paths: {pattern!r} has rules for {len(wanted)} dimensions, but "
                    f"{path} has {len(shape)}: {tuple(shape)}"
                )
            return [_Claim(w, True, f"the rule {w!r} for {pattern!r}") for w in each]
    base = {**rules.parameters, **rules.state} if state else rules.parameters
    found = {**base, **rules.explicit}
    if path in rules.derived:
        each = zip(names, rules.derived[path], strict=True)
        return [
            _Claim(rules.explicit.get(n or "", wanted), n in rules.explicit, f"the rule {wanted!r}")
            for n, wanted in each
        ]
    if not any(names) and len(shape) > 1:
        names = _name_largest(shape, found.get(UNNAMED, ""), mesh)
    return [
        _Claim(
            found.get(name or "", ""),
            name in rules.explicit,
            f"the rule {name!r}: {found.get(name or '')!r}",
        )
        for name in names
    ]


def _name_largest(shape: Sequence[int], wanted: MeshAxes, mesh: Mesh) -> list[str | None]:
    """Returns names of which only the largest dimension that divides has one, `UNNAMED`."""
    ways = math.prod(mesh.shape.get(axis.removesuffix("?"), 1) for axis in _listed(wanted))
    fitting = [i for i, size in enumerate(shape) if size % ways == 0]
    largest = max(fitting, key=lambda i: shape[i], default=None)
    return [UNNAMED if i == largest else None for i in range(len(shape))]


def _listed(wanted: MeshAxes) -> tuple[str, ...]:
    return (wanted,) if isinstance(wanted, str) and wanted else tuple(wanted)


def _twice(
    path: str,
    names: Sequence[str | None],
    axis: str,
    first: int,
    second: int,
    claims: Sequence[_Claim],
) -> str:
    shown = [repr(names[i]) if names[i] else str(i) for i in (first, second)]
    free = ["" if i == second else claim.wanted for i, claim in enumerate(claims)]
    return (
        f"sharding: dimensions {first} and {second} of {path} ({shown[0]} and {shown[1]}) both ask "
        f"for the mesh axis {axis!r}: a parameter can be split along it once. Give one of them "
        f"another axis or '', or say what holds for this parameter alone: "
        f"sharding.paths = (({path!r}, {tuple(free)!r}),)"
    )


def _spec(parts: Sequence[tuple[str, ...]]) -> P:
    entries: list[Any] = [p[0] if len(p) == 1 else p or None for p in parts]
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def unused_paths(rules: Rules, paths: Sequence[str]) -> list[str]:
    """Returns the expressions of `rules.paths` that are found in none of the parameters' paths."""
    return [p for p, _ in rules.paths if not any(re.search(p, path) for path in paths)]


def of_activations(rules: Rules, mesh: Mesh) -> dict[str, tuple[str, ...]]:
    """Returns name of an activation's dimension to the mesh axes that split it.

    Hidden dimensions for which the user gave a rule lie as the parameters' do, but for axes that
    split the batch.

    Raises:
        ValueError: a rule names an axis that the mesh lacks.
    """
    found: dict[str, tuple[str, ...]] = {}
    hidden = {name: wanted for name, wanted in rules.explicit.items() if name in HIDDEN}
    for name, wanted in {**rules.activations, **hidden}.items():
        split = tuple(axis.removesuffix("?") for axis in _listed(wanted))
        for axis in split:
            if axis not in mesh.shape:
                raise ValueError(
                    f"sharding.activations.{name}: {axis!r} is no axis of the mesh "
                    f"({', '.join(mesh.shape)})"
                )
        found[name] = tuple(a for a in split if name not in hidden or a not in BATCH_AXES)
    return found


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Returns the sharding of a batch whose rows stand behind `leading` unsplit dimensions."""
    return NamedSharding(mesh, P(*[None] * leading, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device has whole."""
    return NamedSharding(mesh, P())


def path_name(path: Sequence[Any]) -> str:
    """Returns a key path of `jax.tree_util` as `a/b/c`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")
