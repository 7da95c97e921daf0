"""Floating-point operations of matrix products, convolutions and attention kernels in HLO.

On TPU every product is a ``convolution``: batch dimensions have become windows with padding and
dilation, of which only the pairs of an output place and a kernel place that meet are computed.
"""

import json
import math
import re
from typing import NamedTuple

from lamina.sharding.pods.hlo import Computation, Instruction, Module

KERNELS = {"fwd": 2, "dq": 3, "dkv": 4}
"""Matrix products of a [T, S, K] kind in the kernels of splash attention, by a part of their names:
forward, gradient of the queries, gradients of keys and values (Dao et al. 2022, 2205.14135)."""


class Products(NamedTuple):
    """What an instruction multiplies.

    Attributes:
        flops: of dots and convolutions that the compiler has written out.
        kernel: of Pallas kernels, whose inside the compiler doesn't show.
    """

    flops: float = 0.0
    kernel: float = 0.0


def products(module: Module, computation: Computation, instruction: Instruction) -> Products:
    """Returns the FLOPs of one run of an instruction; of a fusion, of all that is fused."""
    if instruction.opcode == "convolution":
        return Products(_convolution(computation, instruction))
    if instruction.opcode == "dot":
        return Products(_dot(computation, instruction))
    if instruction.opcode == "custom-call":
        return Products(0.0, _kernel(computation, instruction))
    if instruction.opcode == "fusion":
        parts = [
            products(module, inner, each)
            for name in instruction.called("calls")
            for inner in (module.computations[name],)
            for each in inner.instructions.values()
        ]
        return Products(sum(p.flops for p in parts), sum(p.kernel for p in parts))
    return Products()


def _dot(computation: Computation, instruction: Instruction) -> float:
    left = computation.instructions[instruction.operands[0]].shapes[0].dims
    contracted = _integers(instruction.attribute("lhs_contracting_dims"))
    return 2.0 * instruction.shapes[0].elements * math.prod(left[i] for i in contracted)


def _convolution(computation: Computation, instruction: Instruction) -> float:
    image, kernel = (computation.instructions[name].shapes[0].dims for name in instruction.operands)
    result = instruction.shapes[0].dims
    labels = re.match(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels"))
    if labels is None:
        return 0.0
    image_labels, kernel_labels, result_labels = labels.groups()
    window = _window(instruction.attribute("window"))
    flops = 2.0 * result[result_labels.index("b")] * result[result_labels.index("f")]
    flops *= kernel[kernel_labels.index("i")]
    for i in range(len(image_labels) - 2):
        flops *= _pairs(
            image[image_labels.index(str(i))],
            kernel[kernel_labels.index(str(i))],
            result[result_labels.index(str(i))],
            {name: values[i] for name, values in window.items()},
        )
    return flops


def _window(text: str) -> dict[str, list[tuple[int, int]]]:
    """Parses ``{size=3x3 pad=1_1x1_1 lhs_dilate=2x2}``; a single number is taken twice."""
    window = {}
    for name, values in re.findall(r"(\w+)=([\d_x\-]+)", text):
        window[name] = []
        for value in values.split("x"):
            numbers = [int(number) for number in value.split("_")]
            window[name].append((numbers[0], numbers[-1]))
    return window


def _pairs(image: int, kernel: int, result: int, window: dict[str, tuple[int, int]]) -> int:
    """Returns how many (output place, kernel place) pairs read a true element of the image."""
    stride = window.get("stride", (1, 1))[0]
    before = window.get("pad", (0, 0))[0]
    image_dilation = window.get("lhs_dilate", (1, 1))[0]
    kernel_dilation = window.get("rhs_dilate", (1, 1))[0]
    if (
        before == 0
        and image_dilation == 1
        and (result - 1) * stride + (kernel - 1) * kernel_dilation < image
    ):
        return kernel * result  # nothing hangs over the edges
    count = 0
    for place in range(kernel):
        offset = place * kernel_dilation - before
        if image_dilation == 1:
            # 0 <= offset + o * stride < image
            first = max(0, -(offset // stride))
            last = min(result - 1, (image - 1 - offset) // stride)
            count += max(0, last - first + 1)
            continue
        for o in range(result):
            at = offset + o * stride
            count += at % image_dilation == 0 and 0 <= at // image_dilation < image
    return count


def _kernel(computation: Computation, instruction: Instruction) -> float:
    """Returns the FLOPs of a Pallas kernel, as it states them, or by the name of the kernel."""
    if '"tpu_custom_call"' not in instruction.text:
        return 0.0
    stated = re.search(r'"flops":"?(\d+)', instruction.text)
    if stated and int(stated.group(1)):
        return float(stated.group(1))
    count = next((n for part, n in KERNELS.items() if part in kernel_name(instruction)), 0)
    arrays = [
        shape.dims
        for operand in instruction.operands
        for shape in computation.instructions[operand].shapes
        if len(shape.dims) >= 3 and shape.dtype in ("bf16", "f32")
    ]
    if not count or len(arrays) < 2:
        return 0.0
    query, key = arrays[0], arrays[1]
    # Causal: half of the square of query and key places.
    return 2.0 * count * math.prod(query[:-1]) * key[-2] * query[-1] / 2


def kernel_name(instruction: Instruction) -> str:
    """Returns what identifies a Pallas kernel: its name and where it was called."""
    found = re.search(r'kernel_name = "([^"]*)"', instruction.text)
    names = re.search(r'"kernel_name":("(?:[^"\\]|\\.)*")', instruction.text)
    parts = [instruction.name, instruction.scope]
    parts += [found.group(1)] if found else []
    parts += [json.loads(names.group(1))] if names else []
    return " ".join(parts)


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
