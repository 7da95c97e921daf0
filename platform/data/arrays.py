"""The user's own arrays, from an .npz file, a folder of .npy files, or straight from Python."""

import contextlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lamina.models.spec import DataSpec
from lamina.platform.data.dataset import ArraySource, Dataset, Source, with_held_out
from lamina.platform.errors import UserError

SPLITS = ("train", "validation", "test")
FIELDS = ("inputs", "labels", "weights", "segments", "positions")
_CHECKED_AT_ONCE = 2**26


def arrays(
    *,
    path: str,
    classes: int = 0,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
) -> Dataset:
    """Returns the data set in an .npz file or a folder of .npy files.

    Arrays are called `train_inputs`, `train_labels`, `validation_inputs` and so on; bare `inputs`
    and `labels` are the training split. A folder's files are memory-mapped, so they may be larger
    than memory. See `from_arrays` for what arrays may hold.

    Args:
        path: the file or the folder. Nothing is unpickled.
        classes: number of classes or of tokens; 0 takes the largest label of all splits, plus 1.
        validation_fraction: share of "train" for a missing "validation".
        test_fraction: share of "train" for a missing "test".

    Raises:
        UserError: the path or an array is not usable; the message says which and why.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        found = {file.stem: _map_npy(file) for file in sorted(place.glob("*.npy"))}
    elif place.is_file():
        found = _load_npz(place)
    else:
        raise UserError(f"data.path = {path!r} is neither a file nor a folder")
    splits: dict[str, dict[str, np.ndarray]] = {}
    for name, array in found.items():
        split, _, field = name.rpartition("_")
        if (split or "train") not in SPLITS or field not in FIELDS:
            raise UserError(
                f"{place} holds {name!r}: arrays are called <split>_<field>, with the split one of "
                f"{', '.join(SPLITS)} and the field one of {', '.join(FIELDS)}"
            )
        splits.setdefault(split or "train", {})[field] = array
    return from_arrays(
        splits,
        classes=classes,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        where=str(place),
    )


def from_arrays(
    splits: Mapping[str, Mapping[str, np.ndarray]],
    *,
    classes: int = 0,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    where: str = "the arrays",
) -> Dataset:
    """Returns a data set of arrays in memory.

    "inputs" are uint8 (images, scaled to [0, 1] on the device; [N, H, W] gets a channel), floats
    (become float32) or integers (tokens, int32). "labels" are integers [N] (classes), integers of
    the inputs' shape (next tokens), or floats [N] or [N, O] (targets of a regression).

    Args:
        splits: "train", and optionally "validation" and "test": field -> array with leading N.
        classes: number of classes or of tokens; 0 takes the largest label of all splits, plus 1.
        validation_fraction: share of "train" for a missing "validation".
        test_fraction: share of "train" for a missing "test".
        where: what messages call the data.

    Raises:
        UserError: an array is missing, or has a wrong length, type, shape or value.
    """
    if "train" not in splits:
        raise UserError(f"{where} should have a split 'train' (inputs and labels)")
    checked = {name: _checked(fields, f"{where}, {name}") for name, fields in splits.items()}
    train = checked["train"]
    for name, fields in checked.items():
        for field, array in fields.items():
            expected = train.get(field)
            if expected is None or array.shape[1:] != expected.shape[1:]:
                raise UserError(
                    f"{where}, {name}: {field} has examples of shape {array.shape[1:]}, but in "
                    f"train {'there is none' if expected is None else expected.shape[1:]}"
                )
            if array.dtype != expected.dtype:
                raise UserError(
                    f"{where}, {name}: {field} is {array.dtype}, but in train {expected.dtype}"
                )
    outputs = _outputs(checked, classes, where)
    sources: dict[str, Source] = {name: ArraySource(fields) for name, fields in checked.items()}
    held_out = with_held_out(sources, validation_fraction, test_fraction)
    inputs = train["inputs"]
    drawn = sorted(set(SPLITS) - set(splits))
    return Dataset(
        spec=DataSpec(tuple(inputs.shape[1:]), str(inputs.dtype), outputs),
        splits=held_out,
        description=f"Arrays of the user's own ({where})"
        + (f"; {' and '.join(drawn)} drawn from train." if drawn else "."),
    )


def _checked(fields: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    for needed in ("inputs", "labels"):
        if needed not in fields:
            raise UserError(f"{where}: {needed!r} is missing; there are {sorted(fields)}")
    lengths = {field: np.shape(array)[:1] for field, array in fields.items()}
    if len(set(lengths.values())) != 1 or () in lengths.values():
        shown = {field: length[0] if length else "a scalar" for field, length in lengths.items()}
        raise UserError(f"{where}: the arrays differ in length: {shown}")
    if 0 in next(iter(lengths.values())):
        raise UserError(f"{where}: there are no examples")
    result = {field: _typed(array, f"{where}: {field}") for field, array in fields.items()}
    if result["inputs"].dtype == np.uint8 and result["inputs"].ndim == 3:
        result["inputs"] = result["inputs"][..., None]
    for field in set(result) - {"inputs"}:
        if result[field].dtype == np.uint8:
            result[field] = result[field].astype(np.int32)
    if result["labels"].dtype == np.float32 and result["labels"].ndim == 1:
        result["labels"] = result["labels"][:, None]
    if "weights" in result:
        result["weights"] = result["weights"].astype(np.float32)
        if (result["weights"] < 0).any():
            raise UserError(f"{where}: weights are negative")
    return result


def _typed(array: np.ndarray, where: str) -> np.ndarray:
    array = array if isinstance(array, np.ndarray) else np.asarray(array)
    kind = array.dtype.kind
    if kind == "f":
        _check_finite(array, where)
        return array if array.dtype == np.float32 else array.astype(np.float32)
    if kind == "b":
        return array.astype(np.float32)
    if array.dtype == np.uint8 or array.dtype == np.int32:
        return array
    if kind in "iu":
        limits = np.iinfo(np.int32)
        if array.max() > limits.max or array.min() < limits.min:
            raise UserError(f"{where} holds integers that 32 bits can't")
        return array.astype(np.int32)
    raise UserError(f"{where} has the type {array.dtype}: it should hold floats or integers")


def _check_finite(array: np.ndarray, where: str) -> None:
    rows = max(1, _CHECKED_AT_ONCE // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        finite = np.isfinite(array[start : start + rows])
        if not finite.all():
            first = start + int(np.argwhere(~finite)[0][0])
            raise UserError(f"{where} holds NaN or infinity, first in example {first}")


def _outputs(splits: Mapping[str, Mapping[str, np.ndarray]], classes: int, where: str) -> int:
    labels = splits["train"]["labels"]
    if labels.dtype == np.float32:
        if labels.ndim != 2:
            raise UserError(f"{where}: float labels should be [N] or [N, O], not {labels.shape}")
        return labels.shape[1]
    inputs = splits["train"]["inputs"]
    tokens = inputs.dtype == np.int32 and labels.shape == inputs.shape
    if labels.ndim != 1 and not tokens:
        raise UserError(
            f"{where}: integer labels should be [N], or of the shape of integer inputs, not "
            f"{labels.shape}"
        )
    largest = max(int(fields["labels"].max()) for fields in splits.values())
    if tokens:
        largest = max(largest, *(int(fields["inputs"].max()) for fields in splits.values()))
    outputs = classes or largest + 1
    for name, fields in splits.items():
        for field in ("labels", "inputs") if tokens else ("labels",):
            low, high = int(fields[field].min()), int(fields[field].max())
            if low < 0 or high >= outputs:
                raise UserError(
                    f"{where}, {name}: {field} go from {low} to {high}, outside of 0 to "
                    f"{outputs - 1}"
                )
    return outputs


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file, _named(path):
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise UserError(
                f"{path} is a single array: give an .npz file or a folder of .npy files"
            )
        return {name: loaded[name] for name in loaded.files}


def _map_npy(path: Path) -> np.ndarray:
    with _named(path):
        return np.load(path, mmap_mode="r", allow_pickle=False)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns what numpy raises for a file into an error that names the file."""
    try:
        yield
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if "pickle" in str(error).lower() or "python objects" in str(error).lower():
            raise UserError(
                f"{path} holds pickled Python objects, which are not loaded because they can run "
                "code: save plain arrays of numbers"
            ) from error
        raise UserError(
            f"{path} can't be read as numpy arrays ({error}): it may be damaged"
        ) from error
