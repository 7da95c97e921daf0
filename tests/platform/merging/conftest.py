import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

AXES = {
    "blocks": {"kernel": ("layers", "embed", "mlp")},
    "conv": ("kernel_h", "kernel_w", "conv_in", "conv_out"),
    "query": {"kernel": ("embed", "heads", "head_dim"), "bias": ("heads", "head_dim")},
}


def make(seed: int, near=None, dtype=np.float32):
    random = np.random.default_rng(seed)
    shapes = {
        "blocks": {"kernel": (3, 8, 5)},
        "conv": (3, 3, 2, 4),
        "query": {"kernel": (8, 2, 4), "bias": (2, 4)},
    }
    draw = lambda shape: random.standard_normal(shape).astype(dtype)
    tree = jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))
    return tree if near is None else jax.tree.map(lambda a, b: a + b * dtype(0.1), near, tree)


@pytest.fixture
def base():
    return make(0)


@pytest.fixture
def models(base):
    return [make(seed, base) for seed in (1, 2, 3)]


@pytest.fixture
def axes():
    return AXES


def draw_tensors(seed, near=None, dtype=np.float32):
    random = np.random.default_rng(seed)
    shapes = {"model.embed": (40, 7), "model.layers.0.up": (30, 11), "model.norm": (23,)}
    drawn = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    if near is not None:
        drawn = {n: near[n].astype(np.float32) + 0.1 * v for n, v in drawn.items()}
    return {n: v.astype(dtype) for n, v in drawn.items()}


@pytest.fixture(scope="session")
def tensors():
    """Draws a model as a file has it: `(seed, near=None, dtype=np.float32)`."""
    return draw_tensors


def write_files(folder, models):
    found = []
    for number, model in enumerate(models):
        found.append(str(folder / f"model{number}.safetensors"))
        save_file(model, found[-1], {"format": "pt"})
    return found


@pytest.fixture(scope="session")
def write():
    """Writes models to files in a folder, and returns their paths."""
    return write_files


@pytest.fixture
def paths(tmp_path):
    """Files of a base and of three models near it."""
    base = draw_tensors(0)
    return write_files(tmp_path, [base, *(draw_tensors(seed, base) for seed in (1, 2, 3))])
