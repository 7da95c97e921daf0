"""Any data set that TFDS prepared as array_record, read without TensorFlow."""

import functools
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lamina.models.spec import DataSpec
from lamina.platform.data import tokens
from lamina.platform.data.dataset import ArraySource, Dataset, Example, Source, with_held_out
from lamina.platform.errors import UserError

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_ANYWHERE = "~/tensorflow_datasets"
_INFO = "dataset_info.json"


def tfds(
    *,
    dataset: str,
    data_dir: str = "",
    inputs: str = "image",
    labels: str = "label",
    image_size: int = 0,
    context: int = 256,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    hold_in_memory: bool = False,
) -> Dataset:
    """Returns a prepared TFDS data set.

    The feature `inputs` is an image (uint8 [H, W, C]), a tensor, or text; the feature `labels` is a
    class, an integer, or a float target. With text and `labels=""` the task is to predict the next
    byte: each text is cut to its first `context` bytes or padded with weight 0. Missing validation
    and test splits are drawn from "train".

    Args:
        dataset: "name", "name/config" or "name/config/version", as its folder under `data_dir`.
        data_dir: where TFDS prepared it; empty: $TFDS_DATA_DIR or ~/tensorflow_datasets.
        inputs: feature that the model sees.
        labels: feature that it predicts; "" for next-byte prediction.
        image_size: side to which images are resized (shorter side) and cropped (centre); 0 keeps
            images of one size as they are.
        context: bytes of a text.
        validation_fraction: share of "train" for a missing "validation".
        test_fraction: share of "train" for a missing "test".
        hold_in_memory: read all at the start (then it can be held on the device too).

    Raises:
        UserError: the data set isn't there, is prepared in another format, or has other features.
    """
    opened = open_splits(dataset, data_dir, inputs, labels, image_size, context)
    splits = with_held_out(opened.splits, validation_fraction, test_fraction)
    if hold_in_memory:
        splits = {name: in_memory(source) for name, source in splits.items()}
    return Dataset(
        spec=opened.spec,
        splits={name: splits[name] for name in ("train", "validation", "test")},
        label_names=opened.label_names,
        decode=None if labels else tokens.decode_bytes,
        description=opened.description,
        bytes_per_token={} if labels else dict.fromkeys(splits, 1.0),
    )


class Opened(NamedTuple):
    """The prepared splits of a TFDS data set, under TFDS's own names."""

    spec: DataSpec
    splits: Mapping[str, Source]
    label_names: tuple[str, ...]
    description: str


def open_splits(
    dataset: str,
    data_dir: str = "",
    inputs: str = "image",
    labels: str = "label",
    image_size: int = 0,
    context: int = 256,
) -> Opened:
    """Opens what is prepared; the arguments are those of `tfds`.

    Raises:
        UserError: the data set isn't prepared, can't be read by position, or lacks a feature.
    """
    # The cheap part of importing TFDS is still a second: only those who use it pay.
    import tensorflow_datasets

    folder = _folder(dataset, data_dir)
    # TFDS decorates its functions in ways that hide their types.
    builder: Any = tensorflow_datasets.builder_from_directory(folder)
    info = builder.info
    if info.file_format is None or info.file_format.value not in ("array_record", "parquet"):
        raise UserError(
            f"{folder} is prepared as {info.file_format and info.file_format.value}, which can't "
            f"be read by position: {_how_to_prepare(dataset)}"
        )
    kinds = tensorflow_datasets.features
    features = info.features
    if not isinstance(features, kinds.FeaturesDict):
        raise UserError(f"{dataset} has no named features, but {features!r}")
    for option, name in (("inputs", inputs), ("labels", labels)):
        if name and name not in features:
            raise UserError(
                f"data.{option} = {name!r} is not a feature of {dataset}: it has "
                + ", ".join(sorted(features))
            )
    # We decode the image that is asked for, and TFDS shall decode none of the others.
    decoders = {
        name: tensorflow_datasets.decode.SkipDecoding()
        for name, feature in features.items()
        if isinstance(feature, kinds.Image)
    }
    feature = features[inputs]
    read_input, shape, dtype = _reader_of_inputs(feature, kinds, image_size, context, inputs)
    if labels:
        names, outputs = _classes(features[labels], kinds, labels)
        read = functools.partial(_labelled, inputs, labels, read_input, outputs > 0)
        outputs = outputs or _size(features[labels])
    else:
        if not isinstance(feature, kinds.Text):
            raise UserError(f'data.labels = "" needs text, and {inputs!r} is {feature!r}')
        names, outputs = (), tokens.BYTES
        read = functools.partial(_next_byte, inputs, context)
    splits = {
        name: PreparedSource(builder.as_data_source(split=name, decoders=decoders or None), read)
        for name in info.splits
    }
    described = f"TFDS {info.full_name}: {' '.join((info.description or '').split())[:300]}"
    return Opened(DataSpec(shape, dtype, outputs), splits, names, described)


