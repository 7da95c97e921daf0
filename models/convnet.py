"""A small convolutional network for small images."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from lamina.models.convolution import Conv, max_pool
from lamina.models.layers import head
from lamina.models.norms import image_norm
from lamina.models.spec import DataSpec, Output, require_image, require_sizes


class ConvNet(nnx.Module):
    """Stages of convolution, norm, ReLU and pooling; see ``convnet``."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        spec: DataSpec,
        dtype: jnp.dtype,
        channels: tuple[int, ...],
        norm: str,
        dropout: float,
        lowering: str,
    ):
        _, _, inputs = require_image(spec, "convnet")
        sizes = (inputs, *channels)
        options = {"bias": norm == "none", "lowering": lowering}
        self.convolutions = nnx.List(
            Conv(rngs, a, b, (3, 3), dtype, **options) for a, b in itertools.pairwise(sizes)
        )
        self.norms = nnx.List(image_norm(norm, rngs, b, dtype) for b in channels)
        self.dropout = nnx.Dropout(dropout)
        self.head = head(rngs, sizes[-1], spec.outputs, dtype)

    def __call__(self, inputs: jax.Array, *, rngs: nnx.Rngs | None = None) -> Output:
        """Maps ``[B, H, W, C]`` to logits ``[B, outputs]``."""
        x, last = inputs, len(self.convolutions) - 1
        for number, (convolution, norm) in enumerate(
            zip(self.convolutions, self.norms, strict=True)
        ):
            x = jax.nn.relu(norm(convolution(x)))
            if number < last and min(x.shape[1:3]) >= 4:
                x = max_pool(x)
        features = self.dropout(x.mean((1, 2), dtype=jnp.float32).astype(x.dtype), rngs=rngs)
        return Output(self.head(features).astype(jnp.float32), features)


def convnet(
    rngs: nnx.Rngs,
    spec: DataSpec,
    dtype: jnp.dtype,
    *,
    width: int = 32,
    stages: int = 3,
    norm: str = "batch",
    dropout: float = 0.0,
    lowering: str = "auto",
) -> ConvNet:
    """Builds a convnet: 3x3 convolutions of ``width``, 2 ``width``, 4 ``width``... channels.

    Between two stages the image is halved by max pooling, as long as it has 4 rows; the last is
    averaged over its pixels. Convolutions start after He et al. 2015. The architecture is the
    plain one of Springenberg et al. 2015, smaller, with norms.

    Args:
        rngs: random streams.
        spec: the data; images only.
        dtype: compute dtype.
        width: channels of the first stage; doubled in each further one. Default: 32.
        stages: number of convolutions. Default: 3.
        norm: "batch", "group" or "none". Default: "batch".
        dropout: rate before the head. Default: 0.
        lowering: how to run convolutions, see ``lamina.models.convolution``. Default: "auto".

    Raises:
        ValueError: the examples are no images, or an option is unknown.

    Example:
        >>> spec = DataSpec((8, 8, 1), "float32", 10)
        >>> convnet(nnx.Rngs(0), spec, jnp.float32, width=4)(jnp.ones((2, 8, 8, 1))).logits.shape
        (2, 10)
    """
    require_sizes(dropout, stages=stages, width=width)
    channels = tuple(width * 2**stage for stage in range(stages))
    return ConvNet(rngs, spec, dtype, channels, norm, dropout, lowering)
