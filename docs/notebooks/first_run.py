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
# # A first run
#
# Trains a small network on 8x8 digits with three seeds, looks at the result, and uses the trained
# model. It takes some seconds on a laptop's CPU.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from lamina.platform.config import flatten, load
from lamina.platform.data.digits import digits
from lamina.platform.run import restore, run

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The config
#
# `load` gives the config of a shipped experiment, as `--config=quickstart` does on the command
# line. It is plain data; every key may be changed before the run.

# %%
config, _ = load("quickstart")
config.steps = 400
for key, value in flatten(config).items():
    print(f"{key} = {value!r}")

# %% [markdown]
# ## The run
#
# All is written into one folder. A result shows its final numbers, over the seeds, and a curve.

# %%
result = run(config, folder / "quickstart", console=False)
result

# %%
accuracy = result.final["test/accuracy"]
print(f"test accuracy {accuracy.mean:.4f} ± {accuracy.std:.4f}, of each seed {accuracy.values}")

# %% [markdown]
# ## Curves
#
# Every number that was logged is a record: step, split, name, value, seed and time.


# %%
def curve(split: str, name: str) -> tuple[list[int], np.ndarray]:
    """Returns the steps, and the values [steps, seeds]."""
    found = [r for r in result.metrics if (r.split, r.name) == (split, name)]
    steps = sorted({r.step for r in found})
    values = [[r.value for r in found if r.step == step] for step in steps]
    return steps, np.array(values)


figure, left = plt.subplots(figsize=(6, 3))
for split in ("train", "validation"):
    steps, values = curve(split, "loss")
    left.plot(steps, values.mean(1), label=split)
    left.fill_between(steps, values.min(1), values.max(1), alpha=0.2)
left.set(xlabel="step", ylabel="loss", yscale="log")
left.legend()
plt.show()

# %% [markdown]
# ## The trained model
#
# `restore` reads the newest checkpoint; the data set isn't needed for that.

# %%
model = restore(folder / "quickstart", seed=1)
test = digits().splits["test"].arrays
predicted = model.predict(test["inputs"])
print(model)
print(f"accuracy of seed 1: {(predicted == test['labels']).mean():.4f}")

# %%
wrong = np.flatnonzero(predicted != test["labels"])
chosen = [*wrong[:5], *range(5)]
figure, places = plt.subplots(1, len(chosen), figsize=(9, 1.4))
for place, i in zip(places, chosen, strict=True):
    place.imshow(test["inputs"][i, :, :, 0], cmap="gray_r")
    right = predicted[i] == test["labels"][i]
    place.set_title(f"{predicted[i]}" if right else f"{predicted[i]} ✗ {test['labels'][i]}")
    place.set_axis_off()
plt.show()

# %% [markdown]
# The model's output has logits, and the input of its head:

# %%
output = model(test["inputs"][:3])
output.logits.shape, output.features.shape

# %% [markdown]
# ## Interrupt and resume
#
# Interrupt the cell below (the stop button) and run it again: it goes on where it was. Here another
# thread presses the button after the first checkpoint.

# %%
import _thread
import threading
import time

config.steps = 1000
config.trackers = ()


def interrupt(checkpoints: Path) -> None:
    """Interrupts the main thread as soon as there is a checkpoint."""
    while not (checkpoints / "100").exists():
        time.sleep(0.05)
    _thread.interrupt_main()


threading.Thread(target=interrupt, args=(folder / "long" / "checkpoints",), daemon=True).start()
stopped = run(config, folder / "long", console=False)
print(stopped.status, "|", stopped.message)

# %%
finished = run(config, folder / "long", console=False)
print(finished.status, finished.final["test/accuracy"].mean)

# %% [markdown]
# The same again trains nothing: the run is done, and its result is read from its folder.

# %%
again = run(config, folder / "long", console=False)
assert again.final == finished.final

# %% [markdown]
# The same run without an interruption gives the same numbers, digit for digit:

# %%
undisturbed = run(config, folder / "undisturbed", console=False)
assert undisturbed.final == finished.final

# %% [markdown]
# ## What is in the folder

# %%
for path in sorted((folder / "quickstart").iterdir()):
    print(path.name)

# %% [markdown]
# `report.html` shows it all on one page that needs no network.
