"""Imports of what a run needs only later, at times when Python has nothing else to do."""

import functools
import threading
from collections.abc import Callable

import jax

from lamina.platform.reporting import drawing, page


@functools.cache
def saving() -> None:
    """Imports, in a thread, what saves checkpoints: call it where data are read."""
    _start(_import_orbax)


@functools.cache
def reporting() -> None:
    """Imports, in a thread, what draws and writes the report: call it where XLA begins to compile.

    With that of `saving` it takes most of a second. While a program is traced, imports would take
    turns with the tracing at the interpreter; XLA doesn't need it.
    """
    _start(lambda: (_import_orbax(), drawing.load(), page.load("report.html")))


def _import_orbax() -> None:
    import orbax.checkpoint  # noqa: F401


def _start(imports: Callable[[], object]) -> None:
    if jax.process_index() == 0:
        threading.Thread(target=imports, name="lamina_imports").start()
