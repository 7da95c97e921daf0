"""Words for names that aren't known: the nearest one, and all."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable) -> str:
    """Returns " (did you mean 'x'?)" for the name most like `name`, or ""."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def listing(names: Iterable) -> str:
    """Returns the names, sorted, with commas."""
    return ", ".join(sorted(map(str, names)))
