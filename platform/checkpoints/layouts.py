"""Name maps: the parameters of our models under the names and in the shapes of other libraries.

Hugging Face stores a linear map as [outputs, inputs] with all heads in one dimension, and each
layer under its number; we store [inputs, ..., outputs, ...] with a dimension for the heads, and
the layers stacked where the model scans over them. Tensors are converted when they are read, layer
by layer, so that a shard of a stacked parameter needs no more than itself and one layer.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lamina.platform.checkpoints.safetensors import Layout
from lamina.platform.errors import UserError

_BLOCKS = "layers/blocks/"


class Rule(NamedTuple):
    """One parameter in both layouts.

    Attributes:
        ours: path; those of blocks follow `layers/blocks/`.
        theirs: name; `{}` is the layer's number.
        kind: "plain" differs in dimensions of length 1 at most, "linear" is transposed, "patches"
            is a convolution's kernel [D, C, p, p] for our [p p C, D].
        inputs: how many of our dimensions are inputs of a linear map.
    """

    ours: str
    theirs: str
    kind: str = "plain"
    inputs: int = 1


def _both(ours: str, theirs: str, inputs: int = 1) -> tuple[Rule, Rule]:
    return (
        Rule(f"{ours}/kernel", f"{theirs}.weight", "linear", inputs),
        Rule(f"{ours}/bias", f"{theirs}.bias"),
    )


def _norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
    return Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")


_LLAMA = "model.layers.{}."
_VIT = "vit.encoder.layer.{}."

LAYOUTS: dict[str, tuple[Rule, ...]] = {
    "hf-llama": (
        Rule("embedding", "model.embed_tokens.weight"),
        Rule("unembedding", "lm_head.weight"),
        Rule("norm/scale", "model.norm.weight"),
        Rule(_BLOCKS + "attention_norm/scale", _LLAMA + "input_layernorm.weight"),
        Rule(_BLOCKS + "query/kernel", _LLAMA + "self_attn.q_proj.weight", "linear"),
        Rule(_BLOCKS + "key/kernel", _LLAMA + "self_attn.k_proj.weight", "linear"),
        Rule(_BLOCKS + "value/kernel", _LLAMA + "self_attn.v_proj.weight", "linear"),
        Rule(_BLOCKS + "output/kernel", _LLAMA + "self_attn.o_proj.weight", "linear", 2),
        Rule(_BLOCKS + "mlp_norm/scale", _LLAMA + "post_attention_layernorm.weight"),
        Rule(_BLOCKS + "gate/kernel", _LLAMA + "mlp.gate_proj.weight", "linear"),
        Rule(_BLOCKS + "up/kernel", _LLAMA + "mlp.up_proj.weight", "linear"),
        Rule(_BLOCKS + "down/kernel", _LLAMA + "mlp.down_proj.weight", "linear"),
    ),
    "hf-vit": (
        Rule("token", "vit.embeddings.cls_token"),
        Rule("position", "vit.embeddings.position_embeddings"),
        Rule("embed/kernel", "vit.embeddings.patch_embeddings.projection.weight", "patches"),
        Rule("embed/bias", "vit.embeddings.patch_embeddings.projection.bias"),
        *_norm(_BLOCKS + "attention_norm", _VIT + "layernorm_before"),
        *_both(_BLOCKS + "query", _VIT + "attention.attention.query"),
        *_both(_BLOCKS + "key", _VIT + "attention.attention.key"),
        *_both(_BLOCKS + "value", _VIT + "attention.attention.value"),
        *_both(_BLOCKS + "output", _VIT + "attention.output.dense", 2),
        *_norm(_BLOCKS + "mlp_norm", _VIT + "layernorm_after"),
        *_both(_BLOCKS + "up", _VIT + "intermediate.dense"),
        *_both(_BLOCKS + "down", _VIT + "output.dense"),
        *_norm("norm", "vit.layernorm"),
        *_both("head", "classifier"),
    ),
}
"""Layout to its rules; those of `transformer` and of `vit`."""

MODELS = {"hf-llama": "transformer", "hf-vit": "vit"}
"""Layout to the model that it is of."""

_SIGNS = {"hf-llama": "model.embed_tokens.weight", "hf-vit": "vit.embeddings.cls_token"}


def detect(names: Any) -> str:
    """The layout of tensors with these names; "" if it is none of ours."""
    return next((layout for layout, sign in _SIGNS.items() if sign in names), "")


class Converted:
    """One of our parameters, read from another layout's tensors when it is needed.

    Attributes:
        shape: in our layout.
        dtype: of the tensors.
    """

    def __init__(
        self,
        sources: list[Any],
        stacked: bool,
        shape: tuple[int, ...],
        convert: Callable[[np.ndarray, tuple[int, ...]], np.ndarray],
    ):
        self._sources, self._stacked, self._convert = sources, stacked, convert
        self._one = shape
        self.shape = (len(sources), *shape) if stacked else shape
        self.dtype = sources[0].dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))

    def _layer(self, number: int) -> np.ndarray:
        return self._convert(np.asarray(self._sources[number]), self._one)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # what is read is always new
        whole = self[()]
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns the part at a tuple of slices, one for each of the first dimensions or more."""
        if not self._stacked:
            return self._layer(0)[index]
        layers = range(len(self._sources))[index[0]] if index else range(len(self._sources))
        return np.stack([self._layer(number)[tuple(index[1:])] for number in layers])


