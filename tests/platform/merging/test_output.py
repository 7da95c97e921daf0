"""The output of a merge appears whole or not at all, whatever else is at work."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lamina.platform.errors import UserError
from lamina.platform.merging import output


def test_a_merge_that_finds_another_at_work_leaves_it_alone(tmp_path):
    stage = output.Stage(tmp_path / "out.safetensors")
    with stage.held():
        (stage.folder / "half").write_text("written")
        with pytest.raises(UserError, match="another merge is writing"), stage.held():
            pass
        assert (stage.folder / "half").read_text() == "written"
    assert not stage.folder.exists()


def test_killed_anywhere_and_started_again_it_gives_the_same_bytes(tmp_path, write):
    random = np.random.default_rng(0)
    models = [{"w": random.standard_normal(3_000_000).astype(np.float32)} for _ in range(3)]
    paths = write(tmp_path, models)
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "lamina.platform.cli", "merge", "--method=ties"]
    command += [f"--base={paths[0]}", f"--models={','.join(paths[1:])}"]
    start = time.monotonic()
    subprocess.run([*command, f"--out={whole}"], check=True, capture_output=True)
    length = time.monotonic() - start
    for part in (0.5, 0.7, 0.85, 0.95):
        process = subprocess.Popen([*command, f"--out={out}"], stdout=subprocess.DEVNULL)
        time.sleep(part * length)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            assert out.read_bytes() == whole.read_bytes()
    subprocess.run([*command, f"--out={out}"], check=True, capture_output=True)
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(tmp_path)) == [
        *(f"model{number}.safetensors" for number in range(3)),
        "out.safetensors",
        "whole.safetensors",
    ]
