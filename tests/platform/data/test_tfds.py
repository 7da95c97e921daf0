"""Data sets that TFDS prepared as array_record are read without TensorFlow."""

import io
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from lamina.platform.data import fashion_mnist, feed
from lamina.platform.data.tfds import decode_image, in_memory, tfds
from lamina.platform.errors import UserError

SIZES = {"train": 40, "test": 6}


def png(i, size=(10, 8)):
    stream = io.BytesIO()
    Image.fromarray(np.full((*size[::-1], 3), i, np.uint8)).save(stream, "PNG")
    stream.seek(0)
    return stream


def prepare(folder, dataset, features, splits):
    """Prepares a small data set as TFDS does it; `splits` maps a name to its examples."""
    import tensorflow_datasets

    class Small(tensorflow_datasets.core.GeneratorBasedBuilder):
        # For a class of a package, TFDS's writer looks for files beside it with a library that it
        # doesn't declare (importlib_resources); a script's class it takes as it is.
        __module__ = "__main__"
        name = dataset
        VERSION = tensorflow_datasets.core.Version("1.0.0")

        def _info(self):
            return tensorflow_datasets.core.DatasetInfo(
                builder=self, features=tensorflow_datasets.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {split: enumerate(examples) for split, examples in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError  # TFDS asks for it; the splits are generators already

    Small(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A small data set with every kind of feature that is read."""
    from tensorflow_datasets import features as kinds

    features = {
        "image": kinds.Image(shape=(8, 10, 3)),
        "photo": kinds.Image(shape=(None, None, 3)),
        "pixels": kinds.Tensor(shape=(4, 4, 1), dtype=np.uint8),
        "text": kinds.Text(),
        "label": kinds.ClassLabel(names=["even", "odd"]),
        "target": kinds.Tensor(shape=(2,), dtype=np.float32),
        "number": kinds.Scalar(dtype=np.int64),
    }

    def example(i):
        return {
            "image": png(i),
            "photo": png(i, (10 + i % 3, 16)),
            "pixels": np.full((4, 4, 1), i, np.uint8),
            "text": f"text {i}",
            "label": i % 2,
            "target": np.array([i, -i], np.float32),
            "number": i,
        }

    splits = {name: [example(i) for i in range(n)] for name, n in SIZES.items()}
    return prepare(tmp_path_factory.mktemp("tfds"), "tiny", features, splits)


def test_images_are_decoded_and_no_tensorflow_is_loaded(prepared):
    dataset = tfds(dataset="tiny", data_dir=prepared)
    assert dataset.spec == ((8, 10, 3), "uint8", 2)
    assert dataset.label_names == ("even", "odd")
    seen = []
    for name in ("train", "validation"):
        split = dataset.splits[name]
        for example in split.__getitems__(range(len(split))):
            value = int(example["inputs"].flat[0])
            assert np.array_equal(example["inputs"], np.full((8, 10, 3), value))
            assert example["labels"] == value % 2
            seen.append(value)
    assert sorted(seen) == list(range(40))
    assert [len(s) for s in dataset.splits.values()] == [36, 4, 6]
    assert "tensorflow" not in sys.modules


def test_photos_of_different_sizes_need_and_get_one_size(prepared):
    with pytest.raises(UserError, match=r"differ in size: set data\.image_size"):
        tfds(dataset="tiny", data_dir=prepared, inputs="photo")
    dataset = tfds(dataset="tiny", data_dir=prepared, inputs="photo", image_size=6)
    assert dataset.spec.input_shape == (6, 6, 3)
    assert dataset.splits["test"][0]["inputs"].shape == (6, 6, 3)


def test_tensors_and_float_targets_are_read(prepared):
    dataset = tfds(dataset="tiny", data_dir=prepared, inputs="pixels", labels="target")
    assert dataset.spec == ((4, 4, 1), "uint8", 2)
    example = dataset.splits["test"][1]
    value = float(example["inputs"].flat[0])
    assert np.array_equal(example["labels"], [value, -value])
    assert example["labels"].dtype == np.float32


def test_text_is_classified_or_predicted_by_bytes(prepared):
    classified = tfds(dataset="tiny", data_dir=prepared, inputs="text", context=8)
    assert classified.spec == ((8,), "int32", 2)
    assert bytes(classified.splits["test"][0]["inputs"][:5].astype(np.uint8)) == b"text "
    language = tfds(dataset="tiny", data_dir=prepared, inputs="text", labels="", context=8)
    assert language.spec == ((8,), "int32", 256)
    example = language.splits["test"][0]
    assert example["weights"].tolist() == [1] * 6 + [0] * 2
    assert language.decode(example["labels"][:5]) == "text "
    assert np.array_equal(example["inputs"][1:6], example["labels"][:5])
    assert example["inputs"][0] == 0


def test_prepared_data_go_through_grain_and_from_memory_alike(prepared):
    lazy = tfds(dataset="tiny", data_dir=prepared)
    held = tfds(dataset="tiny", data_dir=prepared, hold_in_memory=True)
    assert feed.choose_placement(lazy.splits["train"]) == "grain"
    assert feed.choose_placement(held.splits["train"]) == "device"
    feeds = [feed.grain_feed(dataset.splits["train"], 4, 0) for dataset in (lazy, held)]
    ours, theirs = (opened.read(3, 2) for opened in feeds)
    for opened in feeds:
        opened.close()
    for name in ours:
        assert np.array_equal(ours[name], theirs[name])
    assert len(in_memory(lazy.splits["test"])) == 6


def test_prepared_data_can_be_sent_to_workers(prepared):
    source = tfds(dataset="tiny", data_dir=prepared).splits["train"]
    raw = pickle.dumps(source)
    assert len(raw) < 20_000
    assert np.array_equal(pickle.loads(raw)[5]["inputs"], source[5]["inputs"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "missing"}, "is not prepared in .*`tfds build missing "),
        ({"dataset": "tiny/9.9.9"}, "is not prepared"),
        ({"inputs": "picture"}, "'picture' is not a feature of tiny: it has image, label"),
        ({"labels": "text"}, "should be a ClassLabel or a float target"),
        ({"labels": "number"}, "should be a ClassLabel or a float target"),
        ({"labels": ""}, "needs text"),
    ],
)
def test_what_cannot_be_read_says_what_would_be_right(prepared, options, message):
    with pytest.raises(UserError, match=message):
        tfds(**({"dataset": "tiny", "data_dir": prepared} | options))


def test_an_explicit_version_is_found(prepared):
    assert len(tfds(dataset="tiny/1.0.0", data_dir=prepared).splits["test"]) == 6


def test_images_keep_their_pixels_and_broken_ones_are_refused():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    assert np.array_equal(decode_image(stream.getvalue(), 3), pixels)
    assert decode_image(stream.getvalue(), 1).shape == (5, 7, 1)
    assert decode_image(stream.getvalue(), 3, size=4).shape == (4, 4, 3)
    jpeg = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 77, np.uint8)).save(jpeg, "JPEG")
    assert np.ptp(decode_image(jpeg.getvalue(), 3).astype(int) - 77) <= 2
    for broken in (b"", b"no image", stream.getvalue()[:40]):
        with pytest.raises(UserError, match="damaged"):
            decode_image(broken, 3)


def test_fashion_mnist_is_read_from_tfds_too(tmp_path, monkeypatch):
    from tensorflow_datasets import features as kinds

    features = {"image": kinds.Image(shape=(28, 28, 1)), "label": kinds.ClassLabel(num_classes=10)}

    def example(i):
        stream = io.BytesIO()
        Image.fromarray(np.full((28, 28), i, np.uint8)).save(stream, "PNG")
        stream.seek(0)
        return {"image": stream, "label": i % 10}

    splits = {"train": [example(i) for i in range(30)], "test": [example(i) for i in range(5)]}
    prepare(tmp_path, "fashion_mnist", features, splits)
    monkeypatch.setattr(fashion_mnist, "_HELD_OUT", 3)
    dataset = fashion_mnist.fashion_mnist(data_dir=str(tmp_path))
    assert [len(split) for split in dataset.splits.values()] == [27, 3, 5]
    assert dataset.splits["train"].arrays["inputs"].shape == (27, 28, 28, 1)
    assert dataset.label_names[9] == "Ankle boot"


def test_a_damaged_record_is_reported_with_its_split(tmp_path):
    from tensorflow_datasets import features as kinds

    features = {"image": kinds.Image(shape=(8, 10, 3)), "label": kinds.ClassLabel(num_classes=2)}
    broken = [{"image": io.BytesIO(b"no image"), "label": 0} for _ in range(20)]
    prepare(tmp_path, "broken", features, {"train": broken})
    source = tfds(dataset="broken", data_dir=str(tmp_path)).splits["train"]
    opened = feed.grain_feed(source, 4, 0)
    with pytest.raises(UserError, match=r"name=broken.*an image is damaged"):
        opened.read(0, 1)
    opened.close()
