"""The learning-rate finder on training configs: the limit of a quadratic, files, and mistakes."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from lamina.platform.errors import UserError
from lamina.platform.reporting import folder, records
from lamina.platform.run import run


def config(tmp_path, **changes):
    """Linear regression on whole batches: half its Hessian is X^T X / n, so 2 / L is known."""
    rng = np.random.default_rng(0)
    inputs = (rng.normal(size=(64, 6)) * np.geomspace(0.3, 3.0, 6)).astype(np.float32)
    labels = (inputs @ rng.normal(size=(6, 1))).astype(np.float32)
    path = tmp_path / "linear.npz"
    splits = {f"{s}_inputs": inputs for s in ("train", "validation", "test")}
    np.savez(path, **splits, **{k.replace("inputs", "labels"): labels for k in splits})
    extended = np.concatenate([inputs, np.ones((64, 1), np.float32)], axis=1)
    largest = np.linalg.eigvalsh(2 * extended.T @ extended / 64)[-1]
    base = {
        "program": "lr_finder",
        "steps": 100,
        "data": {"name": "arrays", "path": str(path), "batch_size": 64},
        "model": {"name": "mlp", "widths": ()},
        "task": {"name": "regression"},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "schedule": {"name": "cosine"},
        "mesh": {"data": -1},
        "trackers": (),
    }
    return ConfigDict(base | changes), 2 / largest


def test_finds_the_limit_of_linear_regression_on_eight_devices(tmp_path):
    c, limit = config(tmp_path, seeds=(0, 1))
    result = run(c, tmp_path / "run", console=False)
    assert result.status == "done"
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    assert saved["limit"] == pytest.approx(limit, rel=0.2)
    assert 0 < saved["suggestion"] < limit
    assert len(result.final["train/suggestion"].values) == 2
    entries = records.read(tmp_path / "run" / folder.METRICS)
    assert {e.name for e in entries} == {"learning_rate", "loss", "smoothed_loss"}
    assert "the suggestion and the limit of stability" in (tmp_path / "run/report.html").read_text()
    again = run(c, tmp_path / "run", console=False)
    assert again.final == result.final, "a finished run gives its result again"


def test_a_killed_run_starts_again_and_gives_the_same(tmp_path):
    c, _ = config(tmp_path, lr_finder={"steps": 60, "probe_steps": 4})
    first = run(c, tmp_path / "run", console=False)
    lines = (tmp_path / "run" / folder.METRICS).read_bytes()
    for name in ("result.json", "report.html"):
        (tmp_path / "run" / name).unlink()
    folder.write_status(tmp_path / "run", "running")
    second = run(c, tmp_path / "run", console=False)
    assert second.final == first.final
    assert len((tmp_path / "run" / folder.METRICS).read_bytes().splitlines()) == len(
        lines.splitlines()
    )


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"low": 1.0, "high": 0.5}, "0 < low < high"),
        ({"steps": 3}, "too short"),
        ({"smoothing": 1.0}, "smoothing = 1.0"),
        ({"probe_steps": 2}, "probe_steps = 2"),
        ({"lowest": 2.0}, "lr_finder.lowest is not a key"),
    ],
)
def test_a_mistake_is_named_before_there_is_a_folder(block, message, tmp_path):
    c, _ = config(tmp_path, lr_finder=block)
    with pytest.raises(UserError, match=message):
        run(c, tmp_path / "run", console=False)
    assert not (tmp_path / "run").exists()


def test_islands_are_refused_by_name(tmp_path):
    c, _ = config(tmp_path)
    c.islands = {"name": "local_sgd", "number": 2}
    with pytest.raises(UserError, match=r"islands\.name = 'local_sgd': a range test is of one"):
        run(c, tmp_path / "run", console=False)


def test_another_range_needs_another_folder(tmp_path):
    c, _ = config(tmp_path, lr_finder={"steps": 60, "probe_steps": 0})
    run(c, tmp_path / "run", console=False)
    other, _ = config(tmp_path, lr_finder={"steps": 60, "probe_steps": 0, "high": 1.0})
    with pytest.raises(UserError, match=r"lr_finder\.high"):
        run(other, tmp_path / "run", console=False)
