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
# # Reading a shoot-out
#
# Two optimizers on two workloads, tuned equally: what the result holds, what it says, and what it
# doesn't. It takes about a minute on a laptop's CPU.

# %%
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML

from lamina.platform.config import load
from lamina.platform.run import run
from lamina.platform.sweeps import scoring

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The config
#
# A workload is what it changes of the config, and a target; an optimizer likewise. Here are two of
# each of the shipped shoot-out, with fewer steps.

# %%
config, _ = load("optimizers/shootout:quick")
s = config.shootout
with config.unlocked():
    s.optimizers = {name: s.optimizers[name] for name in ("adamw", "nesterov")}
    s.workloads = {name: s.workloads[name] for name in ("logistic", "quadratic")}
config.steps = 200
s.workloads.quadratic.config.steps = 400
s.workloads.quadratic.target = 0.01
s.workloads.logistic.target = 0.2
config.shootout

# %% [markdown]
# ## The run
#
# All is written into one folder; the same call again goes on where it was stopped. The final
# numbers are those of the best points, trained again with fresh seeds.

# %%
result = run(config, folder / "shootout", console=False)
standings = result.summary["shootout"]
result

# %% [markdown]
# ## Times to the target
#
# What decides is the number of steps to the target: of each study the fastest trial, and the median
# over studies. `None` is a miss, which counts as infinite.

# %%
for optimizer, own in standings["times"]["steps"].items():
    print(f"{optimizer:<10}", own)

# %% [markdown]
# A fast trial may be luck: the best of five learning rates was chosen for its speed. The fresh
# seeds weren't, so their median and its interval are the more honest number.

# %%
for workload in standings["targets"]:
    for optimizer, own in standings["fresh"].items():
        steps = own[workload]["steps"]
        print(f"{workload:<10} {optimizer:<10} {steps['values']}  interval {steps['interval']}")
print("apart from all others:", standings["winners"])

# %% [markdown]
# ## Scores and profiles
#
# A profile tells on which share of the workloads an optimizer needs at most tau times the steps of
# the fastest one; the score is its integral from 1 to 4. The functions are plain Python.

# %%
times = {
    name: {w: np.inf if t is None else t for w, t in own.items()}
    for name, own in standings["times"]["steps"].items()
}
tau = np.linspace(1, 4, 301)
figure, axes = plt.subplots(figsize=(5, 3))
for name, own in scoring.ratios(times).items():
    axes.step(tau, scoring.profile(list(own.values()), tau), where="post", label=name)
axes.set(xlabel="times the fastest", ylabel="share of workloads", ylim=(-0.05, 1.05))
axes.legend(frameon=False)
plt.show()
print(scoring.scores(times))

# %% [markdown]
# ## The learning rate
#
# How many of the trials met the target tells how much depends on tuning. Every trial is kept.

# %%
figure, axes = plt.subplots(figsize=(5, 3))
for optimizer in standings["fresh"]:
    path = folder / "shootout" / "cells" / "logistic" / optimizer / "study_0.json"
    trials = json.loads(path.read_text())["trials"]
    rates = [trial["values"]["optimizer.learning_rate"] for trial in trials]
    axes.plot(rates, [trial["best"][0] for trial in trials], "o", label=optimizer)
axes.axhline(config.shootout.workloads.logistic.target, color="grey", linewidth=0.8)
axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="best validation loss")
axes.legend(frameon=False)
plt.show()
standings["sensitivity"]

# %% [markdown]
# ## The report
#
# `report.html` in the folder has all of it: ranking, profiles, times with their misses, curves, the
# ranking without each workload, and what was tuned.

# %%
text = (folder / "shootout" / "report.html").read_text()
HTML(text[text.index("<svg") : text.index("</svg>") + 6])
