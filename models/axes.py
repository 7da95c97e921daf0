"""The logical axes: one name for each dimension of each parameter, and how to attach them.

They are the one source for sharding rules, matrix views, permutation specs, pruning groups and
name maps. A name says what a dimension *is*, never where it lives:

================  =============================================================================
name              the dimension
================  =============================================================================
``embed``         the residual stream (width of a transformer, or of an MLP's layers' inputs)
``mlp``           hidden units of a feed-forward block or of an MLP's layer
``heads``         query heads of an attention block
``kv_heads``      key and value heads
``head_dim``      the units of one head
``vocab``         tokens or hash buckets of an embedding, or the outputs of a language head
``layers``        the layers of a stack that is run by a scan; always the first dimension
``conv_in``       input channels of a convolution
``conv_out``      output channels of a convolution
``kernel_h``      rows of a convolution's kernel
``kernel_w``      columns of a convolution's kernel
``patch``         the pixels of one patch (height * width * channels)
``position``      places in a sequence of patches
``norm``          the scale or bias of a normalisation
``classes``       outputs of a classifier or regressor
================  =============================================================================

The names are stored in a variable's metadata under ``logical_axes``. Flax's own key for
partitioning would shard at construction and refuse to build a module without a mesh.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

METADATA_KEY = "logical_axes"

EMBED = "embed"
MLP = "mlp"
HEADS = "heads"
KV_HEADS = "kv_heads"
HEAD_DIM = "head_dim"
VOCAB = "vocab"
LAYERS = "layers"
CONV_IN = "conv_in"
CONV_OUT = "conv_out"
KERNEL_H = "kernel_h"
KERNEL_W = "kernel_w"
PATCH = "patch"
POSITION = "position"
NORM = "norm"
CLASSES = "classes"

VOCABULARY = frozenset(
    {
        EMBED,
        MLP,
        HEADS,
        KV_HEADS,
        HEAD_DIM,
        VOCAB,
        LAYERS,
        CONV_IN,
        CONV_OUT,
        KERNEL_H,
        KERNEL_W,
        PATCH,
        POSITION,
        NORM,
        CLASSES,
    }
)


Initializer = Callable[..., jax.Array]


def annotate(initializer: Initializer, *names: str | None) -> Initializer:
    """Returns ``initializer`` whose variables carry the logical axes ``names``.

    Args:
        initializer: ``(key, shape, dtype) -> array``, as in ``jax.nn.initializers``.
        *names: one name of the vocabulary, or None, for each dimension.

    Raises:
        ValueError: a name is not of the vocabulary.

    Example:
        >>> init = annotate(nnx.initializers.lecun_normal(), EMBED, MLP)
        >>> nnx.Linear(2, 3, kernel_init=init, rngs=nnx.Rngs(0)).kernel.logical_axes
        ('embed', 'mlp')
    """
    unknown = [name for name in names if name is not None and name not in VOCABULARY]
    if unknown:
        raise ValueError(f"unknown logical axes {unknown}; the vocabulary is {sorted(VOCABULARY)}")
    metadata: dict[str, Any] = {METADATA_KEY: names}
    return nnx.with_metadata(initializer, **metadata)


def of_variable(variable: nnx.Variable, ndim: int) -> tuple[str | None, ...]:
    """Returns the logical axes of a variable of ``ndim`` dimensions.

    A module that knows nothing of them gets ``(None,) * ndim``; names that Flax's
    ``with_partitioning`` stored are taken over if there is one for each dimension.
    """
    metadata = variable.get_metadata()
    for key in (METADATA_KEY, "out_sharding", "sharding_names"):
        names = metadata.get(key)
        if isinstance(names, tuple) and len(names) == ndim:
            return names
    return (None,) * ndim


def add_layers_axis(module: nnx.Module) -> None:
    """Marks every parameter of a module that was built under ``vmap`` as stacked by layer."""
    for _, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        names = variable.get_metadata().get(METADATA_KEY)
        if names is not None:
            variable.set_metadata(METADATA_KEY, (LAYERS, *names))


def matrix_split(axes: tuple[str | None, ...]) -> tuple[int, int]:
    """Returns (first, middle): where the matrix view of a parameter begins and is cut.

    The dimensions ``[:first]`` are stacked layers, ``[first:middle]`` are the rows (inputs) and
    ``[middle:]`` the columns (outputs). Attention's query, key and value kernels
    ``(embed, heads, head_dim)`` are cut after ``embed``, its output kernel
    ``(heads, head_dim, embed)`` before ``embed``, a convolution's kernel before ``conv_out``.
    Without names all dimensions but the last are rows.

    Raises:
        ValueError: fewer than two dimensions are left besides ``layers``.

    Example:
        >>> matrix_split(("layers", "embed", "heads", "head_dim"))
        (1, 2)
        >>> matrix_split(("kernel_h", "kernel_w", "conv_in", "conv_out"))
        (0, 3)
    """
    first = int(bool(axes) and axes[0] == LAYERS)
    if len(axes) - first < 2:
        raise ValueError(f"a parameter with axes {axes} is no matrix: it needs two dimensions")
    if axes[first] == EMBED:
        return first, first + 1
    return first, len(axes) - 1
