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
# # Merge two runs
#
# Two networks that were trained apart compute much the same with their units in another order.
# Averaged as they are, they make a bad model. Here the units of one are matched to the other's
# first (Ainsworth et al. 2022, [2209.04836](https://arxiv.org/abs/2209.04836)).

# %%
import tempfile
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from ml_collections import ConfigDict

from lamina.platform.merging import barrier, matching, permutations, repair, symmetries
from lamina.platform.run import restore, run
from lamina.platform.training import experiment

# %% [markdown]
# ## Two runs
#
# They differ in their seed: in how the weights start, and in the order of the images. Weight decay
# takes away what is left of the random start, which no permutation can match.


# %%
def config(seed: int) -> ConfigDict:
    """Returns the config of a run."""
    c = ConfigDict()
    c.program = "train"
    c.seeds = (seed,)
    c.steps = 200
    c.data = ConfigDict(dict(name="digits", batch_size=64, seed=seed))
    c.model = ConfigDict(dict(name="mlp", widths=(256, 256)))
    c.task = ConfigDict(dict(name="classification"))
    c.optimizer = ConfigDict(dict(name="adamw", learning_rate=3e-3, weight_decay=0.5))
    c.schedule = ConfigDict(dict(name="cosine", warmup_steps=30))
    c.log_every = 50
    c.steps_per_call = 50
    return c


folder = Path(tempfile.mkdtemp())
first, second = (run(config(seed), folder / f"seed{seed}", console=False) for seed in (0, 1))
second

# %% [markdown]
# ## What may be permuted
#
# The groups of units are derived from the model's program and its logical axes, and checked by
# permuting the units of random weights, which must not change the output.

# %%
one, other = (restore(result.workdir).trained for result in (first, second))
found = symmetries.derive(one.model, one.spec)
print(found.spec.describe())

# %% [markdown]
# ## Matching
#
# `moved` computes what `other` computes, with its units in the order of `one`.

# %%
matched = matching.match(found.spec, one.params, other.params)
moved = permutations.apply(found.spec, matched.permutations, other.params)
print(f"inner product of the weights: {matched.before:.1f} -> {matched.similarity:.1f}")

fig, axes = plt.subplots(1, 2, figsize=(7, 3.2), sharey=True)
for ax, params, title in ((axes[0], other.params, "as trained"), (axes[1], moved, "matched")):
    a = np.asarray(one.params["layers"]["0"]["kernel"]).ravel()
    b = np.asarray(params["layers"]["0"]["kernel"]).ravel()
    ax.plot(a, b, ".", markersize=1)
    ax.set(title=f"{title}: correlation {np.corrcoef(a, b)[0, 1]:.2f}", xlabel="seed 0")
axes[0].set_ylabel("seed 1")
plt.show()

# %% [markdown]
# ## The barrier
#
# The loss along the straight line between the two, in one compiled pass. `repair` sets the
# statistics of each unit to the mean of the two networks' (Jordan et al. 2022,
# [2211.08403](https://arxiv.org/abs/2211.08403)).

# %%
data = experiment.open_dataset(experiment.resolve(config(0)).data, ())
stacked = lambda split, name: jnp.asarray(np.stack([row[name] for row in data.splits[split]]))
images, labels = stacked("test", "inputs"), stacked("test", "labels")
training = stacked("train", "inputs")[:1024].reshape(4, 256, *images.shape[1:])


def evaluate(params):
    """Returns the loss and the accuracy on the test split."""
    logits = one.model.apply(params, {}, images, train=False)[0].logits
    log_p = logits - jnp.log(jnp.exp(logits).sum(-1, keepdims=True))
    hit = logits.argmax(-1) == labels
    return {
        "loss": -jnp.take_along_axis(log_p, labels[:, None], 1).mean(),
        "accuracy": hit.mean(),
    }


alphas = np.linspace(0, 1, 21)
lines = {
    "as trained": barrier.along(evaluate, one.params, other.params, alphas),
    "matched": barrier.along(evaluate, one.params, moved, alphas),
}
fig, axes = plt.subplots(1, 2, figsize=(8, 3.2))
for name, line in lines.items():
    height = barrier.barrier(alphas, line["loss"])
    axes[0].plot(alphas, line["loss"], label=f"{name}: barrier {height:.3f}")
    axes[1].plot(alphas, line["accuracy"], label=name)
axes[0].set(xlabel="from seed 0 to seed 1", ylabel="test loss")
axes[1].set(xlabel="from seed 0 to seed 1", ylabel="test accuracy")
axes[0].legend()
plt.show()

# %%
merged = barrier.interpolate(one.params, moved, 0.5)
fixed = repair.repair(one.model, one.params, moved, merged, training)
for name, params in (("seed 0", one.params), ("seed 1", other.params),
                     ("mean", barrier.interpolate(one.params, other.params, 0.5)),
                     ("matched mean", merged), ("repaired", fixed)):  # fmt: skip
    score = evaluate(params)
    print(f"{name:<13} loss {float(score['loss']):.3f}  accuracy {float(score['accuracy']):.3f}")

before, after = (barrier.barrier(alphas, line["loss"]) for line in lines.values())
assert after < 0.4 * before
