"""Decompositions and solutions that don't wait for each other on the threads of a processor."""

from collections.abc import Callable
from typing import Any

import jax


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of single matrices go through a batch of them one after another on CPUs.

    XLA's kernels of LAPACK (QR, SVD, eigh, LU, triangular solves, so `jnp.linalg.solve` too) hand
    the parts of a batch to the pool of threads on which they run, and block until these are done.
    As many of them at once as there are threads wait for each other forever: two leaves with
    stacked layers, or with seeds as a vmapped axis, are enough on two cores (jaxlib 0.10).
    A single matrix is computed where it is. On other platforms batches stay batches.

    Args:
        function: of arrays without batch dimensions; `jax.vmap` gives it some. What it returns
            can't be differentiated in reverse.

    Returns:
        The same function, with the same numbers.
    """
    # A lambda, since `sequential_vmap` takes a function's defaults for arrays too.
    alone = jax.custom_batching.sequential_vmap(lambda *arrays: function(*arrays))

    def each(*arrays: jax.Array) -> Any:
        return jax.lax.platform_dependent(*arrays, cpu=alone, default=function)

    return each
