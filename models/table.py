"""The models by name: what ``config.model.name`` may be."""

from lamina.models.convnet import convnet
from lamina.models.mlp import mlp
from lamina.models.resnet import resnet
from lamina.models.transformer import transformer
from lamina.models.vit import vit

MODELS = {
    "mlp": mlp,
    "convnet": convnet,
    "resnet": resnet,
    "vit": vit,
    "transformer": transformer,
}
"""Name to factory ``(rngs, spec, dtype, *, options) -> nnx.Module``."""
