"""Packing loses no token and changes no loss; balancing evens out the ranks' work."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lamina.models.spec import DataSpec
from lamina.models.transformer import transformer
from lamina.platform.data import packing

LENGTHS = [3, 1, 14, 7, 30, 2, 2, 9]
CONTEXT = 16


def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(1, 20, n).astype(np.int32) for n in LENGTHS]


def test_every_token_is_predicted_once_and_no_row_is_too_long():
    packed = packing.pack(documents(), CONTEXT, separator=0)
    used = packed["segments"] > 0
    assert packed["inputs"].shape[1] == CONTEXT
    expected = np.concatenate([np.append(document, 0) for document in documents()])
    assert sorted(packed["labels"][used]) == sorted(expected)
    assert packed["weights"].sum() == len(expected)
    for row in range(len(used)):
        for segment in range(1, packed["segments"][row].max() + 1):
            place = np.flatnonzero(packed["segments"][row] == segment)
            assert (np.diff(place) == 1).all()
            np.testing.assert_array_equal(packed["positions"][row, place], np.arange(len(place)))


def test_the_packed_loss_is_the_unpacked_loss():
    spec = DataSpec((CONTEXT,), "int32", 20)
    model = transformer(nnx.Rngs(0), spec, jnp.float32, depth=2, embed=16, heads=2)
    model.eval()

    @jax.jit
    def losses(batch):
        logits = model(
            batch["inputs"], segments=batch["segments"], positions=batch["positions"]
        ).logits
        logprobs = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(logprobs, batch["labels"][..., None], -1)[..., 0]
        return -(picked * batch["weights"]).sum()

    whole = packing.pack(documents(), CONTEXT, separator=0)
    alone = [packing.pack([document], CONTEXT, separator=0) for document in documents()]
    np.testing.assert_allclose(losses(whole), sum(losses(batch) for batch in alone), rtol=1e-5)
