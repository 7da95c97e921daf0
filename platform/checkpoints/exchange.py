"""Parameter trees to and from safetensors files."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lamina.platform.checkpoints import safetensors
from lamina.platform.checkpoints.names import flatten, nearest, nest, unflatten
from lamina.platform.checkpoints.safetensors import Layout, Tensor
from lamina.platform.errors import UserError

_MAX_LISTED = 10


def export_params(
    path: epath.PathLike, params: Any, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a parameter tree to one safetensors file, whole or not at all.

    Args:
        path: the file, local or `gs://`; one that is there is replaced.
        params: a tree of arrays; names are '/'-joined. With several processes each array must be
            readable from this one (gather first), and one process calls this.
        metadata: text to text, kept in the header, for example the task and the model's config.

    Raises:
        UserError: a leaf can't be stored, or the file can't be written (then nothing is changed).
    """
    leaves = flatten(params)
    for name, leaf in leaves.items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise UserError(f"{name} holds random keys; safetensors files hold numbers only")
    layouts = {n: Layout(tuple(a.shape), np.dtype(a.dtype)) for n, a in leaves.items()}
    safetensors.write(path, layouts, lambda name: np.asarray(leaves[name]), metadata)


class Tensors(NamedTuple):
    """What a safetensors file holds."""

    arrays: dict[str, Tensor]  # by name; read from the disk when used
    metadata: dict[str, str]

    def tree(self) -> dict[str, Any]:
        """The arrays as nested dicts, by the parts of their '/'-joined names.

        Raises:
            UserError: one name leads into another ("a" and "a/b").
        """
        try:
            return nest(flatten(self.arrays))
        except ValueError as error:
            raise UserError(f"these names make no tree: {error}") from error


def import_tensors(path: epath.PathLike, *, finite: bool = False) -> Tensors:
    """Opens a safetensors file, having checked all that its header says.

    Args:
        path: the file, local or `gs://`.
        finite: also refuse NaN and infinities in floating tensors (reads all the data).

    Raises:
        UserError: as `safetensors.File`; the message names the tensor.
    """
    file = safetensors.File(path)
    for name, tensor in file.tensors.items() if finite else ():
        if jnp.issubdtype(tensor.dtype, jnp.floating):
            bad = tensor.size - int(np.isfinite(np.asarray(tensor, np.float64)).sum())
            if bad:
                raise UserError(f"{file.path}: {name!r} holds {bad} values that are not finite")
    return Tensors(dict(file.tensors), file.metadata)


def import_params(path: epath.PathLike, like: Any, *, finite: bool = False) -> dict[str, Any]:
    """Reads a safetensors file that must hold exactly the arrays of a tree.

    For a file of another model use `import_tensors` and `transfer.transfer`.

    Args:
        path: the file.
        like: the tree (arrays or ShapeDtypeStructs) whose names, shapes and dtypes are expected.
        finite: as for `import_tensors`.

    Returns:
        A tree with the structure of `like` and numpy arrays as leaves.

    Raises:
        UserError: as `import_tensors`; or arrays are missing, superfluous, or of another shape or
            dtype: all are listed.
    """
    arrays = import_tensors(path, finite=finite).arrays
    wanted = flatten(like)
    problems = []
    for name, leaf in wanted.items():
        if name not in arrays:
            problems.append(f"{name} is missing{nearest(name, arrays)}")
        elif arrays[name].shape != tuple(leaf.shape) or arrays[name].dtype != leaf.dtype:
            found = arrays[name]
            problems.append(
                f"{name} is {found.dtype}{list(found.shape)}, here {leaf.dtype}{list(leaf.shape)}"
            )
    problems += [f"{name} is not in this model" for name in arrays if name not in wanted]
    if problems:
        more = len(problems) - _MAX_LISTED
        listed = "\n".join(f"  {line}" for line in problems[:_MAX_LISTED])
        raise UserError(
            f"{path} does not fit this model:\n{listed}"
            + (f"\n  and {more} more" if more > 0 else "")
        )
    return unflatten({name: np.asarray(arrays[name]) for name in wanted}, like)
