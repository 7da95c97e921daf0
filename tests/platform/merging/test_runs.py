"""Merging of run folders: by their models' logical axes, and with their units matched."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors import safe_open
from safetensors.numpy import load_file

from lamina.platform import cli, merging
from lamina.platform.checkpoints.names import flatten
from lamina.platform.merging import files, matching, symmetries
from lamina.platform.programs import merge as program
from lamina.platform.run import run
from lamina.platform.training import trained

RUN = {
        "steps": 2,
        "steps_per_call": 2,
        "log_every": 2,
        "data": {"name": "digits", "batch_size": 8},
        "model": {
            "name": "vit", "patch": 4, "depth": 2, "embed": 8, "heads": 2, "mlp": 12, "pool": "gap",
        },
        "task": {"name": "classification"},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "schedule": {"name": "constant"},
        "evaluation": {"every": 2},
        "checkpoint": {"every": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folders = [str(tmp_path_factory.mktemp("runs") / f"run{seed}") for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        run(ConfigDict(RUN | {"seeds": (seed,)}), folder, console=False)
    return folders


@pytest.mark.slow
def test_runs_are_merged_with_their_logical_axes(runs, tmp_path):
    out = tmp_path / "out.safetensors"
    prepared = program.prepare("slerp", {"t": 0.4}, models=runs, out=str(out))
    files.run(prepared)
    found = [trained.read(path) for path in runs]
    merger = merging.create("slerp", t=0.4)
    expected = flatten(merger([f.params for f in found], axes=found[0].model.axes))
    for name, value in load_file(out).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=2e-6)
    again = run(ConfigDict(RUN | {"init_from": str(out)}), tmp_path / "again", console=False)
    assert again.status == "done"


@pytest.mark.slow
def test_runs_are_aligned_before_they_are_merged(runs, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    command = ["merge", f"--models={','.join(runs)}", f"--out={out}", "--align"]
    assert cli.main([*command, "--method=linear"]) == 0
    one, other = (trained.read(path) for path in runs)
    spec = symmetries.derive(one.model, one.spec, check=False).spec
    moved = flatten(matching.align(spec, one.params, other.params))
    for name, leaf in flatten(one.params).items():
        np.testing.assert_allclose(load_file(out)[name], (leaf + moved[name]) / 2, atol=2e-6)
    with safe_open(out, "numpy") as file:
        assert json.loads(file.metadata()["lamina_merge"])["aligned"] is True
    assert cli.main([*command, "--method=weight_matching"]) == 2
    assert "--method=linear --align" in capsys.readouterr().err
    assert (
        cli.main(["merge", f"--models={out},{out}", "--out=x", "--method=linear", "--align"]) == 2
    )
    assert "--align needs runs" in capsys.readouterr().err
