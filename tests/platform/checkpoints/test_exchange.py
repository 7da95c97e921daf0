"""Safetensors files: bits there and back, and no trust in what a file says of itself."""

import json
import os
import pickle
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lamina.platform.checkpoints.exchange import export_params, import_params, import_tensors
from lamina.platform.checkpoints.failures import CheckpointError
from lamina.platform.errors import UserError


def make_params():
    return {
        "body": {
            "kernel": jax.random.normal(jax.random.key(0), (3, 4)),
            "half": jnp.arange(5, dtype=jnp.bfloat16) / 3,
            "tiny": jnp.arange(3, dtype=jnp.float8_e4m3fn),
        },
        "flags": jnp.array([True, False, True]),
        "scale": jnp.float32(2.5),
        "none": jnp.zeros((0, 2)),
        "nan": jnp.array([jnp.nan, -0.0]),
    }


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_params_come_back_bit_for_bit(tmp_path):
    params = make_params()
    path = tmp_path / "deep" / "p.safetensors"
    export_params(path, params, {"task": "digits"})
    tensors = import_tensors(path)
    assert tensors.metadata == {"task": "digits"}
    assert set(tensors.arrays) >= {"body/kernel", "scale"}
    for restored in (import_params(path, params), tensors.tree()):
        assert jax.tree.structure(restored) == jax.tree.structure(params)
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(params), strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert [p.name for p in path.parent.iterdir()] == ["p.safetensors"]


def test_the_reference_library_reads_ours_and_we_read_its(tmp_path):
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3, jnp.bfloat16)}
    export_params(tmp_path / "ours.safetensors", params)
    theirs = safetensors.numpy.load_file(tmp_path / "ours.safetensors")
    np.testing.assert_array_equal(theirs["a"], params["a"])
    assert theirs["b"].dtype == ml_dtypes.bfloat16
    values = {"z.weight": np.arange(5, dtype=np.int64), "a": np.float16([1, 2, 3])}
    safetensors.numpy.save_file(values, tmp_path / "theirs.safetensors", {"k": "v"})
    ours = import_tensors(tmp_path / "theirs.safetensors")
    assert ours.metadata == {"k": "v"}
    for name, value in values.items():
        np.testing.assert_array_equal(ours.arrays[name], value)


def test_data_that_begin_at_an_odd_byte_are_read(tmp_path):
    header = {"a": entry("U8", (1,), (0, 1)), "b": entry("F32", (2,), (1, 9))}
    path = write(tmp_path / "x", header, b"\x07" + np.float32([1, 2]).tobytes())
    np.testing.assert_array_equal(import_tensors(path, finite=True).arrays["b"], [1, 2])


BAD = {
    "needs 8 bytes": {"a": entry(offsets=(0, 4))},
    "needs 12 bytes": {"a": entry(shape=(3,))},
    "'b' overlaps": {"a": entry(), "b": entry(offsets=(4, 12))},
    "'b' leaves a gap": {"a": entry(shape=(1,), offsets=(0, 4)), "b": entry(offsets=(8, 16))},
    "ends at byte 80": {"a": entry(shape=(20,), offsets=(0, 80))},
    "needs 8 bytes for": {"a": entry(offsets=(8, 0))},
    "unknown dtype 'F31'": {"a": entry("F31")},
    r"has shape \[-2\]": {"a": entry(shape=(-2,))},
    r"has shape \[True\]": {"a": entry(shape=(True,))},
    r"data_offsets \[0\]": {"a": entry(offsets=(0,))},
    "is not described by": {"a": {"dtype": "F32"}},
    "12 bytes belong to no tensor": {"a": entry(shape=(1,), offsets=(0, 4))},
    "no table of tensors": [1, 2],
    "no table": {"__metadata__": {"a": 1}},
    "no JSON": b"{...}",
    "a name stands twice": b'{"a":{}, "a":{}}',
    "has shape": {"a": entry(shape=(2**70, 0), offsets=(0, 0)), "b": entry("U8", (16,), (0, 16))},
}


@pytest.mark.parametrize("message", BAD)
def test_a_header_that_lies_is_refused(tmp_path, message):
    with pytest.raises(UserError, match=message):
        import_tensors(write(tmp_path / "x.safetensors", BAD[message], bytes(16)))


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    export_params(tmp_path / "whole", {"kernel": jnp.ones(3), "b": jnp.zeros(2)})
    content = (tmp_path / "whole").read_bytes()
    path = tmp_path / "cut"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cut|safetensors file"):
            import_tensors(path)


def test_a_flipped_bit_in_the_header_is_refused_or_changes_only_names(tmp_path):
    export_params(tmp_path / "whole", {"kernel": jnp.ones(3), "b": jnp.zeros(2)})
    content = (tmp_path / "whole").read_bytes()
    path = tmp_path / "flipped"
    length = int.from_bytes(content[:8], "little")
    for position in range(8 + length):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]
        )
        try:
            arrays = import_tensors(path).arrays
        except UserError:
            continue
        # What is left are other names, another type of equal size, or spaces turned into JSON.
        assert sum(a.nbytes for a in arrays.values()) == 20


def test_pickles_and_zips_under_that_name_are_refused_unread(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was run",))

    path = tmp_path / "model.safetensors"
    for protocol in range(2, 6):
        path.write_bytes(pickle.dumps({"a": Bomb(), "long": "x" * 200}, protocol))
        with pytest.raises(UserError, match=r"is a pickle.*never"):
            import_tensors(path)
    path.write_bytes(pickle.dumps({"a": Bomb(), "long": "x" * 200}, 0))
    with pytest.raises(UserError, match="no safetensors file"):
        import_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"is a zip archive.*never"):
        import_tensors(path)


def test_another_models_file_is_refused_with_every_difference(tmp_path):
    path = tmp_path / "p"
    export_params(path, {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3), "extra": jnp.ones(1)})
    like = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(3, jnp.bfloat16), "extras": jnp.ones(1)}
    with pytest.raises(UserError) as caught:
        import_params(path, like)
    message = str(caught.value)
    assert "kernel is float32[2, 3], here float32[3, 2]" in message
    assert "bias is float32[3], here bfloat16[3]" in message
    assert "extras is missing (nearest: extra)" in message
    assert "extra is not in this model" in message


def test_values_that_are_not_finite_are_refused_on_request(tmp_path):
    export_params(tmp_path / "p", {"w": jnp.array([1, jnp.inf, jnp.nan], jnp.bfloat16)})
    assert import_tensors(tmp_path / "p").arrays["w"].shape == (3,)
    with pytest.raises(UserError, match="'w' holds 2 values that are not finite"):
        import_tensors(tmp_path / "p", finite=True)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    export_params(path, {"w": jnp.ones(2)})
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        export_params(path, {"w": jnp.zeros(2)})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def test_what_numbers_cannot_say_is_refused(tmp_path):
    with pytest.raises(UserError, match="k holds random keys"):
        export_params(tmp_path / "p", {"k": jax.random.key(0)})
    with pytest.raises(UserError, match="can't read"):
        import_tensors(tmp_path / "nowhere")