def to_ours(
    layout: str, tensors: Mapping[str, Any], targets: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The tensors of another layout under our names, as arrays that are read when used.

    Args:
        layout: one of `LAYOUTS`.
        tensors: by their names.
        targets: our paths to shapes. They say whether layers are stacked, and how heads are
            divided; a tensor that doesn't fit keeps a shape of its own, for the message.

    Returns:
        Ours and, under their own names, those that no rule knows.

    Raises:
        UserError: the layers aren't numbered from 0 on.
    """
    rest = dict(tensors)
    result: dict[str, Any] = {}
    stacked = not any(re.match(rf"{_BLOCKS}\d+/", path) for path in targets)
    for rule in LAYOUTS[layout]:
        if "{}" not in rule.theirs:
            if rule.theirs in rest:
                source = rest.pop(rule.theirs)
                shape = _shape(rule, source.shape, targets.get(rule.ours))
                result[rule.ours] = Converted([source], False, shape, _TO_OURS[rule.kind])
            continue
        pattern = re.compile(re.escape(rule.theirs).replace(r"\{\}", r"(0|[1-9]\d{0,5})"))
        found = {int(m[1]): name for name in rest if (m := pattern.fullmatch(name))}
        if sorted(found) != list(range(len(found))):
            numbers = ", ".join(map(str, sorted(found)[:9]))
            raise UserError(f"the layers of {rule.theirs} are not numbered from 0 on: {numbers}")
        if not found:
            continue
        sources = [rest.pop(found[number]) for number in range(len(found))]
        if len({source.shape for source in sources}) > 1:
            raise UserError(f"the layers of {rule.theirs} differ in shape")
        leaf = rule.ours.removeprefix(_BLOCKS)
        if stacked:
            target = targets.get(rule.ours)
            shape = _shape(rule, sources[0].shape, target[1:] if target else None)
            result[rule.ours] = Converted(sources, True, shape, _TO_OURS[rule.kind])
            continue
        for number, source in enumerate(sources):
            path = f"{_BLOCKS}{number}/{leaf}"
            shape = _shape(rule, source.shape, targets.get(path))
            result[path] = Converted([source], False, shape, _TO_OURS[rule.kind])
    return result | rest


def from_ours(layout: str, params: Mapping[str, Any]) -> dict[str, tuple[Layout, Callable]]:
    """Our parameters in another layout: name to shape and dtype, and a function that gives it.

    Args:
        layout: one of `LAYOUTS`.
        params: our paths to arrays.

    Raises:
        UserError: a parameter has no place in that layout.
    """
    rest = dict(params)
    result: dict[str, tuple[Layout, Callable]] = {}

    def add(name: str, rule: Rule, array: Any, shape: tuple[int, ...], number: int | None) -> None:
        def give() -> np.ndarray:
            part = np.asarray(array if number is None else array[number])
            return _to_theirs(rule, part)

        theirs = _their_shape(rule, shape)
        result[name] = (Layout(theirs, np.dtype(array.dtype)), give)

    for rule in LAYOUTS[layout]:
        if "{}" not in rule.theirs:
            if rule.ours in rest:
                array = rest.pop(rule.ours)
                add(rule.theirs, rule, array, tuple(array.shape), None)
            continue
        if rule.ours in rest:
            array = rest.pop(rule.ours)
            for number in range(array.shape[0]):
                add(rule.theirs.format(number), rule, array, tuple(array.shape[1:]), number)
            continue
        leaf = rule.ours.removeprefix(_BLOCKS)
        for path in [p for p in rest if re.fullmatch(rf"{_BLOCKS}\d+/{re.escape(leaf)}", p)]:
            array = rest.pop(path)
            number = path.removeprefix(_BLOCKS).partition("/")[0]
            add(rule.theirs.format(number), rule, array, tuple(array.shape), None)
    if rest:
        raise UserError(f"{', '.join(sorted(rest)[:5])} have no place in the layout {layout}")
    return result


def _shape(rule: Rule, theirs: tuple[int, ...], target: tuple[int, ...] | None) -> tuple[int, ...]:
    """Our shape of one of their tensors: the target's, if it has the right sizes."""
    if rule.kind == "linear" and len(theirs) == 2:
        ours = theirs[::-1]
        if target and (_product(target[: rule.inputs]), _product(target[rule.inputs :])) == ours:
            return target
        return ours
    if rule.kind == "patches" and len(theirs) == 4:
        return (theirs[1] * theirs[2] * theirs[3], theirs[0])
    long = lambda shape: [extent for extent in shape if extent != 1]
    same_vector = target and len(long(theirs)) == 1 and _product(target) == _product(theirs)
    return target if target and (long(target) == long(theirs) or same_vector) else theirs


def _their_shape(rule: Rule, ours: tuple[int, ...]) -> tuple[int, ...]:
    if rule.kind == "linear":
        return (_product(ours[rule.inputs :]), _product(ours[: rule.inputs]))
    if rule.kind == "patches":
        channels, patch = _patch(ours[0])
        return (ours[1], channels, patch, patch)
    if rule.theirs.endswith("cls_token"):
        return (1, 1, *ours)
    if rule.theirs.endswith("position_embeddings"):
        return (1, *ours)
    return (_product(ours),) if rule.theirs.endswith(".bias") else ours


def _to_theirs(rule: Rule, array: np.ndarray) -> np.ndarray:
    shape = _their_shape(rule, array.shape)
    if rule.kind == "linear":
        return np.ascontiguousarray(array.reshape(shape[::-1]).T)
    if rule.kind == "patches":
        out, channels, patch, _ = shape
        kernel = array.reshape(patch, patch, channels, out)
        return np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
    return array.reshape(shape)


def _patch(pixels: int) -> tuple[int, int]:
    """(channels, rows of a patch) from the pixels of a patch: three channels, or one."""
    for channels in (3, 1, 4):
        patch = round((pixels / channels) ** 0.5)
        if channels * patch**2 == pixels:
            return channels, patch
    raise UserError(f"patches of {pixels} numbers are no square images of 1, 3 or 4 channels")


_TO_OURS: dict[str, Callable[[np.ndarray, tuple[int, ...]], np.ndarray]] = {
    "plain": lambda array, shape: array.reshape(shape),
    "linear": lambda array, shape: array.T.reshape(shape),
    "patches": lambda array, shape: array.transpose(2, 3, 1, 0).reshape(shape),
}


def _product(extents: tuple[int, ...]) -> int:
    return int(np.prod(extents, dtype=np.int64))
