"""Times training steps of PyTorch on the CPU, for comparison with Lamina's.

Runs in an environment that has torch and needs nothing else:

    <peer python> tests/benchmarks/peers.py --models mlp convnet transformer --modes eager compile

It prints one line of JSON: the versions, the threads, the machine's load average before and after
(times of a busy machine compare with nothing), and for each model and mode the median, the
quartiles and the fastest of the milliseconds per step, with the number of parameters, by which a
driver can see that both sides do the same work. A step is forward, cross-entropy, backward and
AdamW (PyTorch's fused one, its fastest on the CPU) on batches that are in memory already: reading
data is not in it.

The models are those that Lamina builds from `lamina_config` in the output, in float32:

- mlp: 64 -> 256 -> 256 -> 10 with ReLU.
- convnet: 28x28x1 images, 3x3 convolutions of 32 and 64 channels with batch norm, max pooling
  between them, global average.
- transformer: 4 pre-norm blocks of width 256 with 4 heads, rotary positions, RMS norm, SwiGLU of
  704 units, byte vocabulary with tied embedding.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

LAMINA_CONFIGS = {
    "mlp": {"name": "mlp", "widths": [256, 256]},
    "convnet": {"name": "convnet", "width": 32, "stages": 2, "norm": "batch"},
    "transformer": {"name": "transformer", "depth": 4, "embed": 256, "heads": 4},
}
BATCH_SIZES = {"mlp": 64, "convnet": 128, "transformer": 16}
CONTEXT, VOCABULARY = 256, 256
BATCHES = 8


def mlp() -> nn.Module:
    """Returns the perceptron."""
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def convnet() -> nn.Module:
    """Returns the convolutional network."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class Block(nn.Module):
    """A pre-norm decoder block."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.projections = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.gate_and_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Maps [B, T, D] to the same."""
        split = self.projections(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_and_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (k, k + K / 2) of every head."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Transformer(nn.Module):
    """Embedding, blocks, norm, and logits from the embedding's table."""

    def __init__(self, depth: int = 4, width: int = 256, heads: int = 4, hidden: int = 704):
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(VOCABULARY, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        half = width // heads // 2
        angles = torch.outer(torch.arange(CONTEXT), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Maps tokens [B, T] to logits [B, T, V]."""
        x = self.embedding(tokens) * math.sqrt(self.width)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return functional.linear(self.norm(x), self.embedding.weight)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "convnet": convnet,
    "transformer": Transformer,
}


def batches(name: str, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns random (inputs, labels)."""
    if name == "transformer":
        rows = [torch.randint(VOCABULARY, (size, CONTEXT + 1)) for _ in range(BATCHES)]
        return [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]
    shape = (size, 64) if name == "mlp" else (size, 1, 28, 28)
    return [(torch.randn(shape), torch.randint(10, (size,))) for _ in range(BATCHES)]


def measure(name: str, mode: str, size: int, repeats: int, seconds: float, layout: str) -> dict:
    """Times one model.

    Args:
        name: in `MODELS`.
        mode: "eager" or "compile".
        size: examples in a batch.
        repeats: timed groups of steps.
        seconds: least length of a group.
        layout: memory layout of images, "channels_last" or "contiguous".
    """
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = MODELS[name]()
    data = batches(name, size)
    if name == "convnet" and layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)
        data = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in data]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)

    def objective(inputs, labels):
        return functional.cross_entropy(model(inputs).flatten(0, -2), labels.flatten())

    if mode == "compile":
        objective = torch.compile(objective, dynamic=False)

    def step(i: int) -> torch.Tensor:
        inputs, labels = data[i % BATCHES]
        optimizer.zero_grad(set_to_none=True)
        loss = objective(inputs, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    started = time.perf_counter()
    step(0)
    first = time.perf_counter() - started
    for i in range(1, 4):
        step(i)
    times, timed = [], 0
    for _ in range(repeats):
        count, started, elapsed = 0, time.perf_counter(), 0.0
        while elapsed < seconds:
            loss = step(timed + count)
            count += 1
            elapsed = time.perf_counter() - started
        times.append(elapsed / count * 1e3)
        timed += count
    quarters = statistics.quantiles(times, n=4) if repeats > 1 else [times[0]] * 3
    return {
        "median_ms": statistics.median(times),
        "quartiles_ms": [quarters[0], quarters[2]],
        "fastest_ms": min(times),
        "first_step_s": first,
        "steps_timed": timed,
        "batch_size": size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": float(loss),
    }


def main() -> None:
    """Parses the flags, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    modes = ("eager", "compile")
    parser.add_argument("--modes", nargs="+", choices=modes, default=list(modes))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9, help="timed groups of steps")
    parser.add_argument("--seconds", type=float, default=0.5, help="least length of a group")
    parser.add_argument("--batch_size", type=int, default=0, help="0: 64, 128 and 16")
    layouts = ("channels_last", "contiguous")
    parser.add_argument("--layout", choices=layouts, default="channels_last", help="of images")
    flags = parser.parse_args()
    if flags.repeats < 1 or flags.threads < 1:
        parser.error("--repeats and --threads should be 1 or more")
    torch.set_num_threads(flags.threads)
    load_before = os.getloadavg()[0]
    results = {
        name: {
            mode: measure(
                name,
                mode,
                flags.batch_size or BATCH_SIZES[name],
                flags.repeats,
                flags.seconds,
                flags.layout,
            )
            for mode in flags.modes
        }
        | {"lamina_config": LAMINA_CONFIGS[name]}
        for name in flags.models
    }
    about = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": flags.threads,
        "load_average": [load_before, os.getloadavg()[0]],
    }
    print(json.dumps(about | {"models": results}))


if __name__ == "__main__":
    main()
