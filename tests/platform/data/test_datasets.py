"""The embedded data sets hold what they say, and damaged files are named."""

import gzip
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
import pytest

from lamina.platform.data import fashion_mnist, feed, python_stdlib
from lamina.platform.data.dataset import Dataset
from lamina.platform.data.digits import digits
from lamina.platform.data.synthetic import synthetic_images, synthetic_tokens
from lamina.platform.data.table import DATASETS
from lamina.platform.errors import UserError

needs_fashion_mnist = pytest.mark.skipif(
    not Path(fashion_mnist.DEBIAN_FOLDER).is_dir(), reason="dataset-fashion-mnist is not installed"
)


def assert_fits_its_spec(dataset: Dataset):
    assert list(dataset.splits) == ["train", "validation", "test"]
    assert dataset.description
    for split in dataset.splits.values():
        example = split[len(split) - 1]
        assert example["inputs"].shape == dataset.spec.input_shape
        assert example["inputs"].dtype == dataset.spec.input_dtype
        assert example["labels"].dtype == np.int32
        assert 0 <= example["labels"].min() <= example["labels"].max() < dataset.spec.outputs


def test_a_data_set_with_nothing_to_train_on_is_refused():
    from lamina.platform.training import experiment

    blocks = {"data": {"name": "digits", "batch_size": 8}, "model": {"name": "mlp"}, "steps": 1}
    blocks |= {"optimizer": {"name": "sgd", "learning_rate": 0.1}, "schedule": {"name": "constant"}}
    config = experiment.resolve(blocks | {"task": {"name": "classification"}})
    whole = digits()
    tested = whole._replace(splits={"test": whole.splits["test"]})
    with pytest.raises(UserError, match=r"data \(digits\): there is no split 'train', but test"):
        experiment.assemble(config, dataset=tested)


# --- digits --------------------------------------------------------------------------------------


def test_digits_has_every_example_once_with_the_classes_in_proportion():
    from sklearn.datasets import load_digits

    dataset = digits()
    assert_fits_its_spec(dataset)
    parts = list(dataset.splits.values())
    images = np.concatenate([part.arrays["inputs"] for part in parts]).reshape(1797, 64)
    original = load_digits().data.astype(np.float32) / 16
    order = lambda rows: rows[np.lexsort(rows.T)]
    assert np.array_equal(order(images), order(original))
    for part, share in zip(parts, (0.60, 0.15, 0.25), strict=True):
        assert abs(len(part) - share * 1797) < 6
        assert np.ptp(np.bincount(part.arrays["labels"])) <= 7


def test_digits_is_the_same_in_each_call():
    first, second = (digits().splits["train"].arrays["inputs"] for _ in range(2))
    assert np.array_equal(first, second)


# --- Fashion-MNIST -------------------------------------------------------------------------------


@needs_fashion_mnist
def test_fashion_mnist_is_whole():
    dataset = fashion_mnist.fashion_mnist()
    assert_fits_its_spec(dataset)
    assert [len(split) for split in dataset.splits.values()] == [54_000, 6_000, 10_000]
    counts = sum(np.bincount(s.arrays["labels"], minlength=10) for s in dataset.splits.values())
    assert np.array_equal(counts, np.full(10, 7000))
    # The mean pixel of the 60,000 training images that is commonly quoted: 0.2860.
    pixels = [
        dataset.splits[s].arrays["inputs"].sum(dtype=np.int64) for s in ("train", "validation")
    ]
    assert sum(pixels) / (60_000 * 784 * 255) == pytest.approx(0.2860, abs=1e-4)
    assert feed.choose_placement(dataset.splits["train"]) == "device"


@needs_fashion_mnist
def test_fashion_mnist_is_found_through_the_environment(tmp_path, monkeypatch):
    (tmp_path / "fashion-mnist").symlink_to(fashion_mnist.DEBIAN_FOLDER)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", "/nowhere")
    monkeypatch.setenv("LAMINA_DATA_DIR", str(tmp_path))
    assert str(tmp_path) in fashion_mnist.fashion_mnist().description


def test_missing_fashion_mnist_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist.fashion_mnist(data_dir=str(tmp_path))


def write_idx(path: Path, shape=(3, 2, 2), magic=0x0803, data=None):
    data = bytes(range(12)) if data is None else data
    header = struct.pack(f">I{len(shape)}I", magic, *shape)
    path.write_bytes(gzip.compress(header + data))
    return path


def test_an_idx_file_is_read(tmp_path):
    read = fashion_mnist.read_idx(write_idx(tmp_path / "a.gz"), (3, 2, 2))
    assert np.array_equal(read, np.arange(12).reshape(3, 2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magic": 0x0D03}, "magic number is 0x0d03"),
        ({"shape": (4, 2, 2)}, r"holds shape \(4, 2, 2\)"),
        ({"data": bytes(11)}, "holds 11 bytes"),
        ({"data": bytes(13)}, "holds more bytes"),
    ],
)
def test_an_idx_file_of_other_content_is_named(tmp_path, change, message):
    path = write_idx(tmp_path / "bad.gz", **change)
    with pytest.raises(UserError, match=f"bad.gz.*{message}"):
        fashion_mnist.read_idx(path, (3, 2, 2))


