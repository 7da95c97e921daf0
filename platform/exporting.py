"""Trained models as files that others can read: safetensors, and serialised predictions."""

import json

import jax
import jax.numpy as jnp
from jax import export

from lamina.platform import config as configs
from lamina.platform.checkpoints import exchange
from lamina.platform.data import feed as feeds
from lamina.platform.errors import writing
from lamina.platform.reporting import storage
from lamina.platform.training import trained
from lamina.platform.training.trained import Trained


def weights(found: Trained, path: str) -> None:
    """Writes the parameters (and batch statistics, under `model_state/`) as safetensors.

    Args:
        found: the trained model.
        path: the file.

    Raises:
        UserError: the file can't be written.
    """
    tree = dict(found.params)
    if found.model_state:
        tree["model_state"] = found.model_state
    metadata = {
        "format": "lamina",
        "model": json.dumps(configs.thaw(found.config.model)),
        "spec": json.dumps(trained.describe_spec(found.spec)),
        "step": str(found.step),
        "seed": str(found.seed),
    }
    exchange.export_params(path, tree, metadata)


def prediction(found: Trained, path: str) -> None:
    """Writes `inputs [B, ...] -> logits` with its weights, for any batch size B.

    Read it with `jax.export.deserialize(open(path, "rb").read()).call(inputs)`; it runs on CPU, GPU
    and TPU.

    Args:
        found: the trained model.
        path: the file.

    Raises:
        UserError: the file can't be written.
    """

    def predict(inputs: jax.Array) -> jax.Array:
        batch = feeds.normalise({"inputs": inputs})
        output, _ = found.model.apply(found.params, found.model_state, batch["inputs"], train=False)
        return output.logits

    (size,) = export.symbolic_shape("B")
    dtype = jnp.dtype(found.spec.input_dtype)
    inputs = jax.ShapeDtypeStruct((size, *found.spec.input_shape), dtype)
    exported = export.export(jax.jit(predict), platforms=("cpu", "cuda", "tpu"))(inputs)
    with writing(path):
        storage.write_bytes(path, bytes(exported.serialize()))
