"""What a run starts from: the weights of another run, of a checkpoint, or of a safetensors file."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import FrozenConfigDict

from lamina.models.functional import FunctionalModel
from lamina.platform import config as configs
from lamina.platform.checkpoints import exchange, names, transfer
from lamina.platform.errors import UserError
from lamina.platform.training import trained


class Loaded(NamedTuple):
    """Values that aren't drawn.

    Attributes:
        params: path to value.
        model_state: path to value.
        report: one line for the user, or "".
    """

    params: Mapping[str, jax.Array]
    model_state: Mapping[str, jax.Array]
    report: str = ""


NOTHING = Loaded({}, {})
"""Everything is drawn."""


def load(
    config: FrozenConfigDict,
    trust: Sequence[str],
    model: FunctionalModel,
    sharding: jax.sharding.Sharding,
) -> Loaded:
    """Returns what `init_from` and `init_from_rules` of the config give.

    Of a run with several seeds the first is taken. Batch statistics and the like come along where
    they fit.

    Args:
        config: resolved.
        trust: packages whose factories this config may name. The source may be somebody else's:
            its config may name only those given one by one, and those that this config names.
        model: the model to fill.
        sharding: where to put what is loaded.

    Raises:
        UserError: there is nothing to load, or it doesn't fit the model.
    """
    source = config.init_from
    if not source:
        return NOTHING
    state: Mapping[str, Any] = {}
    if source.endswith(".safetensors"):
        params: Any = exchange.import_tensors(source).arrays
    else:
        found = trained.read(source, trust=_trusted_in_source(config, trust))
        params, state = found.params, names.flatten(found.model_state)
    target = _abstract(model.params, sharding)
    rules = config.init_from_rules
    try:
        done = transfer.transfer(
            params, target, include=rules.include, exclude=rules.exclude, rename=rules.rename
        )
    except UserError as error:
        raise UserError(f"init_from = {source!r}: {error}") from error
    values = names.flatten(done.params)
    wanted = names.flatten(_abstract(model.model_state, sharding))
    fitting = {
        path: jax.device_put(state[path], sharding)
        for path, leaf in wanted.items()
        if path in state and state[path].shape == leaf.shape and state[path].dtype == leaf.dtype
    }
    return Loaded({path: values[path] for path in done.loaded}, fitting, done.report())


def _trusted_in_source(config: FrozenConfigDict, trust: Sequence[str]) -> tuple[str, ...]:
    named = [value for value in configs.flatten(config).values() if isinstance(value, str)]
    own = {name.partition(":")[0].partition(".")[0] for name in named if ":" in name}
    given = () if tuple(trust) == configs.EVERYONE else tuple(trust)
    return (*given, *sorted(own))


def _abstract(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
