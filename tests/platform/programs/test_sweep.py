"""Sweeps of the digits: few programs, the numbers of single runs, resumed exactly."""

import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from lamina.platform import config as configs
from lamina.platform.commands import check
from lamina.platform.errors import UserError
from lamina.platform.reporting import folder
from lamina.platform.run import run
from lamina.platform.sweeps import lanes, results
from lamina.platform.training import compiled

BASE = {
    "program": "sweep",
    "seeds": (0, 3),
    "steps": 20,
    "data": {"name": "digits", "batch_size": 32},
    "model": {"name": "mlp", "widths": (8,), "dropout": 0.1},
    "task": {"name": "classification"},
    "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9},
    "schedule": {"name": "cosine"},
    "ema": {"decay": 0.5},
    "log_every": 5,
    "steps_per_call": 5,
    "evaluation": {"every": 10},
    "checkpoint": {"every": 5},
    "trackers": (),
}
SPACE = {
    "optimizer": {"learning_rate": (0.05, 0.2, 1e30)},
    "model": {"widths": {"values": ((8,), (16,))}},
}


def sweep_config(space=SPACE, **changes):
    sweep = changes.pop("sweep", {})
    return ConfigDict(configs.thaw({**BASE, **changes, "sweep": {"space": space, **sweep}}))


def start(config, workdir, devices=1):
    return run(config, workdir, console=False, devices=jax.devices()[:devices])


def rows_of(workdir):
    return {n: {**row, "seconds": 0} for n, row in results.read(str(workdir)).items()}


def counted(config, workdir):
    """Returns the result of a sweep, and how many training programs it compiled."""
    count = 0
    real = compiled.train_program

    def train_program(*arguments):
        nonlocal count
        count += 1
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "train_program", train_program)
        return start(config, workdir), count


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return counted(sweep_config(), tmp_path_factory.mktemp("sweep") / "run")


def test_two_widths_and_three_rates_compile_twice(finished):
    result, count = finished
    assert result.status == "done"
    assert len(rows_of(result.workdir)) == 6
    assert count == result.summary["programs"] == 2


def test_two_widths_and_eight_rates_compile_twice(tmp_path):
    rates = {"low": 1e-3, "high": 1.0, "scale": "log", "points": 8}
    space = {"optimizer": {"learning_rate": rates}, "model": {"widths": ((4,), (6,))}}
    quick = {"steps": 2, "steps_per_call": 2, "log_every": 2, "evaluation": {"every": 2}}
    config = sweep_config(space, seeds=(0,), checkpoint={}, ema={"decay": 0.0}, **quick)
    result, count = counted(config, tmp_path / "run")
    assert count == result.summary["programs"] == 2
    rows = rows_of(tmp_path / "run")
    assert len({row["final"]["validation/loss"]["mean"] for row in rows.values()}) == 16


def test_a_trial_that_diverges_is_recorded_and_the_others_go_on(finished):
    rows = rows_of(finished[0].workdir)
    for row in rows.values():
        if row["values"]["optimizer.learning_rate"] > 1:
            assert row["state"] == "diverged"
            assert row["score"] is None
            assert set(row["diverged"]) == {"0", "3"}
        else:
            assert row["state"] == "done"
            assert row["score"] > 0.1
    assert finished[0].summary["diverged_trials"] == 2


def test_the_best_trial_is_that_of_the_validation_split_and_the_test_split_is_not_read(finished):
    result = finished[0]
    rows = rows_of(result.workdir)
    best = max(rows.values(), key=lambda row: row["score"] or 0)
    assert result.summary["best"]["trial"] == best["trial"]
    assert result.final["validation/accuracy"].mean == best["score"]
    assert not any("test/" in name for row in rows.values() for name in row["final"])


