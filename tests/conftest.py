"""Settings of every test: eight virtual CPU devices, strict JAX, and a cache of compilations."""

import os
import tempfile
from pathlib import Path

FLAGS = ("--xla_force_host_platform_device_count=8",)


def _set_environment() -> None:
    """Sets what must stand before the first import of jax; subprocesses inherit it."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.split("=")[0] for flag in flags}
    flags += [flag for flag in FLAGS if flag.split("=")[0] not in names]
    cache = Path(tempfile.gettempdir()) / f"lamina-test-compilations-{os.getuid()}"
    os.environ.update(
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=" ".join(flags),
        JAX_COMPILATION_CACHE_DIR=os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache)),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.3",
        JAX_NUMPY_RANK_PROMOTION="raise",
        MPLBACKEND="agg",
    )


_set_environment()
