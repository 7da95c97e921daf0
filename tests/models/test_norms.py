"""The norms, against Flax's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lamina.models import norms

X = 3 + 2 * jax.random.normal(jax.random.key(0), (4, 3, 5, 16))
PAIRS = {
    "layer": (norms.LayerNorm, lambda r: nnx.LayerNorm(16, epsilon=1e-6, rngs=r)),
    "rms": (norms.RMSNorm, lambda r: nnx.RMSNorm(16, epsilon=1e-6, rngs=r)),
    "group": (norms.GroupNorm, lambda r: nnx.GroupNorm(16, num_groups=4, epsilon=1e-5, rngs=r)),
    "batch": (norms.BatchNorm, lambda r: nnx.BatchNorm(16, momentum=0.9, epsilon=1e-5, rngs=r)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_equals_flax_in_training_and_then_in_evaluation(name):
    make, reference = PAIRS[name]
    ours, theirs = make(nnx.Rngs(0), 16, jnp.float32), reference(nnx.Rngs(0))
    for module in (ours, theirs):
        module.scale[...] = jnp.linspace(0.5, 2.0, 16)
        if name != "rms":
            module.bias[...] = jnp.linspace(-1.0, 1.0, 16)
    np.testing.assert_allclose(ours(X), theirs(X), rtol=1e-4, atol=1e-5)
    ours.eval()
    theirs.eval()
    np.testing.assert_allclose(ours(X), theirs(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_statistics_are_float32_for_bfloat16_inputs(name):
    x = (1000 + 4 * jnp.sign(X - 3)).astype(jnp.bfloat16)
    low = PAIRS[name][0](nnx.Rngs(0), 16, jnp.bfloat16)(x)
    full = PAIRS[name][0](nnx.Rngs(0), 16, jnp.float32)(x.astype(jnp.float32))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), full, rtol=0.01, atol=0.01)
