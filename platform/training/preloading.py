"""Imports of what a run needs only later, at a time when Python has nothing else to do."""

import functools
import threading

import jax

from lamina.platform.reporting import drawing, page


@functools.cache
def begin() -> None:
    """Imports, in a thread, what saves and draws: call it where XLA begins to compile.

    These imports take most of a second. While a program is traced they would take turns with the
    tracing at the interpreter; XLA doesn't need it.
    """
    if jax.process_index() == 0:
        threading.Thread(target=_imports, name="lamina_imports").start()


def _imports() -> None:
    import orbax.checkpoint  # noqa: F401

    drawing.load()
    page.load("report.html")
