"""Merging of run folders: by their models' logical axes, and with their units matched."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors import safe_open
from safetensors.numpy import load_file

from lamina.models.functional import functional
from lamina.models.mlp import mlp
from lamina.models.spec import DataSpec
from lamina.platform import cli, merging
from lamina.platform.checkpoints import exchange
from lamina.platform.checkpoints.names import flatten
from lamina.platform.merging import files, matching, permutations, symmetries
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


def save(path, keys, spec, params, header=None):
    found = trained.Trained(None, spec, None, None, params, {}, 0, 1, ())
    found = found._replace(config=ConfigDict({"model": keys}))
    exchange.export_params(path, params, trained.describe(found) | (header or {}))
    return str(path)


def test_files_that_tell_their_model_are_aligned_and_others_are_refused(tmp_path, capsys):
    keys = {"name": "mlp", "widths": (6, 5)}
    spec = DataSpec((3,), "float32", 2)
    model = functional(lambda rngs: mlp(rngs, spec, np.float32, widths=(6, 5)))
    found = symmetries.derive(model, spec, check=False).spec
    one, _ = model.init(jax.random.key(0))
    two = permutations.apply(found, permutations.draw(found, seed=1), one)
    first = save(tmp_path / "a.safetensors", keys, spec, one)
    plain = str(tmp_path / "b.safetensors")
    exchange.export_params(plain, two)  # only the first has to tell
    out = tmp_path / "out.safetensors"
    command = ["merge", "--method=linear", f"--out={out}", "--align"]
    assert cli.main([*command, f"--models={first},{plain}"]) == 0
    for name, value in load_file(out).items():
        np.testing.assert_allclose(value, flatten(one)[name], rtol=0, atol=1e-6)
    with safe_open(out, "numpy") as file:  # so it can be aligned again
        assert {"model", "spec"} <= file.metadata().keys()
    lies = {
        "b": (plain, "doesn't say what model it is of"),
        "wider": (keys | {"widths": (7, 5)}, "the model that it describes"),
        "no": (keys | {"name": "elsewhere:model"}, "elsewhere"),
    }
    for name, (given, message) in lies.items():
        path = tmp_path / f"{name}.safetensors"
        given = given if given == plain else save(path, given, spec, one)
        assert cli.main([*command, f"--models={given},{first}"]) == 2
        assert message in capsys.readouterr().err
    for header in ({"model": "["}, {"spec": "{}"}, {"spec": "[" * 99999}, {"model": '{"a": 1}'}):
        given = save(tmp_path / "lie.safetensors", keys, spec, one, header)
        assert cli.main([*command, f"--models={given},{first}"]) == 2
        assert "lie.safetensors" in capsys.readouterr().err
    params = jax.tree.map(lambda leaf: leaf * np.nan, one)
    given = save(tmp_path / "nan.safetensors", keys, spec, params)
    assert cli.main([*command, f"--models={first},{given}"]) == 2
    assert "nan.safetensors" in capsys.readouterr().err
