"""What a plan needs to know of an experiment besides its compiled program, as plain data."""

import math
from typing import Any, NamedTuple

import jax

from lamina.platform.training import efficiency
from lamina.platform.training import experiment as experiments
from lamina.platform.training.parameters import flat
from lamina.sharding import mesh as meshes
from lamina.sharding import rules
from lamina.sharding.pods.torus import Layout


class Leaf(NamedTuple):
    """An array of the train state.

    Attributes:
        part: "parameters", "moments" or "rest".
        path: its name.
        axes: logical axis of each dimension; nothing where they aren't known.
        shape: of the whole array.
        shard: of one device's part.
        itemsize: bytes of an element.
        split: mesh axes of each dimension.
    """

    part: str
    path: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    shard: tuple[int, ...]
    itemsize: int
    split: tuple[tuple[str, ...], ...]

    @property
    def gathered(self) -> tuple[int, ...]:
        """The shard as far as it is gathered before use: without splits over `tensor`."""
        return tuple(
            part if set(split) - {"tensor"} else whole
            for whole, part, split in zip(self.shape, self.shard, self.split, strict=True)
        )

    @property
    def bytes(self) -> int:
        """Bytes on one device."""
        return math.prod(self.shard) * self.itemsize


class Facts(NamedTuple):
    """An experiment on a topology.

    Attributes:
        layout: where its devices stand.
        leaves: the arrays of its train state.
        batch_bytes: of a batch on one device.
        examples: in a step.
        tokens: in a step; 0 where an example is no sequence of tokens.
        sequence: tokens of an example, or 0.
        model_flops: of a step, see `efficiency.model_flops`.
        parameters: number of trained parameters.
    """

    layout: Layout
    leaves: tuple[Leaf, ...]
    batch_bytes: int
    examples: int
    tokens: int
    sequence: int
    model_flops: float
    parameters: int

    def bytes_of(self, part: str) -> int:
        """Returns the bytes of a part of the train state on one device."""
        return sum(leaf.bytes for leaf in self.leaves if leaf.part == part)


def gather(experiment: experiments.Experiment, layout: Layout) -> Facts:
    """Reads them from an assembled experiment."""
    c, state, batch = experiment.config, experiment.state, experiment.batch
    axes = flat(experiment.recipe.parameters.axes(state.params))
    axes = {**flat(experiment.recipe.model.axes), **axes}
    parts = {
        "parameters": (state.params, state.frozen),
        "moments": (state.optimizer_state, state.islands),
        "rest": (state.ema, state.model_state, state.metrics, state.loss_scale),
    }
    leaves = tuple(
        _leaf(part, path, leaf, axes) for part, tree in parts.items() for path, leaf in _paths(tree)
    )
    inputs = batch["inputs"]
    sequence = inputs.shape[1] if c.task.name == "language_modeling" else 0
    rows = math.prod(inputs.shape[:1])
    trained = sum(math.prod(leaf.shape) for _, leaf in _paths(state.params))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in batch.values())
    return Facts(
        layout=layout,
        leaves=leaves,
        batch_bytes=size // meshes.batch_parallelism(experiment.mesh),
        examples=rows,
        tokens=rows * sequence,
        sequence=sequence,
        model_flops=efficiency.model_flops(experiment),
        parameters=trained,
    )


def _paths(tree: Any) -> list[tuple[str, Any]]:
    return [(rules.path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


def _leaf(part: str, path: str, leaf: Any, axes: dict[str, Any]) -> Leaf:
    # Of a moment the path ends with that of its parameter.
    names = next((v for k, v in axes.items() if path == k or path.endswith(f"/{k}")), ())
    spec = [*leaf.sharding.spec] + [None] * (len(leaf.shape) - len(leaf.sharding.spec))
    split = tuple((s,) if isinstance(s, str) else tuple(s or ()) for s in spec)
    return Leaf(
        part=part,
        path=path,
        axes=tuple(a or "" for a in names) if len(names) == len(leaf.shape) else (),
        shape=tuple(leaf.shape),
        shard=tuple(leaf.sharding.shard_shape(leaf.shape)),
        itemsize=leaf.dtype.itemsize,
        split=split,
    )
