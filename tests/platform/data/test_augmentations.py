"""Augmentations change what they say, keep labels and weights right, and ignore device counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lamina.models.spec import DataSpec
from lamina.platform.data.augmentations import AUGMENTATIONS, cutmix, flip, mixup, pad_and_crop
from lamina.platform.errors import UserError

SPEC = DataSpec((8, 6, 3), "float32", 5)
B = 16
KEY = jax.random.key(0)


@pytest.fixture
def batch():
    images = np.random.default_rng(0).uniform(size=(B, *SPEC.input_shape)).astype(np.float32)
    return {"inputs": jnp.asarray(images), "labels": jnp.arange(B, dtype=jnp.int32) % 5}


def test_flip_mirrors_some_images_and_twice_is_the_identity(batch):
    augment = flip(SPEC)
    once = augment(KEY, batch)["inputs"]
    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(once, batch["inputs"], strict=True)]
    kept = [np.array_equal(a, b) for a, b in zip(once, batch["inputs"], strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))
    assert 0 < sum(mirrored) < B
    assert np.array_equal(augment(KEY, augment(KEY, batch))["inputs"], batch["inputs"])


def test_flip_keeps_to_its_probability(batch):
    assert np.array_equal(flip(SPEC, probability=0.0)(KEY, batch)["inputs"], batch["inputs"])
    always = flip(SPEC, probability=1.0)(KEY, batch)["inputs"]
    assert np.array_equal(always, batch["inputs"][:, :, ::-1])


def test_crops_are_windows_of_the_padded_image(batch):
    cropped = np.asarray(pad_and_crop(SPEC, padding=2)(KEY, batch)["inputs"])
    places = set()
    for before, after in zip(np.asarray(batch["inputs"]), cropped, strict=True):
        padded = np.pad(before, ((2, 2), (2, 2), (0, 0)))
        found = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.array_equal(padded[y : y + 8, x : x + 6], after)
        ]
        assert len(found) == 1
        places.update(found)
    assert len(places) > 5


def test_no_padding_crops_nothing(batch):
    same = pad_and_crop(SPEC, padding=0)(KEY, batch)
    assert np.array_equal(same["inputs"], batch["inputs"])


@pytest.mark.parametrize("make", [mixup, cutmix])
def test_mixed_labels_are_distributions(batch, make):
    labels = make(SPEC)(KEY, batch)["labels"]
    assert labels.shape == (B, 5)
    assert labels.dtype == jnp.float32
    np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-6)
    assert (labels >= 0).all()
    assert (labels.max(1) < 1).any()


@pytest.mark.parametrize("make", [mixup, cutmix])
def test_labels_are_mixed_in_the_proportion_of_the_pixels(make):
    # Example i is the constant image i and its own class, so both shares can be read off.
    spec = DataSpec((16, 16, 1), "float32", B)
    values = jnp.arange(B, dtype=jnp.float32)
    images = jnp.broadcast_to(values[:, None, None, None], (B, 16, 16, 1))
    mixed = make(spec, alpha=1.0)(KEY, {"inputs": images, "labels": jnp.arange(B)})
    mean_of_pixels = mixed["inputs"].mean((1, 2, 3))
    np.testing.assert_allclose(mixed["labels"] @ values, mean_of_pixels, rtol=1e-4)
    assert (mixed["labels"].max(1) < 0.999).sum() > B // 2


def test_cutmix_pastes_a_rectangle():
    spec = DataSpec((16, 16, 1), "float32", B)
    images = jnp.broadcast_to(jnp.arange(B, dtype=jnp.float32)[:, None, None, None], (B, 16, 16, 1))
    mixed = np.asarray(cutmix(spec)(KEY, {"inputs": images, "labels": jnp.arange(B)})["inputs"])
    for i, image in enumerate(mixed[..., 0]):
        pasted = image != i
        assert np.array_equal(pasted, np.outer(pasted.any(1), pasted.any(0)))
        assert len(np.unique(image[pasted])) <= 1


@pytest.mark.parametrize("make", [mixup, cutmix])
def test_padding_is_mixed_into_no_example(batch, make):
    weights = jnp.arange(B) % 2
    batch = batch | {"weights": weights.astype(jnp.float32)}
    batch["inputs"] = jnp.where(weights[:, None, None, None] > 0, batch["inputs"], jnp.nan)
    mixed = jax.jit(make(SPEC))(KEY, batch)
    assert np.array_equal(mixed["weights"] > 0, weights > 0)
    assert jnp.isfinite(mixed["inputs"][1::2]).all()
    np.testing.assert_allclose(mixed["labels"].sum(1), 1, rtol=1e-6)


def test_mixup_keeps_the_weighted_loss_of_the_pairs(batch):
    batch = batch | {"weights": jnp.linspace(0.5, 2.0, B)}
    mixed = mixup(SPEC, alpha=1.0)(KEY, batch)
    pair_key, share_key = jax.random.split(KEY)
    partner = jax.random.permutation(pair_key, B)
    share = jax.random.beta(share_key, 1.0, 1.0, (B,))
    losses = jnp.arange(5.0)  # of each class
    own = batch["weights"] * losses[batch["labels"]]
    expected = share * own + (1 - share) * own[partner]
    actual = mixed["weights"] * (mixed["labels"] @ losses)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_soft_labels_are_mixed_as_they_are(batch):
    soft = jax.nn.one_hot(batch["labels"], 5) * 0.9 + 0.02
    mixed = mixup(SPEC)(KEY, batch | {"labels": soft})["labels"]
    np.testing.assert_allclose(mixed.sum(1), 1, rtol=1e-6)
    assert mixed.max() < 0.93


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_results_do_not_depend_on_the_number_of_devices(batch, name):
    if jax.device_count() < 2:
        pytest.skip("needs several devices (conftest asks for them)")
    augment = jax.jit(AUGMENTATIONS[name](SPEC))
    devices = np.array(jax.devices()[:2])
    split = NamedSharding(Mesh(devices, ("data",)), P("data"))
    one = augment(KEY, batch)
    two = augment(KEY, jax.device_put(batch, split))
    for field in one:
        # Draws are equal; a compiler may fuse a product and a sum in one program and not the other.
        np.testing.assert_allclose(one[field], two[field], rtol=1e-6, atol=1e-7, err_msg=field)


@pytest.mark.parametrize("name", ["cutmix", "flip", "pad_and_crop"])
def test_augmentations_of_images_refuse_other_data(name):
    for spec in (DataSpec((64,), "float32", 10), DataSpec((128,), "int32", 256)):
        with pytest.raises(UserError, match=f"{name} is for images"):
            AUGMENTATIONS[name](spec)


def test_bad_options_are_refused():
    with pytest.raises(UserError, match="tokens can't be mixed"):
        mixup(DataSpec((128,), "int32", 256))
    with pytest.raises(UserError, match="alpha = 0"):
        mixup(SPEC, alpha=0)
    with pytest.raises(UserError, match="from 0 to 1"):
        flip(SPEC, probability=1.5)
    with pytest.raises(UserError, match="at least 0"):
        pad_and_crop(SPEC, padding=-1)
