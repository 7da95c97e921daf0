# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own model and data
#
# Two functions of your own, a config that names them, two runs with three seeds each, and a look at
# how the model would be split over eight devices.

# %%
import os

# Eight virtual CPU devices, to look at sharding; it must stand before the first import of jax.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from lamina.models import axes
from lamina.models.spec import DataSpec
from lamina.platform.data.arrays import from_arrays
from lamina.platform.data.dataset import Dataset
from lamina.platform.reporting.compare import compare
from lamina.platform.run import restore, run

folder = Path(tempfile.mkdtemp())
one_device = jax.devices()[:1]

# %% [markdown]
# ## Data
#
# Arrays are enough. `from_arrays` checks them, and draws validation and test from the training
# split. Keyword-only parameters become keys of the config.


# %%
def spirals(*, arms: int = 3, examples: int = 3000, noise: float = 0.15) -> Dataset:
    """Returns points on spiral arms; the class is the arm."""
    random = np.random.default_rng(0)
    labels = random.integers(0, arms, examples)
    radius = random.uniform(0.3, 3.0, examples)
    angle = radius * 2 + labels * 2 * np.pi / arms + random.normal(0, noise, examples)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return from_arrays({"train": {"inputs": points, "labels": labels}}, where="spirals")


points = spirals().splits["train"].arrays
plt.figure(figsize=(3, 3))
plt.scatter(*points["inputs"].T, c=points["labels"], s=2)
plt.show()

# %% [markdown]
# ## Model
#
# Any NNX module. The platform supplies the first three arguments of the factory. The names of axes
# are optional: they say how the parameters may be split.


# %%
class Features(nnx.Module):
    """Waves of learned frequency, a hidden layer, and a head."""

    def __init__(self, rngs, spec: DataSpec, waves: int, width: int, dtype):
        start = nnx.initializers.normal(1.0)
        dense = nnx.initializers.lecun_normal()
        annotate = axes.annotate
        self.waves = nnx.Linear(
            spec.input_shape[0], waves, rngs=rngs, dtype=dtype,
            kernel_init=annotate(start, None, axes.EMBED),
        )  # fmt: skip
        self.hidden = nnx.Linear(
            waves, width, rngs=rngs, dtype=dtype,
            kernel_init=annotate(dense, axes.EMBED, axes.MLP),
        )  # fmt: skip
        self.head = nnx.Linear(
            width, spec.outputs, rngs=rngs, dtype=dtype,
            kernel_init=annotate(dense, axes.MLP, axes.CLASSES),
        )  # fmt: skip

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, 2] to logits [B, outputs]."""
        return self.head(nnx.gelu(self.hidden(jnp.sin(self.waves(x)))))


def features(
    rngs: nnx.Rngs, spec: DataSpec, dtype: jnp.dtype, *, waves: int = 32, width: int = 64
) -> Features:
    """Builds the model."""
    return Features(rngs, spec, waves, width, dtype)


# %% [markdown]
# ## Two runs
#
# A notebook's own functions are found under `__main__`. In a module of your own they would be
# `"my_package.my_module:features"`, and other programs could restore the run.

# %%
config = ConfigDict()
config.seeds = (0, 1, 2)
config.steps = 300
config.data = ConfigDict(dict(name="__main__:spirals", batch_size=64))
config.model = ConfigDict(dict(name="__main__:features", waves=32))
config.task = ConfigDict(dict(name="classification"))
config.optimizer = ConfigDict(dict(name="adam", learning_rate=3e-3))
config.schedule = ConfigDict(dict(name="cosine", warmup_steps=20))
config.evaluation = ConfigDict(dict(every=50))

waves = run(config, folder / "waves", console=False, devices=one_device)
waves

# %%
config.model = ConfigDict(dict(name="mlp", widths=(32, 64)))
mlp = run(config, folder / "mlp", console=False, devices=one_device)
mlp

# %%
for name, result in (("waves", waves), ("mlp", mlp)):
    accuracy = result.final["test/accuracy"]
    print(f"{name:<6} test accuracy {accuracy.mean:.3f} ± {accuracy.std:.3f}")

# %% [markdown]
# `compare` (`lamina compare` on the command line) writes curves, numbers, paired tests and the
# differences of the configs into one file.

# %%
page = compare([str(folder / "waves"), str(folder / "mlp")], str(folder / "compare.html"))
print(Path(page).stat().st_size // 1024, "KiB")

# %% [markdown]
# ## What it has learned

# %%
model = restore(folder / "waves", trust=("__main__",))
line = np.linspace(-3.2, 3.2, 120, dtype=np.float32)
grid = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
classes = model.predict(grid, batch_size=4096).reshape(120, 120)
plt.figure(figsize=(3, 3))
plt.contourf(line, line, classes, alpha=0.4)
plt.scatter(*points["inputs"].T, c=points["labels"], s=2)
plt.show()

# %% [markdown]
# ## Sharding
#
# On a mesh of 2 x 2 x 2 devices, with the rules `fsdp+tensor`, each parameter is split along the
# mesh axes that its logical axes name. Nothing is computed for this table.

# %%
from lamina.platform.training import experiment
from lamina.platform.training.compiled import parameter_rows

config.model = ConfigDict(dict(name="__main__:features"))
config.mesh = ConfigDict(dict(data=2, fsdp=2, tensor=2))
config.sharding = ConfigDict(dict(rules="fsdp+tensor"))
parts = experiment.assemble(experiment.resolve(config))
for row in parameter_rows(parts):
    print(f"{row['path']:<14} {row['shape']!s:<10} {row['axes']!s:<20} {row['sharding']}")

# %% [markdown]
# Of a hidden layer's kernel each device holds a quarter, and the rest is copied along `data`:

# %%
leaf = parts.state.params["hidden"]["kernel"]
kernel = jax.device_put(np.zeros(leaf.shape[1:]), jax.NamedSharding(
    parts.mesh, jax.P(*leaf.sharding.spec[1:])
))  # fmt: skip
jax.debug.visualize_array_sharding(kernel)

# %% [markdown]
# The same run on the mesh gives the same numbers, up to rounding.

# %%
sharded = run(config, folder / "sharded", console=False)
print(sharded.final["test/accuracy"].values, waves.final["test/accuracy"].values)
