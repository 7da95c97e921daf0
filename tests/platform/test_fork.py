"""`lamina fork`: another future with the same past."""

import json

import numpy as np
import pytest

from lamina.platform import cli

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(dict(
        program="incremental",
        stream=dict(name="class_incremental", experiences=2),
        learner=dict(name="ewc", strength=1.0),
        data=dict(name="digits", batch_size=64),
        model=dict(name="mlp", widths=(8,)),
        task=dict(name="classification"),
        optimizer=dict(name="adam", learning_rate=1e-2),
        schedule=dict(name="constant"),
        steps_per_call=3,
        log_every=3,
        checkpoint=dict(every=3, keep=9),
        trackers=(),
    ))
"""


@pytest.mark.slow
def test_a_fork_shares_the_past_and_has_another_future(tmp_path, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    parent, child = tmp_path / "parent", tmp_path / "child"
    assert cli.main(["run", f"--config={tmp_path}/config.py", f"--workdir={parent}"]) == 0
    fork = ["fork", f"--from={parent}", "--at=9", f"--workdir={child}"]
    assert cli.main([*fork, "--config.learner.strength=1e5"]) == 0
    texts = [(run / "metrics.jsonl").read_text() for run in (parent, child)]
    lines = [[json.loads(line) for line in text.splitlines()] for text in texts]
    past = [[r for r in records if r["step"] <= 9] for records in lines]
    assert past[0] == past[1]
    first, second = (np.load(run / "accuracy.npy") for run in (parent, child))
    np.testing.assert_array_equal(first[:, 0, :1], second[:, 0, :1])
    assert (first[:, -1] != second[:, -1]).any()
    manifest = json.loads((child / "manifest.json").read_text())
    assert manifest["parents"] == [str(parent / "checkpoints" / "9")]
    assert json.loads((child / "config.json").read_text())["learner"]["strength"] == 1e5
    capsys.readouterr()
    assert cli.main(["fork", f"--from={parent}", "--at=7", f"--workdir={tmp_path}/no"]) == 2
    assert "has checkpoints of the steps 3, 6, 9" in capsys.readouterr().err
    # What was refused leaves nothing that the mended command, of another step, would go on from.
    again = tmp_path / "again"
    fork = ["fork", f"--from={parent}", f"--workdir={again}"]
    assert cli.main([*fork, "--at=9", "--config.model.widths=5,"]) == 2
    assert "was made by another model" in capsys.readouterr().err
    assert cli.main([*fork, "--at=6", "--config.learner.strength=1e5"]) == 0
    assert "continues after step 6" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["--from", "--workdir"])
def test_a_missing_folder_is_named(missing, tmp_path, capsys):
    given = {"--from": str(tmp_path), "--workdir": str(tmp_path / "new")}
    del given[missing]
    assert cli.main(["fork", *(f"{k}={v}" for k, v in given.items())]) == 2
    assert f"{missing} is missing" in capsys.readouterr().err
