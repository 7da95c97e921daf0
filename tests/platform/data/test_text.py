"""Text is cut, packed and tokenized so that each held-out token is predicted exactly once."""

import sys

import numpy as np
import pytest

from lamina.platform.data import tokens
from lamina.platform.data.packing import first_fit, pack
from lamina.platform.data.text import cut, open_tokenizer, text
from lamina.platform.errors import UserError

LINES = [f"line {i} of a text that is neither long nor short\n" for i in range(400)]


@pytest.fixture
def folder(tmp_path):
    for part in range(4):
        (tmp_path / f"{part}.txt").write_text("".join(LINES[part * 100 : (part + 1) * 100]))
    return tmp_path


def everything(split):
    return split.gather(split.arrays, np.arange(len(split)))


# --- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 7, 8, 9, 15, 16, 17, 50])
def test_whole_windows_predict_each_token_after_the_first_once(length):
    stream = np.arange(length, dtype=np.int32) + 100
    batch = everything(tokens.WindowSource(stream, 8, whole=True))
    predicted = batch["weights"] > 0
    assert np.array_equal(batch["labels"][predicted], stream[1:])
    assert np.array_equal(batch["inputs"][predicted], stream[:-1])


def test_training_windows_are_full_and_a_stride_overlaps_them():
    stream = np.arange(21, dtype=np.uint8)
    full = tokens.WindowSource(stream, 8)
    assert len(full) == 2
    assert sorted(full[0]) == ["inputs", "labels"]
    overlapping = tokens.WindowSource(stream, 8, stride=3)
    assert [int(overlapping[i]["inputs"][0]) for i in range(len(overlapping))] == [0, 3, 6, 9, 12]
    assert overlapping[4]["labels"][-1] == 20


def test_one_window_is_the_same_alone_and_in_a_batch():
    source = tokens.WindowSource(np.arange(50, dtype=np.uint8), 8, whole=True)
    batch = source.gather(source.arrays, np.array([[1, 6], [0, 2]]))
    assert batch["inputs"].shape == (2, 2, 8)
    for name, value in source[6].items():
        assert np.array_equal(batch[name][0, 1], value)
    with pytest.raises(IndexError):
        source[len(source)]


def test_too_little_text_for_a_window_is_refused():
    with pytest.raises(UserError, match="too few for a window of context = 8"):
        tokens.WindowSource(np.zeros(8, np.uint8), 8)
    with pytest.raises(UserError, match="context = 0"):
        tokens.WindowSource(np.zeros(8, np.uint8), 0)


# --- cutting and splits --------------------------------------------------------------------------


def test_cutting_keeps_all_text_and_divides_at_the_end_of_a_line():
    documents = ["".join(LINES[i : i + 40]).encode() for i in range(0, 400, 40)]
    parts = cut(documents, (0.85, 0.1, 0.05))
    assert b"".join(piece for part in parts for piece in part) == b"".join(documents)
    total = sum(map(len, documents))
    for part, share in zip(parts, (0.85, 0.1, 0.05), strict=True):
        assert abs(sum(map(len, part)) / total - share) < 0.01
        assert part[-1].endswith(b"\n")


def test_text_without_line_ends_is_cut_between_documents():
    assert cut([b"aaaa", b"bbbb", b"cccc"], (0.4, 0.3, 0.3)) == [[b"aaaa", b"bbbb"], [b"cccc"], []]


