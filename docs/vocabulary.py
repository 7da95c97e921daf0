"""Writes the tables of configs.md from the code: `python docs/vocabulary.py`.

What stands between the two markers of that page is replaced; a test holds that it is up to date.
"""

import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lamina.platform import config as configs
from lamina.platform.data.augmentations import AUGMENTATIONS
from lamina.platform.multitask import settings as multitask
from lamina.platform.programs import benchmark, incremental, rebasin
from lamina.platform.programs.table import PROGRAMS
from lamina.platform.sweeps import rivals
from lamina.platform.sweeps import settings as sweeps
from lamina.platform.training import experiment, settings
from lamina.sharding.rules import PRESETS

PAGE = Path(__file__).parent / "configs.md"
START = "<!-- vocabulary: written by docs/vocabulary.py -->"
END = "<!-- end of the vocabulary -->"

ORDER = (
    "evaluation",
    "checkpoint",
    "early_stopping",
    "mesh",
    "sharding",
    "ema",
    "swa",
    "lawa",
    "adapters",
    "init_from_rules",
    "profile",
    "debug",
)
"""The blocks without a name, as the page shows them; new ones come after these."""


def vocabulary() -> str:
    """Returns the tables as Markdown."""
    schema = experiment.SCHEMA
    assert schema.settings is settings.Settings
    parts = ["### Top-level keys", *_keys(schema.settings)]
    own = {k: v for k, v in incremental.SCHEMA.kinds.items() if k not in schema.kinds}
    for name, kind in [*schema.kinds.items(), *own.items()]:
        parts += [f"### `{name}`", *_named(name, kind)]
    ordered = [*(n for n in ORDER if n in schema.blocks), *sorted(set(schema.blocks) - set(ORDER))]
    for name in ordered:
        parts += [f"### `{name}`", *_keys(schema.blocks[name])]
    parts += ["### `benchmark`", "Of the program `benchmark`, beside a whole incremental one."]
    parts += _keys(benchmark.Benchmark)
    parts += ["### `rebasin`", "Of the program `rebasin`, beside a whole training experiment."]
    parts += _keys(rebasin.Rebasin)
    parts += ["### `sweep`", "Of the program `sweep`, beside a whole training experiment."]
    parts += _keys(sweeps.Sweep)
    parts += ["### `merge`", "Of the program `merge`, beside the training of its base."]
    parts += _keys(multitask.Merge)
    parts += ["### `shootout`", "Of the program `shootout`, beside a whole training experiment."]
    parts += _keys(rivals.Shootout)
    return "\n\n".join(parts)


def _named(name: str, kind: configs.Kind) -> Iterator[str]:
    yield f'`{name}.name` is one of these, or `"package.module:factory"`.'
    if kind.shared is not None:
        yield from _keys(kind.shared, f"Keys that every `{name}` has:")
    if name == "optimizer":
        yield "Names: " + ", ".join(f"`{n}`" for n in kind.table) + "."
        yield (
            "Further keys are the plain parameters of the function behind a name: `lamina check` "
            "shows all with their defaults. Where optax takes None, 0 or `''` stands for it."
        )
        return
    yield _table(
        ("name", "keys and defaults", ""),
        [(f"`{n}`", _signature(f), _first_line(f)) for n, f in kind.table.items()],
    )
    if name == "data":
        yield "The names in `data.augmentations`, with their keys in `data.augmentation_options`:"
        yield _table(
            ("name", "keys and defaults", ""),
            [(f"`{n}`", _signature(f), _first_line(f)) for n, f in AUGMENTATIONS.items()],
        )


def _keys(factory: Callable, lead: str = "") -> Iterator[str]:
    yield lead or _first_line(factory)
    about = _documented(factory)
    rows = [
        (f"`{key}`", _type(option.type), _default(option), about.get(key, ""))
        for key, option in configs.options(factory).items()
    ]
    yield _table(("key", "type", "default", "meaning"), rows)
    if factory is settings.Settings:
        yield "Programs: " + ", ".join(f"`{n}`" for n in PROGRAMS) + "."
    if factory is settings.Sharding:
        heads = ("rules", "parameters", "optimizer state, where it differs", "activations")
        yield _table(
            heads,
            [
                (f"`{n}`", *map(_arrows, (rules.parameters, rules.state, rules.activations)))
                for n, rules in PRESETS.items()
            ],
        )


def _arrows(rules: Mapping[str, Any]) -> str:
    """Returns `logical axis → mesh axes`, with the logical axes that go to the same together."""
    together: dict[tuple[str, ...], list[str]] = {}
    for name, axes in rules.items():
        together.setdefault((axes,) if isinstance(axes, str) else tuple(axes), []).append(name)
    listed = lambda names: ", ".join(f"`{n}`" for n in names)
    return "; ".join(f"{listed(names)} → {listed(axes)}" for axes, names in together.items())


def _signature(factory: Callable) -> str:
    keys = configs.options(factory)
    return ", ".join(
        f"`{key}`" if option.default is configs.MISSING else f"`{key}={_shown(option.default)}`"
        for key, option in keys.items()
    )


def _default(option: configs.Option) -> str:
    return "needed" if option.default is configs.MISSING else f"`{_shown(option.default)}`"


def _shown(value: Any) -> str:
    if not isinstance(value, Mapping):
        return repr(value)
    return f"dict({', '.join(f'{key}={_shown(inner)}' for key, inner in value.items())})"


def _type(wanted: Any) -> str:
    if typing.get_origin(wanted) is typing.Literal:
        return ", ".join(f"`{value!r}`" for value in typing.get_args(wanted))
    if wanted in (Mapping, dict) or typing.get_origin(wanted) in (Mapping, dict):
        return "block"
    return f"`{wanted}`" if typing.get_args(wanted) else f"`{wanted.__name__}`"


def _first_line(thing: Any) -> str:
    line = _markdown((inspect.getdoc(thing) or "").partition("\n\n")[0])
    return re.sub(r"^(Returns|Builds) ", "", line)


def _documented(factory: Any) -> dict[str, str]:
    """Returns key to text, from the section Args or Attributes of a docstring."""
    found: dict[str, str] = {}
    inside, key = False, ""
    for line in (inspect.getdoc(factory) or "").splitlines():
        if not line.startswith(" "):
            inside = line in ("Args:", "Attributes:") or (inside and not line)
            continue
        entry = re.match(r"    (\w+): (.*)", line) if inside else None
        if entry:
            key = entry[1]
            found[key] = entry[2]
        elif inside and key:
            found[key] += " " + line.strip()
    return {key: _markdown(text) for key, text in found.items()}


def _markdown(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def updated(page: str) -> str:
    """Returns the page's text with the tables as the code has them now."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"{PAGE} lacks the markers {START!r} and {END!r}")
    return f"{before}{START}\n\n{vocabulary()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
