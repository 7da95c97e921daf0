"""What a run starts from: the weights of another run, of a checkpoint, or of safetensors files."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from ml_collections import FrozenConfigDict

from lamina.models.functional import FunctionalModel
from lamina.platform import config as configs
from lamina.platform.checkpoints import layouts, names, transfer, weights
from lamina.platform.checkpoints.manifest import ArrayRecord
from lamina.platform.errors import UserError
from lamina.platform.training import foreign, trained
from lamina.platform.training.experiment import Experiment

Values = Mapping[str, jax.Array]
"""Path to value."""


class Loaded:
    """Values that aren't drawn, handed out once: nobody keeps what a state has taken over.

    Args:
        read: gives (path to parameter, path to other state).
        report: one line for the user, or "".
    """

    def __init__(self, read: Callable[[], tuple[Values, Values]], report: str = ""):
        self._read, self._values, self.report = read, None, report

    def hold(self, values: tuple[Values, Values]) -> "Loaded":
        """Keeps values that have been read already, for the first `take`."""
        self._values = values
        return self

    def take(self) -> tuple[Values, Values]:
        """Returns (parameters, other state) and forgets them; they are read again if need be."""
        values, self._values = self._values, None
        return self._read() if values is None else values


NOTHING = Loaded(lambda: ({}, {}))
"""Everything is drawn."""


def load(
    config: FrozenConfigDict,
    trust: Sequence[str],
    model: FunctionalModel,
    sharding: Sharding | Mapping[str, NamedSharding],
) -> Loaded:
    """Returns what `init_from` and `init_from_rules` of the config give.

    Of a run with several seeds the first is taken. Batch statistics and the like come along where
    they fit, from a run or from what `lamina export` or a merge of tasks wrote.

    Args:
        config: resolved.
        trust: packages whose factories this config may name. The source may be somebody else's:
            its config may name only those given one by one, and those that this config names.
        model: the model to fill.
        sharding: where to put what is loaded: one for all, or path to sharding.

    Raises:
        UserError: there is nothing to load, or it doesn't fit the model.
    """
    if not config.init_from:
        return NOTHING
    report, *values = _read(config, trust, model, sharding)
    again = lambda: _read(config, trust, model, sharding)[1:]
    return Loaded(again, report).hold((values[0], values[1]))


def _read(
    config: FrozenConfigDict,
    trust: Sequence[str],
    model: FunctionalModel,
    sharding: Sharding | Mapping[str, NamedSharding],
) -> tuple[str, Values, Values]:
    """(report, parameters, other state)."""
    source = config.init_from
    params: Any
    state: Mapping[str, Any]
    elsewhere = weights.is_weights(source)
    rules = config.init_from_rules
    try:
        if elsewhere:
            params, tensors = weights.divided(_weights(config, model, source))
            state = {path: np.asarray(tensor) for path, tensor in tensors.items()}
        else:
            allowed = _trusted_in_source(config, trust)
            found = trained.read(source, trust=allowed, shardings=_spread(sharding))
            params, state = found.params, names.flatten(found.model_state)
        done = transfer.transfer(
            params,
            _abstract(model.params, sharding),
            include=rules.include,
            exclude=rules.exclude,
            rename=rules.rename,
        )
        values = names.flatten(done.params)
        loaded = {path: values[path] for path in done.loaded}
        if elsewhere:
            _check_finite(loaded, done.loaded)
            _check_finite(state, {path: f"model_state/{path}" for path in state})
    except UserError as error:
        raise UserError(f"init_from = {source!r}: {error}") from error
    wanted = names.flatten(_abstract(model.model_state, sharding))
    fitting = {
        path: jax.device_put(state[path], leaf.sharding)
        for path, leaf in wanted.items()
        if path in state and state[path].shape == leaf.shape and state[path].dtype == leaf.dtype
    }
    return done.report(), loaded, fitting


def _spread(
    sharding: Sharding | Mapping[str, NamedSharding],
) -> Callable[[str, ArrayRecord], Sharding | None] | None:
    """Returns how a source is read: split over all devices, wherever its arrays go from there.

    No device and no process holds more than its share of a source, whose arrays may have other
    names and other shapes than this model's.
    """
    if not isinstance(sharding, Mapping) or not sharding:
        return None
    mesh = next(iter(sharding.values())).mesh

    def place(name: str, record: ArrayRecord) -> Sharding:
        del name
        sizes = [n if n % mesh.size == 0 else 0 for n in record.shape]
        split = sizes.index(max(sizes)) if any(sizes) else len(sizes)
        return NamedSharding(mesh, P(*[None] * split, *([mesh.axis_names] if any(sizes) else ())))

    return place


def _weights(config: FrozenConfigDict, model: FunctionalModel, source: str) -> Mapping[str, Any]:
    """The tensors of a file or folder, under our names if they have those of a known layout."""
    found = weights.open_weights(source)
    layout = layouts.detect(found.tensors)
    if not layout:
        return found.tensors
    if config.model.name != layouts.MODELS[layout]:
        raise UserError(
            f"these are the weights of a {layouts.MODELS[layout]!r} (layout {layout}), "
            f"model.name is {config.model.name!r}"
        )
    foreign.check(layout, found.config, config.model)
    targets = {path: tuple(leaf.shape) for path, leaf in names.flatten(model.params).items()}
    return layouts.to_ours(layout, found.tensors, targets)


def _check_finite(loaded: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    bad = [path for path, value in loaded.items() if not bool(_all_finite(value))]
    if bad:
        where = ", ".join(sources[path] for path in bad[:5])
        raise UserError(f"{len(bad)} arrays hold values that are not finite: {where}")


@jax.jit
def _all_finite(value: jax.Array) -> jax.Array:
    return jnp.isfinite(value).all()


def placement(parts: Experiment) -> dict[str, NamedSharding]:
    """Returns where each of the model's parameters lies in a run: path to sharding.

    With several seeds it is that of one seed, copied along the mesh's seed axis.
    """
    leaves = names.flatten(parts.state.params) | names.flatten(parts.state.frozen)
    shardings = {path: leaf.sharding for path, leaf in leaves.items()}
    if parts.seeds.number == 1:
        return shardings
    return {
        path: NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
        for path, sharding in shardings.items()
    }


def _trusted_in_source(config: FrozenConfigDict, trust: Sequence[str]) -> tuple[str, ...]:
    named = [value for value in configs.flatten(config).values() if isinstance(value, str)]
    own = {name.partition(":")[0].partition(".")[0] for name in named if ":" in name}
    given = () if tuple(trust) == configs.EVERYONE else tuple(trust)
    return (*given, *sorted(own))


def _abstract(tree: Any, sharding: Sharding | Mapping[str, NamedSharding]) -> Any:
    def leaf(path: Any, value: Any) -> jax.ShapeDtypeStruct:
        place = sharding
        if isinstance(place, Mapping):
            whole = next((NamedSharding(s.mesh, P()) for s in place.values()), None)
            place = place.get(names.path_name(path), whole)
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=place)

    return jax.tree_util.tree_map_with_path(leaf, tree)
