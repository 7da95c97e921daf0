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
# # Your own learner
#
# A learner is a `NamedTuple` of pure functions. The one below holds the parameters near those at
# the end of the last experience: `strength * ||th - th*||^2`. It is compared with fine-tuning and
# replay on permuted digits, three seeds each.

# %%
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from ml_collections import ConfigDict

from lamina.platform.incremental.learners import create
from lamina.platform.run import run
from lamina.platform.training.learners import Learner

# %% [markdown]
# Its state has an anchor for each parameter; it starts at the first parameters with no weight.
# `strength` is given in `hyper`: it is an array in the state then, and another value needs no new
# compilation.


# %%
def hold(*, strength: float = 0.01) -> Learner:
    """Adds `strength * ||th - th*||^2`, th* from the end of the last experience."""

    def init(setup):
        return {"anchor": jax.tree.map(jnp.copy, setup.params), "on": jnp.zeros(())}

    def loss(loss, own, params, mixed, output, moment, forward):
        square = lambda p, a: jnp.sum((p - a) ** 2)
        distance = sum(jax.tree.leaves(jax.tree.map(square, params, own["anchor"])))
        return loss + own["on"] * own["strength"] * distance

    def end(own, state, moment):
        return own | {"anchor": state.params, "on": jnp.ones(())}, state

    needs = frozenset({"boundaries"})
    return Learner(init=init, loss=loss, end=end, hyper={"strength": strength}, needs=needs)


# %% [markdown]
# A config names it as `"package.module:factory"`; here the module is this notebook.


# %%
def config(**learner) -> ConfigDict:
    """Three experiences of the digits, each with its own permutation of the pixels."""
    return ConfigDict(
        dict(
            program="incremental",
            seeds=(0, 1, 2),
            stream=dict(name="domain_incremental", experiences=3, epochs=6),
            learner=learner,
            data=dict(name="digits", batch_size=32, order="per_seed"),
            model=dict(name="mlp", widths=(64,)),
            task=dict(name="classification"),
            optimizer=dict(name="adam", learning_rate=3e-3),
            schedule=dict(name="constant"),
            steps_per_call=0,
            trackers=(),
        )
    )


folder = Path(tempfile.mkdtemp())
learners = {
    "finetune": dict(name="finetune"),
    "hold": dict(name=f"{__name__}:hold", strength=0.01),
    "er": dict(name="er", memory=100),
}
results = {
    name: run(config(**learner), folder / name, console=False) for name, learner in learners.items()
}
results["hold"]

# %%
for name, result in results.items():
    final = result.final
    accuracy, forgetting = final["final_average_accuracy"], final["forgetting"]
    print(f"{name:9} accuracy {accuracy.mean:.3f} ± {accuracy.std:.3f}", end="  ")
    print(f"forgetting {forgetting.mean:.3f} ± {forgetting.std:.3f}")

# %% [markdown]
# `accuracy.npy` has all accuracies, `[seed, time, task]`: here those on the first task.

# %%
figure, axes = plt.subplots(figsize=(5, 3))
for name in results:
    first = np.load(folder / name / "accuracy.npy")[:, :, 0]
    axes.errorbar([1, 2, 3], first.mean(0), first.std(0, ddof=1), label=name, capsize=3)
axes.set(xlabel="experiences learned", ylabel="accuracy on task 1", xticks=[1, 2, 3])
axes.legend()
plt.show()

# %%
figure, axes = plt.subplots(1, len(results), figsize=(7, 2.4), sharey=True)
for axis, name in zip(axes, results, strict=True):
    axis.imshow(np.load(folder / name / "accuracy.npy").mean(0), vmin=0, vmax=1)
    axis.set(title=name, xlabel="task", xticks=[0, 1, 2], yticks=[0, 1, 2])
plt.show()

# %% [markdown]
# Learners chain: `create("chain", links=("er", "ewc"))`, or, with one of your own,
# `chain(er=create("er"), hold=hold())`. What they remember is one memory.

# %%
create("chain", links=("er", "ewc")).memory.kind
