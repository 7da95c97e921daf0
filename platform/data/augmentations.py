"""Augmentations: pure functions `(key, batch) -> batch` that run inside the jitted step.

A factory takes the data's spec and its options. All draws have the shape of the global batch, so
they don't depend on the number of devices (the products of `mixup` may, in the last bit). Images
are float32 [B, H, W, C]; one letter each: `B` batch, `H` height, `W` width, `C` channels or
classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lamina.models.spec import DataSpec
from lamina.platform.errors import UserError

Batch = dict[str, jax.Array]
Augmentation = Callable[[jax.Array, Batch], Batch]


def pad_and_crop(spec: DataSpec, *, padding: int = 4) -> Augmentation:
    """Pads images with zeros and crops each back to its size at a random place.

    Args:
        spec: of the data.
        padding: pixels on each side; 4 as for CIFAR in He et al. 2015 (arXiv:1512.03385), 4.2.

    Raises:
        UserError: the data are no images, or the padding is negative.
    """
    height, width, _ = _image_shape(spec, "pad_and_crop")
    if padding < 0:
        raise UserError(f"pad_and_crop: padding = {padding} should be at least 0")

    def augment(key: jax.Array, batch: Batch) -> Batch:
        images = batch["inputs"]
        edges = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        padded = jnp.pad(images, edges)
        corner = jax.random.randint(key, (2, len(images)), 0, 2 * padding + 1)
        rows_BxH = corner[0][:, None] + jnp.arange(height)[None]
        columns_BxW = corner[1][:, None] + jnp.arange(width)[None]
        which = jnp.arange(len(images))[:, None, None]
        return batch | {"inputs": padded[which, rows_BxH[:, :, None], columns_BxW[:, None, :]]}

    return augment


def flip(spec: DataSpec, *, probability: float = 0.5) -> Augmentation:
    """Mirrors each image left to right with a probability.

    Args:
        spec: of the data.
        probability: of mirroring; one half, as in He et al. 2015 (arXiv:1512.03385), 4.2.

    Raises:
        UserError: the data are no images, or the probability is outside of [0, 1].
    """
    _image_shape(spec, "flip")
    if not 0 <= probability <= 1:
        raise UserError(f"flip: probability = {probability} should be from 0 to 1")

    def augment(key: jax.Array, batch: Batch) -> Batch:
        images = batch["inputs"]
        mirrored = jax.random.bernoulli(key, probability, (len(images), 1, 1, 1))
        return batch | {"inputs": jnp.where(mirrored, images[:, :, ::-1, :], images)}

    return augment


def mixup(spec: DataSpec, *, alpha: float = 0.2) -> Augmentation:
    """Mixes pairs of examples and their labels: `x = lam x_i + (1 - lam) x_j`, `y` likewise.

    `lam ~ Beta(alpha, alpha)` for each example, and `j` is a random permutation of the batch.
    Class labels become soft, float32 [B, C]. With weights the loss is the mixture of the two
    examples' weighted losses; an example of weight 0 (padding) is mixed into none.

    Args:
        spec: of the data; inputs must be real numbers.
        alpha: strength; 0.2, in the range 0.1 to 0.4 that the paper found best for ImageNet.

    Raises:
        UserError: the inputs are tokens, or alpha isn't positive.

    References:
        Zhang et al. 2017, mixup: Beyond Empirical Risk Minimization, arXiv:1710.09412.
    """
    if spec.input_dtype == "int32":
        raise UserError("mixup: tokens can't be mixed; use it for images and vectors")
    _check_alpha(alpha, "mixup")

    def augment(key: jax.Array, batch: Batch) -> Batch:
        inputs = batch["inputs"]
        pair_key, share_key = jax.random.split(key)
        partner = _partners(pair_key, batch)
        share_B = jax.random.beta(share_key, alpha, alpha, (len(inputs),), jnp.float32)
        share = share_B.reshape(-1, *(1,) * (inputs.ndim - 1))
        mixed = share * inputs + (1 - share) * inputs[partner]
        return batch | {"inputs": mixed} | _mixed_labels(batch, partner, share_B, spec.outputs)

    return augment


def cutmix(spec: DataSpec, *, alpha: float = 1.0) -> Augmentation:
    """Pastes a random box of another image, and mixes the labels by area.

    The box has `sqrt(1 - lam)` of each side, `lam ~ Beta(alpha, alpha)`, and a uniform centre; what
    hangs over the edge is cut off, and the labels' share is the area that remains. Labels and
    weights are as in `mixup`.

    Args:
        spec: of the data.
        alpha: 1, the paper's choice: a uniform `lam`.

    Raises:
        UserError: the data are no images, or alpha isn't positive.

    References:
        Yun et al. 2019, CutMix: Regularization Strategy to Train Strong Classifiers with
        Localizable Features, arXiv:1905.04899.
    """
    height, width, _ = _image_shape(spec, "cutmix")
    _check_alpha(alpha, "cutmix")

    def inside(key: jax.Array, share_B: jax.Array, length: int) -> jax.Array:
        """Returns bool [B, length]: the pixels of each box along one axis."""
        half = (jnp.sqrt(1 - share_B) * length).astype(jnp.int32) // 2
        centre = jax.random.randint(key, share_B.shape, 0, length)
        pixels = jnp.arange(length)[None]
        low, high = (centre - half)[:, None], (centre + half)[:, None]
        return (pixels >= low) & (pixels < high)

    def augment(key: jax.Array, batch: Batch) -> Batch:
        images = batch["inputs"]
        pair_key, share_key, row_key, column_key = jax.random.split(key, 4)
        partner = _partners(pair_key, batch)
        share_B = jax.random.beta(share_key, alpha, alpha, (len(images),), jnp.float32)
        rows_BxH = inside(row_key, share_B, height)
        columns_BxW = inside(column_key, share_B, width)
        box = (rows_BxH[:, :, None] & columns_BxW[:, None, :])[..., None]
        area_B = rows_BxH.sum(1) * columns_BxW.sum(1)
        left_B = 1 - area_B.astype(jnp.float32) / (height * width)
        mixed = jnp.where(box, images[partner], images)
        return batch | {"inputs": mixed} | _mixed_labels(batch, partner, left_B, spec.outputs)

    return augment


AUGMENTATIONS: dict[str, Callable[..., Augmentation]] = {
    "cutmix": cutmix,
    "flip": flip,
    "mixup": mixup,
    "pad_and_crop": pad_and_crop,
}


def _image_shape(spec: DataSpec, name: str) -> tuple[int, int, int]:
    if len(spec.input_shape) != 3 or spec.input_dtype == "int32":
        raise UserError(
            f"{name} is for images [height, width, channels], and the examples are "
            f"{spec.input_dtype} {list(spec.input_shape)}: take it out of data.augmentations"
        )
    height, width, channels = spec.input_shape
    return height, width, channels


def _check_alpha(alpha: float, name: str) -> None:
    if not alpha > 0:
        raise UserError(f"{name}: alpha = {alpha} should be above 0; leave {name} out for none")


def _partners(key: jax.Array, batch: Batch) -> jax.Array:
    """Returns int [B]: a random pairing, in which whoever would meet padding meets itself."""
    own = jnp.arange(len(batch["inputs"]))
    partner = jax.random.permutation(key, len(own))
    weights = batch.get("weights")
    if weights is None:
        return partner
    return jnp.where((weights > 0) & (weights[partner] > 0), partner, own)


def _mixed_labels(batch: Batch, partner: jax.Array, share_B: jax.Array, classes: int) -> Batch:
    """Returns soft "labels" float32 [B, C], and "weights" where the batch has them."""
    labels = batch["labels"]
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        labels = jax.nn.one_hot(labels, classes, dtype=jnp.float32)
    weights = batch.get("weights")
    if weights is None:
        share = share_B[:, None]
        return {"labels": share * labels + (1 - share) * labels[partner]}
    # The pair's loss is own l(y_i) + other l(y_j): as one example, weight own + other.
    own, other = share_B * weights, (1 - share_B) * weights[partner]
    total = own + other
    part = jnp.where(total > 0, own / jnp.where(total > 0, total, 1), 1.0)[:, None]
    return {"labels": part * labels + (1 - part) * labels[partner], "weights": total}
