"""Words for names that aren't known: the nearest one, and all."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable) -> str:
    """Returns " (did you mean 'x'?)" for the name most like `name`, or "".

    A dotted name is first looked for in its own block, and by the initials of the names there.

    Example:
        >>> nearest("optimizer.lr", ["optimizer.b2", "optimizer.learning_rate"])
        " (did you mean 'optimizer.learning_rate'?)"
    """
    every = [str(k) for k in known]
    block, dot, last = str(name).rpartition(".")
    inside = [k.removeprefix(block + dot) for k in every if k.rpartition(".")[0] == block]
    short = [k for k in inside if "_" in k and "".join(w[:1] for w in k.split("_")) == last]
    close = short or difflib.get_close_matches(last, inside, n=1)
    if close:
        return f" (did you mean {block + dot + close[0]!r}?)"
    # Elsewhere: a likeness that comes from the name of the block alone is none.
    ends = [k for k in every if difflib.get_close_matches(last, [k.rpartition(".")[2]])]
    close = difflib.get_close_matches(str(name), ends, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def separated(text: object) -> str:
    """Returns how several values are written, for text with commas that was meant so, or "".

    Example:
        >>> separated("sgd,adamw")
        "; several are written ('sgd', 'adamw')"
    """
    if not isinstance(text, str) or "," not in text:
        return ""
    return f"; several are written {split(text)}"


def split(text: str) -> tuple[str, ...]:
    """Returns the parts of text between commas, without the space around them."""
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def listing(names: Iterable) -> str:
    """Returns the names, sorted, with commas."""
    return ", ".join(sorted(map(str, names)))
