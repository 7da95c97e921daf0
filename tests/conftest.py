"""Settings of every test: eight virtual CPU devices, strict JAX, and a cache of compilations."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

FLAGS = ("--xla_force_host_platform_device_count=8",)
QUICK = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")
"""Of runs without the slow tests, whose time is mostly LLVM's; slow tests compile as users do."""
STRICT = ("sharding", "platform/data", "platform/checkpoints", "platform/merging")
"""Folders whose tests run without implicit promotion of dtypes: optax and Flax's norms need it."""


def _add_flags(*added: str) -> None:
    """Adds flags of XLA to those of the environment, which go before them."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.split("=")[0] for flag in flags}
    flags += [flag for flag in added if flag.split("=")[0] not in names]
    os.environ["XLA_FLAGS"] = " ".join(flags)


def _set_environment() -> None:
    """Sets what must stand before the first import of jax; subprocesses inherit it."""
    _add_flags(*FLAGS)
    cache = Path(tempfile.gettempdir()) / f"lamina-test-compilations-{os.getuid()}"
    os.environ.update(
        JAX_PLATFORMS="cpu",
        JAX_COMPILATION_CACHE_DIR=os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache)),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.3",
        JAX_NUMPY_RANK_PROMOTION="raise",
        MPLBACKEND="agg",
    )


_set_environment()


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "not slow":
        _add_flags(*QUICK)


@pytest.fixture(autouse=True)
def _strict_dtypes(request: pytest.FixtureRequest) -> Iterator[None]:
    folder = request.path.parent.relative_to(Path(__file__).parent)
    if not any(folder.is_relative_to(strict) for strict in STRICT):
        yield
        return
    import jax

    with jax.numpy_dtype_promotion("strict"):
        yield