@pytest.mark.slow
def test_best_json_runs_again_and_reaches_the_same_numbers(finished, tmp_path):
    result = finished[0]
    config, _ = configs.load(str(result.workdir) + "/best.json")
    again = start(config, tmp_path / "best")
    assert again.final["test/accuracy"].mean is not None
    for name, entry in result.final.items():
        np.testing.assert_allclose(again.final[name].values, entry.values, rtol=2e-5, err_msg=name)


def test_every_trial_has_a_folder_to_list_and_compare(finished):
    runs = [row for row in folder.list_runs(finished[0].workdir) if row.path.startswith("trials")]
    assert [run.path for run in runs] == [f"trials/{i:03d}" for i in range(6)]
    assert [run.state for run in runs].count("diverged") == 2
    assert runs[0].final["validation/accuracy"]["mean"] is not None


def test_a_sweep_that_fails_half_way_goes_on_with_the_same_numbers(finished, tmp_path, fail_lanes):
    result, _ = finished
    workdir = tmp_path / "run"
    fail_lanes(6, 12)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            start(sweep_config(), workdir)
    assert start(sweep_config(), workdir).status == "done"
    assert rows_of(workdir) == rows_of(result.workdir)


@pytest.mark.slow
def test_a_split_that_is_read_ahead_gives_the_numbers_of_one_on_the_device(tmp_path):
    space = {"optimizer": {"learning_rate": (0.05, 0.2)}}
    data = {"name": "digits", "batch_size": 32}
    held = start(sweep_config(space, data=data), tmp_path / "held")
    data = {**data, "placement": "grain"}
    read = start(sweep_config(space, data=data), tmp_path / "read")
    assert read.final == held.final


def test_optuna_asks_in_rounds_for_one_program_and_goes_on_with_the_same_points(
    tmp_path, monkeypatch, fail_lanes
):
    pytest.importorskip("optuna")
    space = {"optimizer": {"learning_rate": {"low": 1e-3, "high": 1.0, "scale": "log"}}}
    search = {"method": "optuna", "trials": 5, "round": 2, "seed": 7}
    config = sweep_config(space, sweep=search, seeds=(0,), steps=10)
    compilations, real = [], lanes.compile_group
    monkeypatch.setattr(lanes, "compile_group", lambda *a: compilations.append(a[0]) or real(*a))
    result = start(config, tmp_path / "whole")
    assert result.summary["trials"] == 5
    assert len(compilations) == result.summary["programs"] == 1

    fail_lanes(6)  # in the second round
    with pytest.raises(RuntimeError):
        start(config, tmp_path / "stopped")
    assert len(results.read(str(tmp_path / "stopped"))) == 2
    again = start(config, tmp_path / "stopped")
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")
    assert again.summary["best"] == result.summary["best"]


def test_a_signal_saves_lanes_where_they_are_and_the_sweep_goes_on_from_there(
    finished, tmp_path, monkeypatch
):
    config = sweep_config({**SPACE, "model": {"widths": {"values": ((8,),)}}}, checkpoint={})
    calls, step = 0, lanes.Lane.step

    def stopping(lane, chunk):
        nonlocal calls
        calls += 1
        if calls == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(lane, chunk)

    monkeypatch.setattr(lanes.Lane, "step", stopping)
    assert start(config, tmp_path / "run").status == "interrupted"
    monkeypatch.setattr(lanes.Lane, "step", step)
    assert start(config, tmp_path / "run").status == "done"
    whole = rows_of(finished[0].workdir)
    for row in rows_of(tmp_path / "run").values():
        rate = row["values"]["optimizer.learning_rate"]
        same = next(
            w
            for w in whole.values()
            if w["values"] == {"optimizer.learning_rate": rate, "model.widths": [8]}
        )
        assert row["final"] == same["final"]


def test_another_space_in_the_same_folder_is_refused(finished):
    with pytest.raises(UserError, match=r"sweep\.space\.optimizer\.learning_rate"):
        start(sweep_config({"optimizer": {"learning_rate": (0.05, 0.2)}}), finished[0].workdir)


