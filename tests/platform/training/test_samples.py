"""The picture of test images in a report."""

import io

import numpy as np
import pytest
from PIL import Image

from lamina.platform.training import samples

BELOW_A_TITLE = samples.MARGIN + samples.TITLE


def drawn(images, titles):
    return np.asarray(Image.open(io.BytesIO(samples.sheet(images, titles)))).astype(int)


def test_every_image_stands_in_its_place_stretched_to_its_range():
    images = np.zeros((8, 4, 4, 1))
    images[:, :2] = np.arange(1, 9)[:, None, None, None]  # a bright upper half, of any scale
    page = drawn(images, ["a"] * 8)
    cell = samples.SIDE + 2 * samples.MARGIN
    assert page.shape == (2 * (cell + samples.TITLE), samples.COLUMNS * cell, 3)
    for row, column in [(0, 0), (0, 5), (1, 1)]:
        top = row * (cell + samples.TITLE) + BELOW_A_TITLE
        found = page[top : top + samples.SIDE, column * cell + samples.MARGIN :][:, : samples.SIDE]
        half = samples.SIDE // 2
        assert (found[:half] >= 254).all()
        assert (found[half:] == 0).all()
    assert (page[cell + samples.TITLE :, 2 * cell :] == 255).all()  # there are only eight


def test_a_mistake_is_red():
    page = drawn(np.zeros((2, 4, 4, 3)), ["3", "3 ✗ 8"])
    cell = samples.SIDE + 2 * samples.MARGIN
    red = (page[:BELOW_A_TITLE, :, 0] > page[:BELOW_A_TITLE, :, 1] + 50).any(axis=0)
    assert not red[:cell].any()
    assert red[cell : 2 * cell].any()


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (20, 224, 4), (300, 200, 3)])
def test_images_of_any_shape_are_drawn(shape):
    page = drawn(np.random.default_rng(0).random((12, *shape)), ["name"] * 12)
    assert (page[BELOW_A_TITLE : BELOW_A_TITLE + samples.SIDE] < 255).any()
