"""Trained models as files that others can read: safetensors, and serialised predictions."""

import json
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from lamina.platform.checkpoints import exchange, layouts, names, safetensors
from lamina.platform.checkpoints.safetensors import Layout
from lamina.platform.data import feed as feeds
from lamina.platform.errors import UserError, writing
from lamina.platform.reporting import storage
from lamina.platform.training import foreign, trained
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
    exchange.export_params(path, tree, trained.describe(found))


def to_layout(found: Trained, out: str, layout: str, dtype: str = "float32") -> None:
    """Writes the parameters under the names and in the shapes of another library.

    Args:
        found: the trained model.
        out: a file (`*.safetensors`), or a folder, which gets `config.json` and
            `model.safetensors` as the other library reads them.
        layout: one of `layouts.LAYOUTS`.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        UserError: the layout is of another model or can't say what this one does, or the files
            can't be written.
    """
    config = found.config.model
    if config.name != layouts.MODELS[layout]:
        raise UserError(
            f"the layout {layout} is of the model {layouts.MODELS[layout]!r}, not {config.name!r}"
        )
    params = names.flatten(found.params)
    tensors = layouts.from_ours(layout, params)
    block = "layers/blocks/"
    stacked = {p: a.shape for p, a in params.items() if p.startswith(block)}
    numbers = {p.removeprefix(block).partition("/")[0] for p in stacked}
    scanned = not all(number.isdigit() for number in numbers)
    shapes: dict[str, Any] = {
        path.removeprefix(block) if scanned else path.removeprefix(block).partition("/")[2]: (
            shape[1:] if scanned else shape
        )
        for path, shape in stacked.items()
    }
    shapes["depth"] = next(iter(stacked.values()))[0] if scanned else len(numbers)
    described = foreign.describe(layout, config, shapes, found.spec) | {"dtype": dtype}
    wanted = jnp.dtype(dtype)
    sizes = {name: Layout(size.shape, wanted) for name, (size, _) in tensors.items()}
    file = out if out.endswith(".safetensors") else os.path.join(out, "model.safetensors")
    if file != out:
        with writing(out):
            text = json.dumps(described, indent=2) + "\n"
            storage.write_bytes(os.path.join(out, "config.json"), text.encode())
    metadata = {"format": "pt"}
    safetensors.write(file, sizes, lambda name: tensors[name][1]().astype(wanted), metadata)


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
