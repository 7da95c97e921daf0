"""Merging of files: the numbers of trees, whole or not at all, and hostile input."""

import json
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lamina.platform import merging
from lamina.platform.errors import UserError
from lamina.platform.merging import files, limits, output, streaming
from lamina.platform.programs import merge as program

KEYS = json.loads(Path(__file__).with_name("keys.json").read_text())
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(params=[np.float32, BF16], ids=["float32", "bfloat16"])
def inputs(request, tensors):
    base = tensors(0, dtype=request.param)
    return [base, *(tensors(seed, base, request.param) for seed in (1, 2, 3))]


def merge(name, paths, out, **more):
    base, *models = paths
    models = models[:2] if name == "slerp" else models
    prepared = program.prepare(name, KEYS[name], models=models, base=base, out=str(out), **more)
    return files.run(prepared)


@pytest.mark.parametrize("name", sorted(KEYS))
@pytest.mark.parametrize("piece", [7, 1 << 18])
def test_pieces_of_any_size_give_the_numbers_of_trees(
    name, piece, inputs, tmp_path, monkeypatch, write
):
    monkeypatch.setattr(streaming, "PIECE", piece)
    monkeypatch.setattr(streaming, "BLOCK", max(piece // 2, 3))
    monkeypatch.setattr(limits, "HELD", 0 if piece == 7 else limits.HELD)
    merge(name, write(tmp_path, inputs), tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    base, *models = inputs
    models = models[:2] if name == "slerp" else models
    expected = merging.create(name, **KEYS[name])(models, base=base)
    # Sums in other orders may round the other way: by one unit in the last place of bfloat16.
    for tensor, value in expected.items():
        value = np.asarray(value)
        assert found[tensor].dtype == value.dtype
        one, other = found[tensor].astype(np.float32), value.astype(np.float32)
        tolerance = {"rtol": 0, "atol": 2e-6} if value.dtype != BF16 else {"rtol": 2**-7}
        np.testing.assert_allclose(one, other, **tolerance)
        assert (np.abs(one - other) > 1e-5).mean() < 0.02


@pytest.mark.parametrize("held", [0, 1000])
def test_equal_magnitudes_are_kept_in_the_order_of_places(tmp_path, monkeypatch, write, held):
    monkeypatch.setattr(limits, "HELD", held)
    monkeypatch.setattr(streaming, "PIECE", 8)
    monkeypatch.setattr(streaming, "BLOCK", 3)
    base = {"a": np.zeros(50, np.float32), "b": np.zeros(50, np.float32)}
    model = {name: np.ones(50, np.float32) for name in base}
    paths = write(tmp_path, [base, model])
    prepared = program.prepare(
        "ties",
        {"density": 0.63},
        models=paths[1:],
        base=paths[0],
        out=str(tmp_path / "o.safetensors"),
    )
    files.run(prepared)
    found = load_file(tmp_path / "o.safetensors")
    np.testing.assert_array_equal(np.concatenate([found["a"], found["b"]]), np.arange(100) < 63)


def test_the_manifest_says_what_was_merged_and_hashes_the_inputs(paths, tmp_path):

    merge("ties", paths, tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    manifest = json.loads(metadata["lamina_merge"])
    assert manifest["method"] == "ties"
    assert manifest["keys"] == KEYS["ties"]
    assert [entry["path"] for entry in manifest["models"]] == paths[1:]
    hashes = {entry["sha256"] for entry in [manifest["base"], *manifest["models"]]}
    assert len(hashes) == 4
    before = (tmp_path / "out.safetensors").read_bytes()
    merge("ties", paths, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == before


def folder_of(path, model):
    """A Hugging Face folder with two shards and other files."""
    path.mkdir()
    names = list(model)
    shards = {"model-00001-of-00002.safetensors": names[:1]}
    shards["model-00002-of-00002.safetensors"] = names[1:]
    for file, part in shards.items():
        save_file({name: model[name] for name in part}, path / file, {"format": "pt"})
    table = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    parts = {"text_config": {"dtype": "float32"}, "dtype": "of another kind"}
    (path / "config.json").write_text(json.dumps({"torch_dtype": "float32"} | parts))
    (path / "tokenizer.model").write_bytes(b"tokens")
    (path / "pytorch_model.bin").write_bytes(b"old weights")
    return str(path)


def test_a_folder_keeps_its_shards_and_its_other_files(tmp_path, tensors):
    base = tensors(0)
    models = [base, *(tensors(seed, base) for seed in (1, 2, 3))]
    paths = [folder_of(tmp_path / f"m{number}", model) for number, model in enumerate(models)]
    out = tmp_path / "out"
    merge("task_arithmetic", paths, out, dtype="bfloat16")
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "merge.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
    ]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * value.size for value in base.values())
    assert json.loads((out / "config.json").read_text()) == {
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16"},
        "dtype": "of another kind",
    }
    found = {}
    for file in out.glob("*.safetensors"):
        found |= load_file(file)
    expected = merging.create("task_arithmetic", scale=0.7)(models[1:], base=base)
    for name, value in expected.items():
        assert found[name].dtype == BF16
        np.testing.assert_allclose(found[name].astype(np.float32), value, rtol=2**-8)
    merge("linear", paths, out)  # an earlier merge is replaced
    assert json.loads((out / "merge.json").read_text())["method"] == "linear"


def refused(paths, tmp_path, match, name="ties", out=None):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=match):
        merge(name, paths, out or tmp_path / "out.safetensors")
    assert sorted(tmp_path.rglob("*")) == before


def test_places_that_no_path_leads_to_are_refused(paths, tmp_path):
    refused(paths, tmp_path, "can't be looked at", out="~nobody-here/merged.safetensors")
    refused(paths, tmp_path, "can't be looked at", out=tmp_path / ("x" * 300 + ".safetensors"))
    refused(["y" * 300, *paths[1:]], tmp_path, "can't be looked at")
    refused(paths, tmp_path, "should end in .safetensors", out=tmp_path / "merged.bin")
    for nameless in (".", ".."):
        refused(paths, tmp_path, "with a name of its own", out=nameless)


def test_weights_without_a_finite_sum_are_refused(paths, tmp_path):
    with pytest.raises(UserError, match="which is inf"):
        program.prepare("linear", {}, models=paths, weights=(1e308,) * 4, out=str(tmp_path / "o"))


def test_iso_c_of_files_sees_matrices_alone_in_float64_and_names_what_is_not_finite(
    tmp_path, write
):
    rng = np.random.default_rng(0)
    shapes = {"matrix": (6, 5), "convolution": (4, 3, 2, 2), "vector": (7,)}
    base, one, two = ({n: rng.standard_normal(s) for n, s in shapes.items()} for _ in range(3))
    paths = write(tmp_path, [base, one, two])
    files.run(
        program.prepare(
            "iso_c", {}, models=paths[1:], base=paths[0], out=str(tmp_path / "o.safetensors")
        )
    )
    found = load_file(tmp_path / "o.safetensors")
    left, values, right = np.linalg.svd(one["matrix"] + two["matrix"] - 2 * base["matrix"], False)
    expected = {name: (one[name] + two[name]) / 2 for name in shapes}
    expected["matrix"] = base["matrix"] + values.mean() * left @ right
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-12)
    two["matrix"][0, 0] = np.nan
    paths = write(tmp_path, [base, one, two])
    with pytest.raises(UserError, match=r"model2.safetensors: 'matrix' holds NaN"):
        files.run(
            program.prepare(
                "iso_c", {}, models=paths[1:], base=paths[0], out=str(tmp_path / "p.safetensors")
            )
        )


def header_of(path):
    content = Path(path).read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def rewrite(path, header, data):
    text = json.dumps(header).encode()
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_damaged_files_are_refused_and_nothing_is_written(paths, tmp_path):
    good = Path(paths[2]).read_bytes()
    header, data = header_of(paths[2])

    Path(paths[2]).write_bytes(good[:-5])
    refused(paths, tmp_path, "model2.*cut short")
    Path(paths[2]).write_bytes(good[:20])
    refused(paths, tmp_path, "model2.*cut short")
    Path(paths[2]).write_bytes((1 << 60).to_bytes(8, "little") + good[8:])
    refused(paths, tmp_path, "model2.*header")
    Path(paths[2]).write_bytes(pickle.dumps({"weights": [1.0]}))
    refused(paths, tmp_path, "model2.*pickle")
    lying = json.loads(json.dumps(header))
    lying["model.norm"]["shape"] = [24]
    rewrite(paths[2], lying, data)
    refused(paths, tmp_path, "model.norm")
    rewrite(paths[2], header | {"__metadata__": {"format": "\ud800"}}, data)
    refused(paths, tmp_path, "model2.*no Unicode")
    overlapping = json.loads(json.dumps(header))
    first = min((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    start, end = header[first]["data_offsets"]
    for name in overlapping:
        if name != "__metadata__" and header[name]["data_offsets"][0] == end:
            overlapping[name]["data_offsets"] = [o - 4 for o in header[name]["data_offsets"]]
    rewrite(paths[2], overlapping, data)
    refused(paths, tmp_path, "overlaps")
    assert start == 0


def test_models_that_do_not_fit_are_refused_with_the_names(paths, tmp_path):
    model = load_file(paths[2])
    save_file({n: v for n, v in model.items() if n != "model.norm"}, paths[2])
    refused(paths, tmp_path, r"'model.norm' is missing in .*model2")
    save_file(model | {"more": model["model.norm"]}, paths[2])
    refused(paths, tmp_path, r"'more' is in .*model2")
    save_file(model | {"model.norm": model["model.norm"][:-1].copy()}, paths[2])
    refused(paths, tmp_path, r"'model.norm' has shape \[22\]")


@pytest.mark.parametrize("name", sorted(KEYS))
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_with_the_tensor(name, value, paths, tmp_path):
    model = load_file(paths[2])
    model["model.layers.0.up"][3, 4] = value
    save_file(model, paths[2])
    refused(paths, tmp_path, r"model2.*'model.layers.0.up' holds NaN or inf", name)


@pytest.mark.parametrize(
    "file",
    [
        *("../m1/secret.safetensors", "/etc/x.safetensors", "weights.bin", 3, "x\0.safetensors"),
        "\ud800.safetensors",
    ],
)
def test_an_index_that_leads_out_of_its_folder_is_refused(file, tmp_path, tensors):
    base = tensors(0)
    paths = [folder_of(tmp_path / f"m{n}", base) for n in range(2)]
    index = Path(paths[1], "model.safetensors.index.json")
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm"] = file
    index.write_text(json.dumps(content))
    refused(paths, tmp_path, "'model.norm' should be in a safetensors file of this folder")


def test_an_index_that_lies_is_refused(tmp_path, tensors):
    base = tensors(0)
    paths = [folder_of(tmp_path / f"m{n}", base) for n in range(2)]
    index = Path(paths[1], "model.safetensors.index.json")
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    refused(paths, tmp_path, "'ghost'")
    index.write_text("[")
    refused(paths, tmp_path, "weight_map")


def test_inputs_and_foreign_folders_are_not_written_over(paths, tmp_path):
    refused(paths, tmp_path, "would write over the input", out=paths[1])
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_text("mine")
    refused(paths, tmp_path, "no merge has made it", out=other)
    mine = tmp_path / "mine.safetensors"
    for content in (Path(paths[0]).read_bytes(), b"no such file"):
        mine.write_bytes(content)
        refused(paths, tmp_path, "no merge has made it", out=mine)
        assert mine.read_bytes() == content
    mine.write_bytes(b"")  # as mktemp makes one: there is nothing to lose
    for name in ("ties", "linear"):  # an earlier merge is replaced
        merge(name, paths, mine)
    with safe_open(mine, "np") as file:
        assert json.loads(file.metadata()["lamina_merge"])["method"] == "linear"


def test_numbers_of_other_kinds_are_refused(paths, tmp_path):
    model = load_file(paths[2])
    save_file(model | {"model.norm": np.arange(23)}, paths[2])
    refused(paths, tmp_path, "'model.norm' is int64 in .*model2.* and float32 in .*model0")


def test_pickles_and_places_elsewhere_are_refused(paths, tmp_path):
    pickles = tmp_path / "pytorch"
    pickles.mkdir()
    (pickles / "config.json").write_text("{}")
    (pickles / "pytorch_model.bin").write_bytes(pickle.dumps(1))
    refused([*paths[:2], str(pickles)], tmp_path, "never read, convert pytorch_model.bin")
    refused([*paths[:2], str(pickles / "pytorch_model.bin")], tmp_path, "is a pickle")
    refused([*paths[:2], "gs://bucket/a.safetensors"], tmp_path, "isn't on this machine")
    refused(paths, tmp_path, "isn't on this machine", out="gs://bucket/out.safetensors")


def test_a_run_stays_a_run_whatever_was_exported_into_it(paths, tmp_path, tensors):
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text("{}")
    save_file(tensors(0), run / "exported.safetensors")
    refused([*paths[:2], str(run)], tmp_path, "is no run folder: it has no config.json")


def test_links_to_files_are_carried_over_and_links_to_folders_are_not(tmp_path, tensors):
    model = tensors(0)
    paths = [folder_of(tmp_path / name, model) for name in ("a", "b")]
    secret = tmp_path / "elsewhere"
    secret.mkdir()
    (secret / "key").write_text("secret")
    nested = Path(paths[0], "pooling")
    nested.mkdir()
    (nested / "config.json").symlink_to(secret / "key")
    (nested / "round").symlink_to(nested)
    Path(paths[0], "all").symlink_to(secret)
    merge("linear", [paths[1], *paths], tmp_path / "out")
    carried = sorted(str(path.relative_to(tmp_path / "out")) for path in tmp_path.rglob("out/*/*"))
    assert carried == ["pooling/config.json"]
    assert (tmp_path / "out" / "pooling" / "config.json").read_text() == "secret"
    Path(paths[0], "vocab.txt").symlink_to(tmp_path / "gone")
    refused([paths[1], *paths], tmp_path, "vocab.txt is a link that leads nowhere", "linear", "out")


def test_a_stage_that_is_a_link_is_not_followed(paths, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis").write_text("years")
    (tmp_path / ".out.safetensors.merging").symlink_to(mine)
    refused(paths, tmp_path, "can't write .*out.safetensors")
    assert (mine / "thesis").read_text() == "years"


def test_files_that_cannot_be_read_are_named_before_anything_is_written(
    tmp_path, tensors, monkeypatch
):
    paths = [folder_of(tmp_path / name, tensors(0)) for name in ("a", "b")]
    monkeypatch.setattr(output.os, "access", lambda path, mode: path.name != "tokenizer.model")
    refused([paths[1], *paths], tmp_path, "can't read .*tokenizer.model", "linear", "out")

    def walk(top, onerror):
        onerror(PermissionError(13, "Permission denied", f"{top}/pooling"))
        yield from ()

    monkeypatch.setattr(output.os, "walk", walk)
    refused([paths[1], *paths], tmp_path, "can't read .*pooling: permission", "linear", "out")
