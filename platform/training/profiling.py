"""A window of steps in which a profile is taken."""

import os

import jax

from lamina.platform.training.loop import Chunk
from lamina.platform.training.settings import Profile


class Profiler:
    """Starts and ends a trace at the chunks that hold the window's first and last step.

    Args:
        window: which steps to trace.
        workdir: the run folder; the trace goes to its `profile` folder.
    """

    def __init__(self, window: Profile, workdir: str):
        self._window = window
        self._folder = os.path.join(workdir, "profile")
        self._tracing = False

    def enter(self, chunk: Chunk) -> None:
        """Called before a chunk is dispatched."""
        first, end = self._window.start, self._window.start + self._window.steps
        if self._tracing and chunk.first >= end:
            self.close()
        if not self._tracing and self._window.steps and chunk.end > first and chunk.first < end:
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def close(self) -> None:
        """Ends a trace that is still open."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