def test_files_named_as_splits_are_the_splits(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.txt").write_text("a" * 50)
    (tmp_path / "validation.txt").write_text("b" * 50)
    (tmp_path / "test.txt").write_text("c" * 50)
    dataset = text(path=str(tmp_path), context=10)
    for name, letter in (("train", "a"), ("validation", "b"), ("test", "c")):
        assert dataset.decode(dataset.splits[name][0]["labels"]) == letter * 10


def test_some_named_splits_without_the_others_are_refused(tmp_path):
    (tmp_path / "train.txt").write_text("a" * 50)
    with pytest.raises(UserError, match="name all three splits, or none"):
        text(path=str(tmp_path))


def test_bytes_of_a_folder_are_all_there_in_order(folder):
    dataset = text(path=str(folder), context=32)
    assert dataset.spec == ((32,), "int32", 256)
    read = "".join(
        dataset.decode(split.arrays["tokens"][: split.predicted + 1])
        for split in dataset.splits.values()
    )
    assert read.replace("\f", "") == "".join(LINES)
    assert dataset.bytes_per_token["test"] == pytest.approx(1, abs=0.02)


def test_unusable_paths_and_fractions_are_refused(folder):
    with pytest.raises(UserError, match="neither a file nor a folder"):
        text(path=str(folder / "gone"))
    with pytest.raises(UserError, match=r"no files '\*.md'"):
        text(path=str(folder), pattern="*.md")
    with pytest.raises(UserError, match="below 1 together"):
        text(path=str(folder), validation_fraction=0.6, test_fraction=0.5)
    with pytest.raises(UserError, match=r"data\.stride is for windows"):
        text(path=str(folder), packed=True, stride=4)


# --- packing -------------------------------------------------------------------------------------


def test_first_fit_puts_each_item_in_the_first_row_with_room():
    lengths = np.random.default_rng(0).integers(1, 11, 300).tolist()
    rows, offsets = first_fit(lengths, 10)
    used: list[int] = []
    for length, row, offset in zip(lengths, rows, offsets, strict=True):
        expected = next((r for r, u in enumerate(used) if u + length <= 10), len(used))
        if expected == len(used):
            used.append(0)
        assert (row, offset) == (expected, used[expected])
        used[expected] += length


def test_first_fit_refuses_items_that_fit_nowhere():
    with pytest.raises(ValueError, match="length 1 to 5"):
        first_fit([3, 6], 5)
    assert [len(part) for part in first_fit([], 5)] == [0, 0]


def test_packed_rows_hold_each_document_once_with_segments_and_positions():
    rng = np.random.default_rng(1)
    documents = [rng.integers(1, 200, n) for n in (3, 9, 1, 25, 0, 6, 7)]
    packed = pack(documents, 10, separator=0)
    found = []
    for row in range(len(packed["inputs"])):
        segments = packed["segments"][row]
        assert np.array_equal(packed["weights"][row], (segments > 0).astype(np.float32))
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            assert np.array_equal(packed["positions"][row][inside], np.arange(inside.sum()))
            found.append((packed["inputs"][row][inside], packed["labels"][row][inside]))
    predicted = sorted(np.concatenate([labels for _, labels in found]).tolist())
    assert predicted == sorted([*np.concatenate(documents).tolist(), *[0] * len(documents)])
    for inputs, labels in found:
        assert np.array_equal(inputs[1:], labels[:-1])


def test_packed_text_has_the_fields_of_packed_rows(folder):
    dataset = text(path=str(folder), packed=True, context=64)
    example = dataset.splits["train"][0]
    assert sorted(example) == ["inputs", "labels", "positions", "segments", "weights"]
    assert example["inputs"].shape == (64,)


# --- tokenizers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A SentencePiece and a Hugging Face tokenizer, trained on a few lines."""
    sentencepiece = pytest.importorskip("sentencepiece")
    tokenizers = pytest.importorskip("tokenizers")
    place = tmp_path_factory.mktemp("tokenizers")
    (place / "lines.txt").write_text("".join(LINES))
    sentencepiece.SentencePieceTrainer.train(
        input=str(place / "lines.txt"),
        model_prefix=str(place / "pieces"),
        vocab_size=60,
        minloglevel=2,
    )
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(LINES, trainer)
    model.save(str(place / "tokenizer.json"))
    model_without_end = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    model_without_end.save(str(place / "endless.json"))
    return place


@pytest.mark.parametrize("file", ["pieces.model", "tokenizer.json"])
def test_tokenized_text_decodes_to_itself(folder, trained, file):
    dataset = text(path=str(folder), tokenizer=str(trained / file), context=16)
    split = dataset.splits["validation"]
    batch = everything(split)
    ids = batch["labels"][batch["weights"] > 0]
    assert ids.max() < dataset.spec.outputs
    decoded = dataset.decode(ids).replace("<|endoftext|>", "")
    assert " ".join(decoded.split()) in " ".join("".join(LINES).split())
    assert 1 < dataset.bytes_per_token["validation"] < 60


def test_broken_and_unknown_tokenizers_are_refused(tmp_path, trained):
    for name in ("bad.model", "bad.json", "bad.bin"):
        (tmp_path / name).write_bytes(b"{nonsense")
        with pytest.raises(UserError, match=name):
            open_tokenizer(str(tmp_path / name))
    with pytest.raises(UserError, match="is not a file"):
        open_tokenizer(str(tmp_path / "gone.model"))
    with pytest.raises(UserError, match=r"set data\.separator"):
        open_tokenizer(str(trained / "endless.json"))
    assert open_tokenizer(str(trained / "endless.json"), separator=0).separator == 0


@pytest.mark.parametrize(
    ("package", "file"), [("sentencepiece", "a.model"), ("tokenizers", "a.json")]
)
def test_missing_packages_are_named_by_their_extra(tmp_path, monkeypatch, package, file):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / file).write_bytes(b"{}")
    with pytest.raises(UserError, match=r"pip install lamina\[text\]"):
        open_tokenizer(str(tmp_path / file))


def test_text_that_is_not_utf8_needs_bytes(tmp_path, trained):
    (tmp_path / "latin.txt").write_bytes("café\n".encode("latin-1") * 100)
    with pytest.raises(UserError, match="not UTF-8"):
        text(path=str(tmp_path), tokenizer=str(trained / "tokenizer.json"), context=4)
    assert len(text(path=str(tmp_path), context=4).splits["train"]) > 10
