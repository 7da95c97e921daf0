"""Residual networks (He et al. 2016, arXiv 1512.03385) for small and for large images."""

import jax
import jax.numpy as jnp
from flax import nnx

from lamina.models.convolution import Conv
from lamina.models.layers import head
from lamina.models.norms import image_norm
from lamina.models.spec import DataSpec, Output, require_image, require_sizes

#: Blocks of each stage, and whether they are bottlenecks (He et al. 2016, table 1 and section 4.2).
PRESETS: dict[str, tuple[tuple[int, ...], bool, int]] = {
    "resnet18": ((2, 2, 2, 2), False, 64),
    "resnet34": ((3, 4, 6, 3), False, 64),
    "resnet50": ((3, 4, 6, 3), True, 64),
    "resnet101": ((3, 4, 23, 3), True, 64),
    "resnet20": ((3, 3, 3), False, 16),
    "resnet32": ((5, 5, 5), False, 16),
    "resnet56": ((9, 9, 9), False, 16),
}
EXPANSION = 4


class Block(nnx.Module):
    """A residual block: two 3x3 convolutions, or a bottleneck of 1x1, 3x3 (strided) and 1x1."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        inputs: int,
        width: int,
        stride: int,
        bottleneck: bool,
        dtype: jnp.dtype,
        norm: str,
        lowering: str,
    ):
        outputs = width * EXPANSION if bottleneck else width
        if bottleneck:
            plan = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        else:
            plan = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        self.convolutions = nnx.List(
            Conv(rngs, a, b, (k, k), dtype, stride=s, lowering=lowering) for a, b, k, s in plan
        )
        self.norms = nnx.List(
            image_norm(norm, rngs, b, dtype, zero_scale=number == len(plan) - 1)
            for number, (_, b, _, _) in enumerate(plan)
        )
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.shortcut = Conv(
                rngs, inputs, outputs, (1, 1), dtype, stride=stride, lowering=lowering
            )
            self.shortcut_norm = image_norm(norm, rngs, outputs, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[B, H, W, C]`` to ``[B, H / stride, W / stride, C']``."""
        shortcut = self.shortcut_norm(self.shortcut(x)) if self.projects else x
        last = len(self.convolutions) - 1
        for number, (convolution, norm) in enumerate(
            zip(self.convolutions, self.norms, strict=True)
        ):
            x = norm(convolution(x))
            if number < last:
                x = jax.nn.relu(x)
        return jax.nn.relu(x + shortcut)


class ResNet(nnx.Module):
    """A stem, stages of residual blocks, average pooling and a head; see ``resnet``."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        spec: DataSpec,
        dtype: jnp.dtype,
        blocks: tuple[int, ...],
        bottleneck: bool,
        width: int,
        stem: str,
        norm: str,
        dropout: float,
        lowering: str,
    ):
        _, _, inputs = require_image(spec, "resnet")
        self.large = stem == "imagenet"
        kernel, stride = ((7, 7), 2) if self.large else ((3, 3), 1)
        self.stem = Conv(rngs, inputs, width, kernel, dtype, stride=stride, lowering=lowering)
        self.stem_norm = image_norm(norm, rngs, width, dtype)
        self.blocks = nnx.List()
        channels = width
        for stage, count in enumerate(blocks):
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                wide = width * 2**stage
                self.blocks.append(
                    Block(rngs, channels, wide, stride, bottleneck, dtype, norm, lowering)
                )
                channels = wide * (EXPANSION if bottleneck else 1)
        self.dropout = nnx.Dropout(dropout)
        self.head = head(rngs, channels, spec.outputs, dtype)

    def __call__(self, inputs: jax.Array, *, rngs: nnx.Rngs | None = None) -> Output:
        """Maps ``[B, H, W, C]`` to logits ``[B, outputs]``."""
        x = jax.nn.relu(self.stem_norm(self.stem(inputs)))
        if self.large:
            x = nnx.max_pool(x, (3, 3), (2, 2), "SAME")
        for block in self.blocks:
            x = block(x)
        features = self.dropout(x.mean((1, 2), dtype=jnp.float32).astype(x.dtype), rngs=rngs)
        return Output(self.head(features).astype(jnp.float32), features)


def resnet(
    rngs: nnx.Rngs,
    spec: DataSpec,
    dtype: jnp.dtype,
    *,
    preset: str = "resnet18",
    blocks: tuple[int, ...] = (),
    width: int = 0,
    stem: str = "auto",
    norm: str = "batch",
    dropout: float = 0.0,
    lowering: str = "auto",
) -> ResNet:
    """Builds a residual network.

    Convolutions start after He et al. 2015, the last norm of each block at zero (Goyal et al.
    2017). Strides of bottlenecks are on the 3x3 convolution ("v1.5").

    Args:
        rngs: random streams.
        spec: the data; images only.
        dtype: compute dtype.
        preset: "resnet18", "resnet34", "resnet50", "resnet101", or the narrow networks for CIFAR
            "resnet20", "resnet32", "resnet56". Shortcuts that change shape are 1x1 convolutions
            in all of them. Default: "resnet18".
        blocks: blocks of each stage; () takes the preset's.
        width: channels of the first stage; 0 takes the preset's.
        stem: "imagenet" (7x7 of stride 2 and max pooling), "cifar" (3x3), or "auto": "cifar" for
            images of less than 96 pixels. Default: "auto".
        norm: "batch", "group" or "none". Default: "batch".
        dropout: rate before the head. Default: 0.
        lowering: how to run convolutions, see ``lamina.models.convolution``. Default: "auto".

    Raises:
        ValueError: the examples are no images, or an option is unknown.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown resnet preset {preset!r}; it may be one of {sorted(PRESETS)}")
    if stem not in ("auto", "imagenet", "cifar"):
        raise ValueError(f"unknown stem {stem!r}; it may be 'auto', 'imagenet' or 'cifar'")
    height, width_of_image, _ = require_image(spec, "resnet")
    if stem == "auto":
        stem = "cifar" if min(height, width_of_image) < 96 else "imagenet"
    preset_blocks, bottleneck, preset_width = PRESETS[preset]
    require_sizes(dropout, blocks=tuple(blocks), width=width or preset_width)
    return ResNet(
        rngs,
        spec,
        dtype,
        tuple(blocks) or preset_blocks,
        bottleneck,
        width or preset_width,
        stem,
        norm,
        dropout,
        lowering,
    )
