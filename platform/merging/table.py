"""The table of merging methods, and how a name becomes a merger."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lamina.platform.config import EVERYONE, Kind, NoSettings, Schema, build, resolve
from lamina.platform.errors import UserError
from lamina.platform.merging import averages, rebasin, soup, sparse, spectral, with_data
from lamina.platform.merging.method import Method

if TYPE_CHECKING:
    from lamina.platform.merging.mergers import Merger

MERGERS: Mapping[str, Callable[..., Any]] = {
    "adamerging": with_data.adamerging,
    "dare": sparse.dare,
    "dare_l1": sparse.dare_l1,
    "fisher": with_data.fisher,
    "greedy_soup": soup.greedy_soup,
    "iso_c": spectral.iso_c,
    "linear": averages.linear,
    "model_stock": averages.model_stock,
    "regmean": with_data.regmean,
    "slerp": averages.slerp,
    "task_arithmetic": averages.task_arithmetic,
    "ties": sparse.ties,
    "ties_per_tensor": sparse.ties_per_tensor,
    "weight_matching": rebasin.weight_matching,
}
"""Name to factory: its keyword-only parameters are the method's keys, and it returns a `Method`,
or a `Merger` where tensors can't be merged one by one."""

_KEY = "merge"
_SCHEMA = Schema(NoSettings, {}, {_KEY: Kind(MERGERS)})


def bind(name: str, keys: Mapping[str, Any]) -> Any:
    """Returns what the factory called `name` makes of the keys.

    Raises:
        UserError: there is no such method, a key is unknown, missing, mistyped or out of range, or
            a factory of the user's gives something else.
    """
    given = {key: _plain(value) for key, value in keys.items()}
    resolved = resolve({_KEY: {"name": name, **given}}, _SCHEMA)
    made = build(resolved[_KEY], _SCHEMA.kinds[_KEY], _KEY, EVERYONE)
    if not hasattr(made, "needs"):
        raise UserError(f"{name} gives a {type(made).__name__}, where a Method or Merger should be")
    return made


def _plain(value: Any) -> Any:
    """Returns a number of numpy's or jax's, or an array of one, as Python's."""
    if getattr(value, "shape", None) != ():
        return value
    try:
        return value.item()
    except TypeError:  # it is being traced: no key can be
        return value


def create(name: str, **keys: Any) -> "Merger":
    """As `lamina.platform.merging.create`."""
    from lamina.platform.merging.mergers import leafwise

    made = bind(name, keys)
    return leafwise(name, made) if isinstance(made, Method) else made
