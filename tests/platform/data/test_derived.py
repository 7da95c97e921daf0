"""Tasks derived from the embedded images."""

import numpy as np
import pytest

from lamina.platform.data.derived import ENCODINGS, derived
from lamina.platform.data.fashion_mnist import fashion_mnist
from lamina.platform.errors import UserError

CLOTHES = (0, 3, 9)


def first(dataset, split="test"):
    return dataset.splits[split].arrays["inputs"][0, :, :, 0]


def test_each_change_is_of_the_same_images():
    plain = first(derived(classes=CLOTHES, held_out=5))
    assert np.array_equal(first(derived(classes=CLOTHES, rotation=1)), np.rot90(plain))
    assert np.array_equal(first(derived(classes=CLOTHES, rotation=-2)), plain[::-1, ::-1])
    assert np.array_equal(first(derived(classes=CLOTHES, mirror=True)), plain[:, ::-1])
    assert np.array_equal(first(derived(classes=CLOTHES, invert=True)), 255 - plain)
    pieces = first(derived(classes=CLOTHES, shuffle=3))
    cells = lambda image: image.reshape(4, 7, 4, 7).swapaxes(1, 2).reshape(16, 49)
    assert not np.array_equal(pieces, plain)
    assert sorted(map(bytes, cells(pieces))) == sorted(map(bytes, cells(plain)))


def test_labels_are_numbered_and_halves_share_nothing():
    whole = fashion_mnist().splits["train"].arrays["labels"]
    parts = [derived(classes=CLOTHES, part=part) for part in ("first", "second")]
    assert parts[0].spec.outputs == 3
    assert parts[0].label_names == ("T-shirt/top", "Dress", "Ankle boot")
    kept = [np.isin(whole[:27_000], CLOTHES).sum(), np.isin(whole[27_000:], CLOTHES).sum()]
    assert [len(part.splits["train"]) for part in parts] == kept
    assert set(parts[0].splits["train"].arrays["labels"]) == {0, 1, 2}
    small = derived(classes=CLOTHES, held_out=7)
    assert [len(small.splits[name]) for name in ("validation", "test")] == [7, 7]


@pytest.mark.parametrize("source", ["digits", "python_fragments"])
def test_the_other_sources_have_images_of_the_same_size(source):
    dataset = derived(source=source)
    for split in dataset.splits.values():
        assert split.arrays["inputs"].shape[1:] == (28, 28, 1)
        assert split.arrays["inputs"].dtype == np.uint8
    assert dataset.spec.outputs == len(dataset.label_names)


def test_fragments_are_of_all_encodings_and_files_stay_in_their_split():
    dataset = derived(source="python_fragments")
    counts = np.bincount(dataset.splits["test"].arrays["labels"])
    assert len(counts) == len(ENCODINGS)
    assert counts.min() > 20
    rows = {
        name: {bytes(image) for image in split.arrays["inputs"]}
        for name, split in dataset.splits.items()
    }
    assert not rows["train"] & rows["test"]


@pytest.mark.parametrize("classes", [(1,), (1, 1), (3, 10), (-1, 2)])
def test_labels_that_are_not_there_are_refused(classes):
    with pytest.raises(UserError, match="classes"):
        derived(classes=classes)
