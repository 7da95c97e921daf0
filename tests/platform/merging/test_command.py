"""The command `lamina merge`: what it prints, refuses, and leaves behind."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from lamina.platform import cli, merging
from lamina.platform.merging import statistics, streaming


def test_sigterm_removes_what_was_written(paths, tmp_path, monkeypatch, capsys):
    before = sorted(tmp_path.iterdir())

    def stopped(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(streaming, "merge", stopped)
    out = tmp_path / "out.safetensors"
    command = ["merge", "--method=linear", f"--models={','.join(paths)}", f"--out={out}"]
    assert cli.main(command) == 75
    assert "stopped by SIGTERM: nothing was written" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_fisher_merges_files_by_the_statistics_beside_them(paths, tmp_path, capsys, tensors):
    models = [load_file(path) for path in paths]
    fishers = [{n: np.abs(v) for n, v in tensors(seed).items()} for seed in range(7, 11)]
    kept = [str(tmp_path / f"fishers{number}.safetensors") for number in range(4)]
    for path, tree in zip(kept, fishers, strict=True):
        statistics.save(path, tree, "fishers")
    out = tmp_path / "out.safetensors"
    command = ["merge", "--method=fisher", f"--models={','.join(paths)}", f"--out={out}"]
    assert cli.main([*command, "--weights=1,2,3,0", f"--statistics={','.join(kept)}"]) == 0
    expected = merging.create("fisher")(models, fishers=fishers, weights=(1, 2, 3, 0))
    for name, value in load_file(out).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=2e-6)
    with safe_open(out, "np") as file:
        manifest = json.loads(file.metadata()["lamina_merge"])
    assert [entry["path"] for entry in manifest["statistics"]] == kept
    for given, message in (
        ([], "fisher needs --statistics"),
        ([f"--statistics={kept[0]}"], "fisher needs --statistics"),
        ([f"--statistics={','.join([*kept[:3], paths[0]])}"], "holds no fishers: a model"),
        (["--method=linear", f"--statistics={kept[0]}"], "linear takes no --statistics"),
    ):
        assert cli.main([*command, *given]) == 2
        assert message in capsys.readouterr().err


def test_a_disk_without_room_leaves_nothing(paths, tmp_path):
    out = tmp_path / "out.safetensors"
    before = sorted(tmp_path.iterdir())
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500));"
        "from lamina.platform.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = ["merge", "--method=linear", f"--models={','.join(paths)}", f"--out={out}"]
    done = subprocess.run(
        # Without -B the limit would cut the bytecode that it writes.
        [sys.executable, "-B", "-c", code, *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "size limit" in done.stderr
    assert sorted(tmp_path.iterdir()) == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1500


def test_the_command_merges_dry_and_wet_without_jax(paths, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    command = ["merge", "--method=ties", f"--base={paths[0]}", f"--models={','.join(paths[1:])}"]
    command += [f"--out={out}", "--set=density=0.3,normalize=false", "--weights=1,2,0.5"]
    assert cli.main([*command, "--dry-run"]) == 0
    assert "would merge 3 tensors" in capsys.readouterr().out
    assert not out.exists()
    code = (
        "import sys; from lamina.platform.cli import main; code = main(sys.argv[1:]);"
        "assert 'jax' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], check=False)
    assert done.returncode == 0
    merger = merging.create("ties", density=0.3, normalize=False)
    models = [load_file(path) for path in paths]
    expected = merger(models[1:], base=models[0], weights=(1, 2, 0.5))
    for name, value in load_file(out).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method=tie"], "did you mean 'ties'"),
        (["--method=ties", "--base="], "needs --base"),
        (["--method=ties", "--set=densty=0.2"], "densty is not a key"),
        (["--method=ties", "--set=density"], "key=value"),
        (["--method=ties", "--set=density=0.2,density=0.3"], "density twice: 0.2 and 0.3"),
        (["--method=regmean"], "merging.create('regmean')(models"),
        (["--method=ties", "--weights=1,x"], "'x' is no number"),
        (["--method=ties", "--weights=1"], "needs 3 weights"),
        (["--method=ties", "--dtype=int8"], "should be one of"),
        (["--method=ties", "--models=gone.safetensors"], "no model at gone"),
    ],
)
def test_mistakes_on_the_command_line_exit_with_2(arguments, message, paths, tmp_path, capsys):
    command = [f"--base={paths[0]}", f"--models={','.join(paths[1:])}", f"--out={tmp_path / 'o'}"]
    assert cli.main(["merge", *command, *arguments]) == 2
    assert message in capsys.readouterr().err
