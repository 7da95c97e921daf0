"""Tensors are read in part and when asked for, and files are written one tensor at a time."""

import numpy as np
import pytest
import safetensors.numpy

from lamina.platform.checkpoints import safetensors as ours
from lamina.platform.checkpoints.safetensors import DTYPES, File, Layout
from lamina.platform.errors import UserError


def make(tmp_path, values):
    layouts = {name: Layout(value.shape, value.dtype) for name, value in values.items()}
    path = tmp_path / "x.safetensors"
    ours.write(path, layouts, values.__getitem__, {"format": "test"})
    return path


def test_every_part_of_a_tensor_is_that_part_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "_BLOCK", 100)  # several blocks
    value = np.random.default_rng(0).normal(size=(13, 6, 5)).astype(np.float32)
    with File(make(tmp_path, {"w": value, "s": np.float32(3)})) as file:
        tensor = file.tensors["w"]
        everything = slice(None)
        for index in (
            (),
            ...,
            2,
            slice(3, 9),
            (slice(3, 9),),
            (everything, slice(2, 5)),
            (slice(1, 12), everything, slice(4, 5)),
            (slice(1, 12), everything, everything),
            (slice(1, 12), 3),
            (slice(0, 13, 2), slice(1, 3)),
            (slice(5, 5), slice(1, 3)),
            (2, slice(1, 3)),
        ):
            np.testing.assert_array_equal(tensor[index], value[index])
        np.testing.assert_array_equal(file.tensors["s"][()], np.float32(3))
        assert np.asarray(tensor, np.float64).dtype == np.float64


def test_a_part_reads_only_its_rows(tmp_path, monkeypatch):
    value = np.zeros((1000, 8), np.float32)
    with File(make(tmp_path, {"w": value})) as file:
        counts = []
        read = ours.Content.read
        monkeypatch.setattr(
            ours.Content, "read", lambda self, s, n: counts.append(n) or read(self, s, n)
        )
        _ = file.tensors["w"][10:20, 3:5]
        assert counts == [10 * 8 * 4]


def test_the_reference_library_reads_every_dtype_that_we_write(tmp_path):
    values = {
        name: np.arange(3).astype(dtype)
        for name, dtype in DTYPES.items()
        if not name.startswith("F8") and name != "C64"  # its numpy functions lack these
    }
    theirs = safetensors.numpy.load_file(make(tmp_path, values))
    assert set(theirs) == set(values)
    for name, value in values.items():
        assert theirs[name].dtype == value.dtype
        np.testing.assert_array_equal(theirs[name], value)


def test_every_dtype_comes_back_aligned(tmp_path):
    values = {name: np.arange(3).astype(dtype) for name, dtype in DTYPES.items()}
    path = make(tmp_path, values)
    with File(path) as file:
        assert file.metadata == {"format": "test"}
        for name, value in values.items():
            assert file.tensors[name].dtype == value.dtype
            assert np.asarray(file.tensors[name]).tobytes() == value.tobytes()
            assert np.asarray(file.tensors[name]).flags.aligned


def test_a_file_that_shrinks_after_it_was_opened_is_an_error(tmp_path):
    path = make(tmp_path, {"w": np.zeros(1000, np.float32)})
    with File(path) as file:
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(UserError, match="cut short: it ends at byte 500"):
            np.asarray(file.tensors["w"])


def test_what_is_read_must_be_what_the_header_said(tmp_path):
    layout = {"w": Layout((2,), np.dtype(np.float32))}
    with pytest.raises(ValueError, match="w is float32"):
        ours.write(tmp_path / "x", layout, lambda name: np.zeros(3, np.float32))
    assert not list(tmp_path.iterdir())