class PreparedSource:
    """A split prepared by TFDS, with its examples brought into our form.

    Args:
        records: TFDS's random-access source.
        read: TFDS example -> our example.
    """

    def __init__(self, records: Any, read: Callable[[Mapping[str, Any]], Example]):
        self._records, self._read = records, read

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        return self._read(self._records[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        return [self._read(record) for record in self._records.__getitems__(list(indices))]

    def __repr__(self) -> str:
        return f"PreparedSource({self._records!r})"


def in_memory(source: Source) -> ArraySource:
    """Returns the source with all its examples read."""
    examples = source.__getitems__(range(len(source)))
    return ArraySource({k: np.stack([e[k] for e in examples]) for k in examples[0]})


def _folder(dataset: str, data_dir: str) -> str:
    """Returns the folder of the newest prepared version of `dataset`."""
    from etils import epath

    root = epath.Path(data_dir or os.environ.get("TFDS_DATA_DIR", _ANYWHERE)).expanduser()
    base = root / dataset.replace(":", "/")
    found = [base] if (base / _INFO).exists() else []
    if not found and base.is_dir():
        found = [path.parent for path in base.glob("*/" + _INFO)]
        if not found:
            configs = sorted({path.parent.parent.name for path in base.glob("*/*/" + _INFO)})
            if configs:
                raise UserError(
                    f"{dataset} is prepared in {root} with the configs {', '.join(configs)}: name "
                    f"one, as in data.dataset = '{dataset}/{configs[0]}'"
                )
    if not found:
        raise UserError(f"{dataset} is not prepared in {root}: {_how_to_prepare(dataset)}")
    return os.fspath(max(found, key=lambda path: _version(path.name)))


def _version(name: str) -> tuple[int, ...]:
    parts = name.split(".")
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else (-1,)


def _how_to_prepare(dataset: str) -> str:
    return (
        "prepare it on a machine that may download and has TensorFlow, with "
        f"`tfds build {dataset} --file_format=array_record --data_dir=FOLDER`, copy FOLDER here, "
        "and set data.data_dir to it"
    )


def _reader_of_inputs(feature: Any, kinds: Any, image_size: int, context: int, name: str):
    """Returns (raw value -> array, shape, dtype) for the input feature."""
    if isinstance(feature, kinds.Image):
        *sides, channels = feature.shape
        channels = channels or 3
        if image_size:
            sides = [image_size, image_size]
        elif None in sides:
            raise UserError(
                f"the images {name!r} differ in size: set data.image_size, for example to 224"
            )
        read = functools.partial(decode_image, channels=channels, size=image_size)
        return read, (*sides, channels), "uint8"
    if isinstance(feature, kinds.Text):
        return functools.partial(_text_bytes, context=context), (context,), "int32"
    if None in feature.shape:
        raise UserError(f"the feature {name!r} has examples of different shapes: {feature.shape}")
    kind = np.dtype(feature.np_dtype)
    dtype = "uint8" if kind == np.uint8 else "int32" if kind.kind in "iu" else "float32"
    return functools.partial(np.asarray, dtype=dtype), tuple(feature.shape), dtype


def _classes(feature: Any, kinds: Any, name: str) -> tuple[tuple[str, ...], int]:
    """Returns the class names and their number; 0 classes stand for a float target."""
    if isinstance(feature, kinds.ClassLabel):
        return tuple(feature.names), feature.num_classes
    if np.dtype(feature.np_dtype).kind == "f" and None not in feature.shape:
        return (), 0
    raise UserError(
        f"data.labels = {name!r} is {feature!r}: it should be a ClassLabel or a float target"
    )


def _size(feature: Any) -> int:
    return math.prod(feature.shape)


def decode_image(encoded: bytes, channels: int, size: int = 0) -> np.ndarray:
    """Returns a PNG or JPEG as uint8 [H, W, C].

    Args:
        encoded: the file's bytes.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        size: resize the shorter side to it (bicubic) and crop the centre; 0 for neither.

    Raises:
        UserError: the bytes are no image.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as file:
            image = file.convert(_MODES[channels])
    except (OSError, SyntaxError) as error:
        raise UserError(f"an image is damaged: {error}") from error
    if size:
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + size, top + size))
    pixels = np.asarray(image, np.uint8)
    return pixels.reshape(*pixels.shape[:2], channels)


def _text_bytes(text: bytes, context: int) -> np.ndarray:
    padded = np.zeros(context, np.int32)
    raw = np.frombuffer(text[:context], np.uint8)
    padded[: len(raw)] = raw
    return padded


def _labelled(
    inputs: str, labels: str, read_input: Callable, classes: bool, record: Mapping[str, Any]
) -> Example:
    label = np.asarray(record[labels])
    return {
        "inputs": read_input(record[inputs]),
        "labels": label.astype(np.int32) if classes else label.astype(np.float32).reshape(-1),
    }


def _next_byte(inputs: str, context: int, record: Mapping[str, Any]) -> Example:
    text = record[inputs][:context]
    labels = _text_bytes(text, context)
    start = np.array([tokens.SEPARATOR], np.int32)
    weights = (np.arange(context) < len(text)).astype(np.float32)
    return {
        "inputs": np.concatenate([start, labels[:-1]]),
        "labels": labels,
        "weights": weights,
    }
