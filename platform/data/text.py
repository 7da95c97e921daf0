"""The user's own text files, by bytes or by a tokenizer's file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lamina.models.spec import DataSpec
from lamina.platform.data import packing, tokens
from lamina.platform.data.dataset import ArraySource, Dataset, Source
from lamina.platform.errors import UserError

_SPLITS = ("train", "validation", "test")
_ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")


class Tokenizer(NamedTuple):
    """Text to token ids and back.

    Attributes:
        encode: bytes of a document -> ids, int32 or uint8.
        decode: ids -> text.
        vocabulary: number of ids.
        separator: id between documents.
    """

    encode: Callable[[bytes], np.ndarray]
    decode: Callable[[Sequence[int]], str]
    vocabulary: int
    separator: int


def text(
    *,
    path: str,
    pattern: str = "*.txt",
    tokenizer: str = "",
    separator: int = -1,
    context: int = 256,
    stride: int = 0,
    packed: bool = False,
    validation_fraction: float = 0.05,
    test_fraction: float = 0.05,
) -> Dataset:
    """Returns next-token prediction over text files; each file is a document.

    Where `path` has folders or files called train, validation and test, these are the splits.
    Otherwise the files, in sorted order, are cut at the fractions: validation is before the last
    part, which is test; a file across a cut is divided at the end of a line. In "validation" and
    "test" each token is predicted exactly once.

    Args:
        path: a file, or a folder that is searched with all its sub-folders.
        pattern: which files of a folder.
        tokenizer: "" for bytes, or a SentencePiece `.model`, or a Hugging Face `tokenizer.json`.
        separator: token id between documents; -1 takes 0 for bytes, else the tokenizer's end token.
        context: tokens predicted per example.
        stride: tokens from one training window to the next; 0 is `context` (no overlap).
        packed: rows hold whole documents with segments and positions, rather than windows over the
            concatenation.
        validation_fraction: share of the bytes for a missing validation split.
        test_fraction: share of the bytes for a missing test split.

    Raises:
        UserError: nothing found, text that isn't UTF-8 (with a tokenizer), a broken tokenizer, or
            missing packages.
    """
    if packed and stride:
        raise UserError("data.stride is for windows: leave it at 0 with packed=True")
    root = Path(path).expanduser()
    documents = _documents(root, pattern, validation_fraction, test_fraction)
    chosen = open_tokenizer(tokenizer, separator)
    splits: dict[str, Source] = {}
    per_token: dict[str, float] = {}
    for name in _SPLITS:
        encoded = [chosen.encode(document) for document in documents[name]]
        predicted = sum(len(ids) + 1 for ids in encoded)
        if not predicted:
            raise UserError(f"{root} leaves the split {name!r} without text")
        per_token[name] = sum(map(len, documents[name])) / predicted
        if packed:
            splits[name] = ArraySource(packing.pack(encoded, context, chosen.separator))
        else:
            train = name == "train"
            splits[name] = tokens.WindowSource(
                _stream(encoded, chosen.separator),
                context,
                stride=stride if train else 0,
                whole=not train,
            )
    sizes = ", ".join(f"{name} {sum(map(len, documents[name]))} bytes" for name in _SPLITS)
    return Dataset(
        spec=DataSpec((context,), "int32", chosen.vocabulary),
        splits=splits,
        decode=chosen.decode,
        description=f"Text of {root} by {tokenizer or 'bytes'} ({sizes}).",
        bytes_per_token=per_token,
    )


def open_tokenizer(path: str = "", separator: int = -1) -> Tokenizer:
    """Returns the tokenizer in a file, or that of bytes for "".

    Args:
        path: "", a SentencePiece `.model`, or a Hugging Face `.json`.
        separator: token id between documents; -1 for the tokenizer's own.

    Raises:
        UserError: no such file, a broken one, missing packages, or no separator.
    """
    if not path:
        chosen = Tokenizer(
            lambda document: np.frombuffer(document, np.uint8),
            tokens.decode_bytes,
            tokens.BYTES,
            tokens.SEPARATOR,
        )
    elif not Path(path).is_file():
        raise UserError(f"data.tokenizer = {path!r} is not a file")
    elif path.endswith(".model"):
        chosen = _sentencepiece(path)
    elif path.endswith(".json"):
        chosen = _hugging_face(path)
    else:
        raise UserError(
            f"data.tokenizer = {path!r} should end in .model (SentencePiece) or .json (tokenizers)"
        )
    if separator >= 0:
        chosen = chosen._replace(separator=separator)
    if not 0 <= chosen.separator < chosen.vocabulary:
        raise UserError(
            f"the tokenizer {path} has no end token below {chosen.vocabulary}: set data.separator "
            "to the id that shall stand between documents"
        )
    return chosen


def cut(documents: Sequence[bytes], fractions: Sequence[float]) -> list[list[bytes]]:
    """Cuts documents, in order, into parts of about the given fractions of their bytes.

    Args:
        documents: the text.
        fractions: share of each part; they sum to 1.

    Returns:
        The documents of each part; a document across a cut is divided at the end of a line.
    """
    total = sum(map(len, documents))
    ends = [share * total for share in np.cumsum(fractions)[:-1]] + [float("inf")]
    parts: list[list[bytes]] = [[] for _ in fractions]
    part = seen = 0
    for document in documents:
        start = 0
        while start < len(document):
            while seen >= ends[part]:
                part += 1
            wanted = ends[part] - seen
            stop = len(document)
            if wanted < stop - start:
                line = document.find(b"\n", start + int(wanted))
                stop = line + 1 if line >= 0 else stop
            parts[part].append(document[start:stop])
            seen += stop - start
            start = stop
    return parts


def _documents(
    root: Path, pattern: str, validation: float, test: float
) -> dict[str, Sequence[bytes]]:
    if root.is_file():
        files = [root]
    elif root.is_dir():
        files = sorted(file for file in root.rglob(pattern) if file.is_file())
    else:
        raise UserError(f"data.path = {str(root)!r} is neither a file nor a folder")
    if not files:
        raise UserError(f"{root} has no files {pattern!r}: set data.pattern")
    named: dict[str, list[Path]] = {name: [] for name in _SPLITS}
    rest = []
    for file in files:
        top = file.relative_to(root).parts[0].partition(".")[0] if file != root else ""
        named.get(top, rest).append(file)
    if not any(named.values()):
        if not (validation > 0 and test > 0 and validation + test < 1):
            raise UserError(
                f"data.validation_fraction = {validation} and test_fraction = {test} should be "
                "above 0, and below 1 together"
            )
        fractions = (1 - validation - test, validation, test)
        parts = cut([file.read_bytes() for file in rest], fractions)
        return dict(zip(_SPLITS, parts, strict=True))
    if rest or not all(named.values()):
        has = {name: len(members) for name, members in named.items()}
        raise UserError(
            f"{root} has files for {has} and {len(rest)} others: name all three splits, or none"
        )
    return {name: [file.read_bytes() for file in members] for name, members in named.items()}


def _stream(encoded: Sequence[np.ndarray], separator: int) -> np.ndarray:
    between = np.array([separator], encoded[0].dtype)
    return np.concatenate([between, *(part for ids in encoded for part in (ids, between))])


def _characters(document: bytes) -> str:
    try:
        return document.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"a text is not UTF-8 ({error}): convert it, or read it by bytes"
        ) from error


def _sentencepiece(path: str) -> Tokenizer:
    try:
        import sentencepiece
    except ImportError as error:
        raise _needs_text("SentencePiece", path) from error
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is not a SentencePiece model: {error}") from error
    return Tokenizer(
        lambda document: np.array(model.encode(_characters(document)), np.int32),
        lambda ids: model.decode([int(i) for i in ids]),
        model.vocab_size(),
        model.eos_id(),
    )


def _hugging_face(path: str) -> Tokenizer:
    try:
        import tokenizers
    except ImportError as error:
        raise _needs_text("Hugging Face", path) from error
    try:
        model = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the package raises bare Exception for broken files
        raise UserError(f"{path} is not a tokenizer's file: {error}") from error
    ends = [model.token_to_id(token) for token in _ENDS]

    def encode(document: bytes) -> np.ndarray:
        ids = model.encode(_characters(document), add_special_tokens=False).ids
        return np.array(ids, np.int32)

    return Tokenizer(
        encode,
        lambda ids: model.decode([int(i) for i in ids]),
        model.get_vocab_size(),
        next((end for end in ends if end is not None), -1),
    )


def _needs_text(kind: str, path: str) -> UserError:
    return UserError(
        f"the {kind} tokenizer {path} needs packages of the extra 'text': pip install lamina[text]"
    )
