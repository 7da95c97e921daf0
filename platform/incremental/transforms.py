"""Transforms of a stream's inputs, one for each experience, as taps of the pixels.

Letters: E experiences, P pixels (times channels), K taps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lamina.platform.data import order
from lamina.platform.errors import UserError


class Transform(NamedTuple):
    """Each new pixel is a weighted sum of old ones.

    Attributes:
        source: int32 [E, P, K]: of the old pixels.
        weight: float32 [E, P, K]; [E, P, 0] for a permutation, which changes no value.
    """

    source: np.ndarray
    weight: np.ndarray


def apply(transform: Transform, inputs: jax.Array, experience: jax.Array) -> jax.Array:
    """Returns the inputs [B, ...] as an experience has them.

    Args:
        transform: of all experiences.
        inputs: any shape whose examples have P numbers.
        experience: int32 [] or [B], one for each example.
    """
    flat = inputs.reshape(len(inputs), -1)
    index, weight = jnp.asarray(transform.source), jnp.asarray(transform.weight)
    index_BxPxK = jnp.broadcast_to(index[experience], (len(flat), *index.shape[1:]))
    taken = jax.vmap(lambda row, taps: row[taps])(flat, index_BxPxK)
    if not weight.shape[-1]:
        return taken[..., 0].reshape(inputs.shape)
    scale = np.float32(1 / 255) if inputs.dtype == jnp.uint8 else np.float32(1)
    weight_BxPxK = jnp.broadcast_to(weight[experience], taken.shape)
    moved = jnp.sum(taken.astype(jnp.float32) * weight_BxPxK, axis=-1) * scale
    return moved.reshape(inputs.shape)


def permuted(
    shape: tuple[int, ...], experiences: int, seed: int, first_unchanged: bool
) -> Transform:
    """Returns one permutation of the pixels for each experience."""
    pixels = int(np.prod(shape))
    key = order.seed_for(seed, 4 << 32)
    rows = [np.asarray(order.permutation(pixels, key, number)) for number in range(experiences)]
    if first_unchanged:
        rows[0] = np.arange(pixels)
    index = np.stack(rows).astype(np.int32)[..., None]
    return Transform(index, np.zeros((experiences, pixels, 0), np.float32))


def rotated(
    shape: tuple[int, ...], experiences: int, seed: int, first_unchanged: bool
) -> Transform:
    """Returns a rotation by an angle from U[0, 180) for each experience.

    Raises:
        UserError: the inputs are no images [H, W, channels].
    """
    if len(shape) != 3:
        raise UserError(f"stream.transform = 'rotated' needs images, not inputs of shape {shape}")
    draws = np.random.Generator(np.random.Philox(key=order.seed_for(seed, 5 << 32)))
    angles = draws.uniform(0.0, 180.0, experiences)
    if first_unchanged:
        angles[0] = 0.0
    return rotation(shape, angles)


def rotation(shape: tuple[int, ...], degrees: np.ndarray) -> Transform:
    """Returns rotations about the image's centre, bilinear, with zeros outside.

    Args:
        shape: (height, width, channels).
        degrees: [E], counter-clockwise.
    """
    height, width, channels = shape
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    y, x = rows - (height - 1) / 2, columns - (width - 1) / 2
    index = np.zeros((len(degrees), height, width, channels, 4), np.int32)
    weight = np.zeros(index.shape, np.float32)
    for number, angle in enumerate(np.deg2rad(degrees)):
        source_y = np.cos(angle) * y + np.sin(angle) * x + (height - 1) / 2
        source_x = -np.sin(angle) * y + np.cos(angle) * x + (width - 1) / 2
        low_y, low_x = np.floor(source_y), np.floor(source_x)
        for tap, (step_y, step_x) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
            at_y, at_x = low_y + step_y, low_x + step_x
            share = (1 - np.abs(source_y - at_y)) * (1 - np.abs(source_x - at_x))
            inside = (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
            place = np.where(inside, at_y * width + at_x, 0).astype(np.int32)
            for channel in range(channels):
                index[number, :, :, channel, tap] = place * channels + channel
                weight[number, :, :, channel, tap] = np.where(inside, share, 0)
    pixels = height * width * channels
    return Transform(
        index.reshape(len(degrees), pixels, 4), weight.reshape(len(degrees), pixels, 4)
    )
