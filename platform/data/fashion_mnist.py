"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747) from its original IDX files."""

import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from lamina.models.spec import DataSpec
from lamina.platform.data import tfds
from lamina.platform.data.dataset import ArraySource, Dataset, Source, subset
from lamina.platform.errors import UserError

DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"
LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_SIZES = {"train": 60_000, "t10k": 10_000}
_SIDE = 28
_HELD_OUT = 6_000


def fashion_mnist(*, data_dir: str = "") -> Dataset:
    """Returns 54,000 training, 6,000 validation and 10,000 test images of clothing in 10 classes.

    Inputs are uint8 [28, 28, 1], labels int32. Validation is the last 10% of the training file.

    Args:
        data_dir: folder of the four `*-ubyte.gz` files, or of data sets that TFDS prepared. Where
            empty: $LAMINA_DATA_DIR, then the folder of Debian's dataset-fashion-mnist.

    Raises:
        UserError: the data are nowhere, or a file is damaged.
    """
    given = data_dir or os.environ.get("LAMINA_DATA_DIR", "")
    folders = [Path(given).expanduser()] if data_dir else []
    if not data_dir:
        folders = [Path(folder) for folder in (given, DEBIAN_FOLDER) if folder]
    for folder in folders:
        for place in (folder, folder / "fashion-mnist"):
            if (place / "train-images-idx3-ubyte.gz").is_file():
                with ThreadPoolExecutor(2) as pool:
                    train, test = pool.map(partial(_read, place), ("train", "t10k"))
                return _dataset(train, test, str(place))
        if (folder / "fashion_mnist").is_dir():
            prepared = tfds.open_splits("fashion_mnist", str(folder)).splits
            return _dataset(
                tfds.in_memory(prepared["train"]), tfds.in_memory(prepared["test"]), str(folder)
            )
    raise UserError(
        f"Fashion-MNIST is not in {' or '.join(map(str, folders))}: install it with "
        "`apt-get install dataset-fashion-mnist`, or put its four files (train-images-idx3-ubyte.gz"
        " and so on, from https://github.com/zalandoresearch/fashion-mnist) into a folder and set "
        "data.data_dir or $LAMINA_DATA_DIR to it"
    )


def _dataset(train: Source, test: Source, where: str) -> Dataset:
    kept = len(train) - _HELD_OUT
    return Dataset(
        spec=DataSpec((_SIDE, _SIDE, 1), "uint8", len(LABELS)),
        splits={
            "train": subset(train, np.arange(kept)),
            "validation": subset(train, np.arange(kept, len(train))),
            "test": test,
        },
        label_names=LABELS,
        description=(
            f"Fashion-MNIST (Xiao et al. 2017), 28x28 grey images in 10 classes, from {where}. "
            "Validation is the last 10% of the training file."
        ),
    )


def _read(folder: Path, part: str) -> ArraySource:
    n = _SIZES[part]
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", (n, _SIDE, _SIDE))
    labels_file = folder / f"{part}-labels-idx1-ubyte.gz"
    labels = read_idx(labels_file, (n,))
    if labels.max() >= len(LABELS):
        raise UserError(f"{labels_file} is damaged: it holds the label {labels.max()}, above 9")
    return ArraySource({"inputs": images[..., None], "labels": labels.astype(np.int32)})


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the unsigned bytes of a gzipped IDX file.

    Args:
        path: the file.
        shape: what it should hold.

    Raises:
        UserError: the file is missing, truncated, too long, or of another type or shape.
    """
    begin, size = 4 + 4 * len(shape), int(np.prod(shape))
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)  # gzip's format, with its checksum
    try:
        whole = unpacker.decompress(path.read_bytes(), begin + size + 1)
        magic, *dims = struct.unpack_from(f">I{len(shape)}I", whole)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; the other files are there") from error
    except (OSError, zlib.error, struct.error) as error:
        raise UserError(f"{path} is damaged ({error}): fetch it again") from error
    if magic != 0x0800 + len(shape):
        raise UserError(
            f"{path} is not the expected IDX file: its magic number is {magic:#06x}, not "
            f"{0x0800 + len(shape):#06x} (unsigned bytes, {len(shape)} dimensions)"
        )
    if tuple(dims) != shape:
        raise UserError(f"{path} holds shape {tuple(dims)}, not {shape}")
    if len(whole) != begin + size:
        longer = "more" if len(whole) > begin + size else f"{len(whole) - begin}"
        raise UserError(f"{path} is damaged: it holds {longer} bytes of data, not {size}")
    if not unpacker.eof:
        raise UserError(f"{path} is damaged (it ends before its checksum): fetch it again")
    return np.frombuffer(whole, np.uint8, offset=begin).reshape(shape)