@pytest.mark.slow
def test_numbers_that_are_data_give_the_numbers_of_constants(tmp_path):
    space = {
        "optimizer": {"learning_rate": (1e-3, 1e-2), "b1": (0.8,), "weight_decay": (0.0, 0.1)},
        "schedule": {"final_factor": (0.1,)},
        "task": {"label_smoothing": (0.1,)},
        "ema": {"decay": (0.9,)},
        "clip_norm": (0.5,),
    }
    config = sweep_config(space, optimizer={"name": "adamw", "learning_rate": 1.0}, seeds=(1,))
    result = start(config, tmp_path / "sweep")
    assert result.summary["programs"] == 1
    row = rows_of(tmp_path / "sweep")[1]
    config, _ = configs.load(str(tmp_path / "sweep/trials/001/config.json"))
    assert config.optimizer.weight_decay == 0.1
    assert config.clip_norm == 0.5
    alone = start(config, tmp_path / "alone")
    for name, entry in row["final"].items():
        np.testing.assert_allclose(
            alone.final[name].values, entry["values"], rtol=2e-4, err_msg=name
        )


@pytest.mark.slow
@pytest.mark.parametrize("order", ["shared", "per_seed"])
def test_eight_devices_give_the_numbers_of_one(tmp_path, order):
    config = sweep_config(
        {"optimizer": {"learning_rate": (0.05, 0.2)}},
        data={"name": "digits", "batch_size": 32, "order": order},
    )
    one, eight = start(config, tmp_path / "one"), start(config, tmp_path / "eight", devices=8)
    for name, entry in one.final.items():
        np.testing.assert_allclose(eight.final[name].values, entry.values, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "sweep.space is empty"),
        ({"space": {"optimizer": {"lr": (1.0,)}}}, "optimizer.lr is no key"),
        ({"space": {"optimizer": {"learning_rate": ("fast",)}}}, "should be a float"),
        ({"space": {"optimizer": {"name": ("sgd", "adamm")}}}, "adamm"),
        ({"space": {"task": {"label_smoothing": (0.1, 2.0)}}}, "label_smoothing = 2.0"),
        ({"sweep": {"method": "random"}}, "should be between 1 and"),
        ({"sweep": {"method": "anneal"}}, "should be one of"),
        ({"sweep": {"metric": "test/accuracy"}}, "isn't for selection"),
        ({"sweep": {"method": "random", "trials": 20_000}}, "should be between 1 and 10000"),
        (
            {
                "space": {
                    "optimizer": {"learning_rate": {"low": 0.1, "high": 1.0, "points": 20_000}}
                }
            },
            "20000 points, a sweep at most 10000",
        ),
        ({"sweep": {"metric": "validation/acuracy"}}, "isn't measured"),
        ({"early_stopping": {"metric": "validation/loss"}}, "isn't for a sweep"),
    ],
)
def test_a_mistake_is_told_before_there_is_a_folder(tmp_path, changes, message):
    changes = dict(changes)
    with pytest.raises(UserError, match=message):
        start(sweep_config(changes.pop("space", SPACE), **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_check_tells_the_trials_and_what_is_compiled(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(configs.to_json(sweep_config()))
    assert check.main([f"--config={path}", "--compile=false"]) == 0
    text = capsys.readouterr().out
    assert "6 trials of 2 seeds" in text
    assert "2 programs" in text


def test_the_table_is_json_lines(finished):
    lines = Path(finished[0].workdir, "sweep.jsonl").read_text().splitlines()
    assert [json.loads(line)["trial"] for line in lines] == list(range(6))


def test_the_report_shows_the_trials_and_draws_the_search(finished):
    text = Path(finished[0].workdir, "report.html").read_text()
    assert "Trials, the best first" in text
    assert "validation/accuracy over optimizer.learning_rate" in text
    assert "validation/accuracy of the best trials" in text
    assert len(text) < 300_000
