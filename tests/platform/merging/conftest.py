import jax
import numpy as np
import pytest

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
