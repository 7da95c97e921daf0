"""Multi-layer perceptrons for vectors, and for images taken as vectors."""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from lamina.models import axes
from lamina.models.layers import Dense, head
from lamina.models.norms import LayerNorm
from lamina.models.spec import DataSpec, Output, require_sizes

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu, "tanh": jnp.tanh}


class MLP(nnx.Module):
    """Dense layers, each with an optional norm, an activation and dropout; see ``mlp``."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        spec: DataSpec,
        dtype: jnp.dtype,
        widths: tuple[int, ...],
        activation: str,
        norm: bool,
        dropout: float,
        init: str,
    ):
        sizes = (math.prod(spec.input_shape), *widths)
        self.layers = nnx.List(
            Dense(rngs, (a,), (b,), (axes.EMBED, axes.MLP), dtype, init=init)
            for a, b in itertools.pairwise(sizes)
        )
        self.norms = nnx.List(LayerNorm(rngs, b, dtype) for b in widths if norm)
        self.dropout = nnx.Dropout(dropout)
        last = init if init == "uniform" else "fan_in"
        self.head = head(rngs, sizes[-1], spec.outputs, dtype, init=last)
        self.activation = activation

    def __call__(self, inputs: jax.Array, *, rngs: nnx.Rngs | None = None) -> Output:
        """Maps ``[B, ...]`` to logits ``[B, outputs]``."""
        x = inputs.reshape(inputs.shape[0], -1)
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if self.norms:
                x = self.norms[number](x)
            x = self.dropout(ACTIVATIONS[self.activation](x), rngs=rngs)
        return Output(self.head(x).astype(jnp.float32), x)


def mlp(
    rngs: nnx.Rngs,
    spec: DataSpec,
    dtype: jnp.dtype,
    *,
    widths: tuple[int, ...] = (256, 256),
    activation: str = "relu",
    norm: bool = False,
    dropout: float = 0.0,
    init: str = "he",
) -> MLP:
    """Builds a multi-layer perceptron.

    Args:
        rngs: random streams.
        spec: the data; inputs of any shape are flattened.
        dtype: compute dtype.
        widths: units of the hidden layers. Default: (256, 256); (400, 400) is the usual network of
            permuted MNIST (Zenke et al. 2017 and after).
        activation: "relu", "gelu", "silu" or "tanh". Default: "relu".
        norm: layer norm before each activation. Default: False.
        dropout: rate after each activation. Default: 0.
        init: "he" starts hidden layers after He et al. 2015 and the head with variance 1 / fan-in
            (LeCun et al. 1998), biases at 0; "uniform" draws all weights and biases from
            U(-fan_in^-1/2, fan_in^-1/2), PyTorch's default. Default: "he".

    Raises:
        ValueError: an unknown activation or initialisation, or token inputs.

    Example:
        >>> spec = DataSpec((8, 8, 1), "float32", 10)
        >>> mlp(nnx.Rngs(0), spec, jnp.float32)(jnp.ones((2, 8, 8, 1))).logits.shape
        (2, 10)
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; it may be one of {[*ACTIVATIONS]}")
    if spec.input_dtype == "int32":
        raise ValueError("mlp takes vectors or images, not tokens (int32); use transformer")
    require_sizes(dropout, widths=tuple(widths))
    if init not in ("he", "uniform"):
        raise ValueError(f"unknown init {init!r}; it may be 'he' or 'uniform'")
    return MLP(rngs, spec, dtype, tuple(widths), activation, norm, dropout, init)
