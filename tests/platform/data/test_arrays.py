"""The user's own arrays are read as they are meant, or refused with the reason."""

import pickle

import numpy as np
import pytest

from lamina.platform.data.arrays import arrays, from_arrays
from lamina.platform.data.dataset import ArraySource
from lamina.platform.errors import UserError

N = 40


def classes_of(n=N):
    return {
        "inputs": np.random.default_rng(0).normal(size=(n, 3)),
        "labels": np.arange(n) % 4,
    }


def test_missing_splits_are_drawn_from_train_and_every_example_is_in_one():
    data = classes_of() | {"inputs": np.arange(N, dtype=np.float64)[:, None]}
    dataset = from_arrays({"train": data}, validation_fraction=0.2, test_fraction=0.1)
    assert {k: len(v) for k, v in dataset.splits.items()} == {
        "validation": 8,
        "test": 4,
        "train": 28,
    }
    seen = np.concatenate([split.arrays["inputs"][:, 0] for split in dataset.splits.values()])
    assert np.array_equal(np.sort(seen), np.arange(N))
    assert dataset.spec == ((1,), "float32", 4)
    assert "drawn from train" in dataset.description


def test_given_splits_are_kept():
    data = {split: classes_of(n) for split, n in (("train", 20), ("validation", 6), ("test", 5))}
    dataset = from_arrays(data)
    assert {k: len(v) for k, v in dataset.splits.items()} == {
        "train": 20,
        "validation": 6,
        "test": 5,
    }


def test_npz_and_folder_of_npy_hold_the_same(tmp_path):
    named = {f"{s}_{f}": a for s in ("train", "test") for f, a in classes_of().items()}
    np.savez(tmp_path / "data.npz", **named)
    (tmp_path / "folder").mkdir()
    for name, array in named.items():
        np.save(tmp_path / "folder" / f"{name}.npy", array)
    ours = arrays(path=str(tmp_path / "data.npz"))
    theirs = arrays(path=str(tmp_path / "folder"))
    for split in ("train", "validation", "test"):
        for i in range(len(ours.splits[split])):
            a, b = ours.splits[split][i], theirs.splits[split][i]
            assert all(np.array_equal(a[k], b[k]) for k in ("inputs", "labels"))


def test_mapped_files_are_reopened_and_not_copied_into_workers(tmp_path):
    np.save(tmp_path / "inputs.npy", np.arange(80_000, dtype=np.float32).reshape(-1, 8))
    source = ArraySource({"inputs": np.load(tmp_path / "inputs.npy", mmap_mode="r")})
    raw = pickle.dumps(source)
    assert len(raw) < 1000
    assert np.array_equal(pickle.loads(raw)[9_999]["inputs"], source[9_999]["inputs"])
    plain = ArraySource({"inputs": np.arange(3)})
    assert np.array_equal(pickle.loads(pickle.dumps(plain)).arrays["inputs"], np.arange(3))


def test_kinds_of_labels_decide_the_task():
    tokens = np.random.default_rng(0).integers(0, 9, (N, 5))
    language = from_arrays({"train": {"inputs": tokens, "labels": tokens}}, classes=12)
    assert language.spec == ((5,), "int32", 12)
    targets = np.linspace(0, 1, N)
    regression = from_arrays({"train": {"inputs": targets[:, None], "labels": targets}})
    assert regression.spec == ((1,), "float32", 1)
    assert regression.splits["train"][0]["labels"].shape == (1,)
    images = np.zeros((N, 6, 5), np.uint8)
    grey = from_arrays({"train": {"inputs": images, "labels": np.arange(N, dtype=np.uint8)}})
    assert grey.spec == ((6, 5, 1), "uint8", N)
    assert grey.splits["train"][0]["labels"].dtype == np.int32


def changed(**fields):
    return {"train": classes_of() | fields}


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"validation": classes_of()}, "should have a split 'train'"),
        ({"train": {"inputs": np.zeros((4, 2))}}, "'labels' is missing"),
        (changed(labels=np.arange(N - 1)), "differ in length.*'labels': 39"),
        (changed(labels=np.int32(3)), "differ in length.*a scalar"),
        (changed(inputs=np.zeros((0, 3)), labels=np.zeros(0, int)), "no examples"),
        (changed(labels=np.full(N, -1)), "labels go from -1"),
        (changed(inputs=np.where(np.arange(N)[:, None] == 7, np.nan, 0.0)), "first in example 7"),
        (changed(inputs=np.where(np.arange(N)[:, None] == 9, np.inf, 0.0)), "first in example 9"),
        (changed(inputs=np.array(["a"] * N)), "floats or integers"),
        (changed(inputs=np.array([{}] * N)), "floats or integers"),
        (changed(labels=np.zeros((N, 2), int)), r"integer labels should be \[N\]"),
        (changed(labels=np.full(N, 2**40)), "32 bits"),
        (changed(weights=np.full(N, -1.0)), "weights are negative"),
        (
            {"train": classes_of(), "test": classes_of() | {"inputs": np.zeros((N, 4))}},
            r"test: inputs has examples of shape \(4,\)",
        ),
        (
            {"train": classes_of(), "test": classes_of() | {"labels": np.zeros(N)}},
            r"labels has examples of shape|float32, but in train int32",
        ),
        ({"train": classes_of(2)}, "every split needs at least one"),
    ],
)
def test_unusable_arrays_are_refused_with_the_reason(splits, message):
    with pytest.raises(UserError, match=message):
        from_arrays(splits)


def test_labels_above_the_stated_classes_are_refused():
    with pytest.raises(UserError, match="labels go from 0 to 3, outside of 0 to 2"):
        from_arrays({"train": classes_of()}, classes=3)


def test_pickled_arrays_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    payload = np.array([Bomb()], object)
    np.savez(tmp_path / "a.npz", inputs=payload, labels=np.zeros(1, int))
    (tmp_path / "b").mkdir()
    np.save(tmp_path / "b" / "inputs.npy", payload)
    (tmp_path / "c.npz").write_bytes(pickle.dumps(Bomb()))
    for name in ("a.npz", "b", "c.npz"):
        with pytest.raises(UserError, match="pickled Python objects"):
            arrays(path=str(tmp_path / name))
    assert not (tmp_path / "exploded").exists()


def test_damaged_and_misnamed_files_are_named(tmp_path):
    with pytest.raises(UserError, match="neither a file nor a folder"):
        arrays(path=str(tmp_path / "gone"))
    np.savez(tmp_path / "whole.npz", **classes_of())
    raw = (tmp_path / "whole.npz").read_bytes()
    for name, content in {"cut.npz": raw[:-40], "empty.npz": b"", "torn.npz": raw[:300]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} (can't be read|holds pickled)"):
            arrays(path=str(tmp_path / name))
    np.savez(tmp_path / "names.npz", x=np.zeros(3))
    with pytest.raises(UserError, match="holds 'x': arrays are called"):
        arrays(path=str(tmp_path / "names.npz"))
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(UserError, match="a single array"):
        arrays(path=str(tmp_path / "one.npy"))