@pytest.mark.parametrize("keep", [0, 5, 25, -3])
def test_a_truncated_gz_is_named(tmp_path, keep):
    path = write_idx(tmp_path / "short.gz")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"short.gz is damaged"):
        fashion_mnist.read_idx(path, (3, 2, 2))


def test_a_file_that_is_no_gz_or_missing_is_named(tmp_path):
    (tmp_path / "plain.gz").write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match=r"plain.gz is damaged"):
        fashion_mnist.read_idx(tmp_path / "plain.gz", (3,))
    with pytest.raises(UserError, match=r"gone.gz is missing"):
        fashion_mnist.read_idx(tmp_path / "gone.gz", (3,))


@needs_fashion_mnist
def test_flipped_bits_inside_a_real_file_are_found(tmp_path):
    for file in Path(fashion_mnist.DEBIAN_FOLDER).glob("*.gz"):
        shutil.copy(file, tmp_path)
    damaged = tmp_path / "t10k-images-idx3-ubyte.gz"
    raw = bytearray(damaged.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    damaged.write_bytes(raw)
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte\.gz is damaged"):
        fashion_mnist.fashion_mnist(data_dir=str(tmp_path))


# --- Python's standard library -------------------------------------------------------------------


@pytest.fixture(scope="module")
def library():
    return python_stdlib.python_stdlib(context=256)


def test_the_standard_library_fits_its_spec_and_is_split_by_file(library):
    assert_fits_its_spec(library)
    sizes = {name: split.predicted for name, split in library.splits.items()}
    assert sizes["train"] > 5e6
    assert min(sizes["validation"], sizes["test"]) > 2e5


def test_every_held_out_byte_is_predicted_exactly_once(library):
    split = library.splits["validation"]
    tokens = split.arrays["tokens"][: split.predicted + 1]
    batch = split.gather(split.arrays, np.arange(len(split)))
    assert batch["weights"].sum() == split.predicted
    assert np.array_equal(batch["labels"][batch["weights"] > 0], tokens[1:])
    assert np.array_equal(batch["inputs"][batch["weights"] > 0], tokens[:-1])


def test_the_standard_library_is_the_same_in_each_call(library):
    again = python_stdlib.python_stdlib(context=256)
    for name, split in library.splits.items():
        assert np.array_equal(split.arrays["tokens"], again.splits[name].arrays["tokens"])


def test_library_files_leave_out_packages_tests_and_builds(tmp_path):
    kept = ["os.py", "json/decoder.py", "unittest/case.py"]
    left = [
        "site-packages/numpy.py",
        "test/test_os.py",
        "idlelib/idle_test/a.py",
        "json/__pycache__/decoder.py",
        "_sysconfigdata__linux.py",
        "config-3.13-x86_64/python-config.py",
        "os.pyc",
    ]
    for name in kept + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    found = [f.relative_to(tmp_path).as_posix() for f in python_stdlib.library_files(tmp_path)]
    assert found == sorted(kept)


def test_a_file_stays_in_its_split():
    names = [f"package/module_{i}.py" for i in range(2000)]
    counts = {s: sum(python_stdlib.split_of(n) == s for n in names) for s in ("validation", "test")}
    assert python_stdlib.split_of("ast.py") == "validation"
    assert all(70 < count < 130 for count in counts.values())


def test_text_comes_back_from_its_tokens(library):
    split = library.splits["train"]
    batch = split.gather(split.arrays, np.arange(40))
    text = library.decode(batch["labels"].ravel())
    assert "import " in text
    assert "\0" not in text


def test_training_windows_are_the_same_from_the_device_and_from_grain(library):
    device = feed.training_feed(library.splits["train"], 4, 0, placement="device")
    grain = feed.training_feed(library.splits["train"], 4, 0, placement="grain")
    (row,) = device.read(7, 1)
    ours = jax.jit(device.select)(device.constants, row)
    theirs = grain.read(7, 1)
    grain.close()
    assert sorted(ours) == ["inputs", "labels"]
    for name in ours:
        assert np.array_equal(ours[name], theirs[name][0])


# --- synthetic -----------------------------------------------------------------------------------


def test_synthetic_data_have_the_stated_shape():
    images = synthetic_images(shape=(9, 7, 3), classes=11, examples=5, held_out=2)
    assert_fits_its_spec(images)
    assert images.spec == ((9, 7, 3), "uint8", 11)
    tokens = synthetic_tokens(vocabulary=999, context=12, examples=5, held_out=2)
    assert_fits_its_spec(tokens)
    assert [len(split) for split in tokens.splits.values()] == [5, 2, 2]
    assert tokens.spec == ((12,), "int32", 999)


def test_synthetic_sizes_below_one_are_refused():
    with pytest.raises(UserError, match=r"data.classes should be at least 1"):
        synthetic_images(classes=0)


def test_every_data_set_of_the_table_has_only_options_and_a_docstring():
    import inspect

    for name, factory in DATASETS.items():
        parameters = inspect.signature(factory).parameters.values()
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters), name
        assert factory.__doc__
