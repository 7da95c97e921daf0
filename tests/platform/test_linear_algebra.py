"""Tests of decompositions that don't wait for each other."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina.platform.linear_algebra import one_by_one

FUNCTIONS = {
    "eigh": jnp.linalg.eigh,
    "qr": jnp.linalg.qr,
    "solve": jnp.linalg.solve,
    "svd": jnp.linalg.svd,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batches_have_the_numbers_of_single_matrices(name):
    function = FUNCTIONS[name]
    square = jax.random.normal(jax.random.key(0), (3, 2, 5, 5))
    square = square @ jnp.swapaxes(square, -1, -2)
    arguments = (square, square[..., 0]) if name == "solve" else (square,)
    batched = jax.jit(jax.vmap(jax.vmap(one_by_one(function))))(*arguments)
    for i, j in np.ndindex(3, 2):
        alone = function(*(each[i, j] for each in arguments))
        jax.tree.map(
            lambda whole, one, i=i, j=j: np.testing.assert_allclose(
                whole[i, j], one, rtol=1e-4, atol=1e-4
            ),
            tuple(batched) if isinstance(batched, tuple) else batched,
            tuple(alone) if isinstance(alone, tuple) else alone,
        )


def test_only_processors_go_through_a_batch_one_by_one():
    function = jax.jit(jax.vmap(one_by_one(jnp.linalg.qr)))
    shape = jax.ShapeDtypeStruct((3, 4, 4), jnp.float32)
    assert "stablehlo.while" in function.trace(shape).lower(lowering_platforms=("cpu",)).as_text()
    text = function.trace(shape).lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.while" not in text
    assert "3x4x4" in text


MANY_AT_ONCE = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax, jax.numpy as jnp
from lamina.platform import merging, optimizers

keys = jax.random.split(jax.random.key(0), 24)
stacked = {str(i): jax.random.normal(key, (5, 96, 96)) for i, key in enumerate(keys)}

soap = optimizers.create("soap", learning_rate=1e-3, precondition_every=1)
def step(params):
    state = soap.init(params)
    for _ in range(2):
        updates, state = soap.update(params, state, params)
    return updates
jax.block_until_ready(jax.jit(jax.vmap(step))(stacked))

axes = {name: ("layers", "embed", "mlp") for name in stacked}
models = [jax.tree.map(lambda x, n=n: x + n, stacked) for n in range(3)]
jax.block_until_ready(merging.create("iso_c")(models, base=stacked, axes=axes))
grams = [{name: x @ x.mT for name, x in model.items()} for model in models]
jax.block_until_ready(merging.create("regmean")(models, axes=axes, grams=grams))
print("done")
"""


@pytest.mark.slow
def test_stacks_of_many_kernels_at_once_do_not_stand_still_on_two_cores():
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", MANY_AT_ONCE],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "done\n", done.stderr
