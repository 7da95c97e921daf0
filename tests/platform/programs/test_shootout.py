"""A tiny shoot-out: its standings, its cells, that it goes on, and what is refused."""

import json
import math
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
from lamina.platform.sweeps import lanes

QUADRATIC = {
    "target": 0.5,
    "config": {
        "data": {"name": "quadratic", "dimensions": 4, "condition": 10.0, "batch_size": 8},
        "task": {"name": "regression"},
    },
}
BASE = {
    "program": "shootout",
    "seeds": (0, 1, 2),
    "steps": 40,
    "data": {"name": "digits", "batch_size": 32},
    "model": {"name": "mlp", "widths": ()},
    "task": {"name": "classification"},
    "optimizer": {"name": "adamw", "learning_rate": 0.1, "b1": 0.5},
    "schedule": {"name": "constant"},
    "log_every": 20,
    "steps_per_call": 5,
    "evaluation": {"every": 5},
    "checkpoint": {"every": 10},
    "trackers": (),
}
SHOOTOUT = {
    "workloads": {"quadratic": QUADRATIC, "digits": {"target": 0.8}},
    "optimizers": {
        "adamw": {"config": {"optimizer": {"name": "adamw"}}},
        "sgd": {"config": {"optimizer": {"name": "sgd", "momentum": 0.9}}},
    },
    "space": {"optimizer": {"learning_rate": {"low": 1e-4, "high": 10.0, "scale": "log"}}},
    "trials": 3,
    "studies": 2,
}
MISSED = {
    **SHOOTOUT,
    "workloads": {"quadratic": {**QUADRATIC, "target": 0.0}},
    "trials": 2,
    "studies": 1,
}


def make_config(changes=None, **own):
    return ConfigDict({**BASE, **own, "shootout": {**SHOOTOUT, **(changes or {})}})


def start(config, workdir):
    return run(config, workdir, console=False, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The result of a shoot-out, and the programs that it compiled."""
    compiled, real = [], lanes.compile_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "compile_group", lambda *a: compiled.append(a[0]) or real(*a))
        result = start(make_config(), tmp_path_factory.mktemp("shootout") / "run")
    return result, compiled


@pytest.fixture(scope="module")
def standings(finished):
    return finished[0].summary["shootout"]


def test_a_program_for_each_optimizer_on_each_workload(finished):
    assert finished[0].status == "done"
    assert len(finished[1]) == 4


def test_every_cell_is_stored(finished):
    root = Path(finished[0].workdir, "cells")
    names = sorted(str(path.relative_to(root)) for path in root.glob("*/*/*.json"))
    each = ("fresh.json", "study_0.json", "study_1.json")
    pairs = ("digits/adamw", "digits/sgd", "quadratic/adamw", "quadratic/sgd")
    assert names == [f"{pair}/{name}" for pair in pairs for name in each]
    cell = json.loads((root / "digits/sgd/study_1.json").read_text())
    assert [trial["trial"] for trial in cell["trials"]] == [3, 4, 5]
    assert {tuple(trial["seeds"]) for trial in cell["trials"]} == {(1001,)}


def test_all_optimizers_try_the_same_points_and_studies_share_none(finished):
    root = Path(finished[0].workdir, "cells")
    points = {}
    for path in root.glob("*/*/study_*.json"):
        values = [str(t["values"]) for t in json.loads(path.read_text())["trials"]]
        points.setdefault(path.name, []).append(values)
    assert all(each == entries[0] for entries in points.values() for each in entries)
    assert not set(points["study_0.json"][0]) & set(points["study_1.json"][0])


def test_the_time_is_the_median_over_studies_of_the_fastest_trial(finished, standings):
    root = Path(finished[0].workdir, "cells", "quadratic", "sgd")
    fastest = []
    for study in ("study_0.json", "study_1.json"):
        trials = json.loads((root / study).read_text())["trials"]
        fastest.append(min(math.inf if t["steps"][0] is None else t["steps"][0] for t in trials))
        for trial in trials:
            values = trial["curve"]["values"][0]
            places = zip(trial["curve"]["steps"], values, strict=True)
            met = [s for s, v in places if v is not None and v <= 0.5]
            assert trial["steps"] == [met[0] if met else None]
    assert standings["times"]["steps"]["sgd"]["quadratic"] == np.median(fastest)


def test_the_best_point_is_trained_again_with_fresh_seeds_and_its_config_is_kept(finished):
    root = Path(finished[0].workdir)
    trial = json.loads((root / "cells/digits/adamw/fresh.json").read_text())["trials"][0]
    assert trial["seeds"] == [0, 1, 2]
    config, _ = configs.load(str(root / "best/digits/adamw/config.json"))
    assert config.optimizer.learning_rate == trial["values"]["optimizer.learning_rate"]
    assert config.program == "train"
    assert tuple(config.seeds) == (0, 1, 2)
    assert finished[0].final["digits/adamw accuracy"].values == trial["last"]


def test_a_block_with_a_name_starts_from_that_names_defaults(finished):
    for optimizer in ("adamw", "sgd"):
        path = Path(finished[0].workdir, "best/quadratic", optimizer, "config.json")
        config, _ = configs.load(str(path))
        assert config.optimizer.get("b1", 0.9) == 0.9  # not the 0.5 of another block
        assert config.task.name == "regression"


def test_the_standings_are_complete(standings):
    assert sorted(standings["ranked"]) == ["adamw", "sgd"]
    own = standings["score"][standings["clock"]]
    assert own[standings["ranked"][0]] == max(own.values())
    for name in ("adamw", "sgd"):
        low, high = standings["fresh_score_interval"][name]
        assert 0 <= low <= high <= 1
        assert 0 <= standings["sensitivity"][name]["digits"] <= 1
        assert standings["cost"][name]["digits"]["state_bytes"] >= 650 * 4
        assert set(standings["without"]) == {"digits", "quadratic"}


@pytest.mark.slow
def test_a_shootout_that_fails_half_way_goes_on_with_the_same_numbers(
    finished, tmp_path, fail_lanes, timeless
):
    fail_lanes(100)  # in the second pair
    with pytest.raises(RuntimeError):
        start(make_config(), tmp_path / "run")
    again = start(make_config(), tmp_path / "run")
    assert again.status == "done"
    assert timeless(again.summary) == timeless(finished[0].summary)
    removed = tmp_path / "run" / "cells" / "quadratic" / "sgd" / "fresh.json"
    removed.unlink()
    assert timeless(start(make_config(), tmp_path / "run").summary) == timeless(again.summary)
    assert removed.exists()


def test_targets_that_nobody_meets_are_misses_and_score_0(tmp_path):
    result = start(make_config(MISSED, seeds=(0,), steps=10), tmp_path / "run")
    found = result.summary["shootout"]
    assert found["times"]["steps"] == {"adamw": {"quadratic": None}, "sgd": {"quadratic": None}}
    assert found["score"]["steps"] == {"adamw": 0.0, "sgd": 0.0}
    assert found["winners"] == {"quadratic": ""}
    assert set(found["targets"]["quadratic"]["early"]) == {"adamw", "sgd"}
    text = Path(result.workdir, folder.REPORT).read_text()
    assert "∞" in text


def test_the_report_shows_ranking_profiles_times_and_curves(finished):
    text = Path(finished[0].workdir, folder.REPORT).read_text()
    for part in (
        "Ranking",
        "Performance profiles",
        "Time to the target",
        "quadratic: validation/loss",
        "Without one workload",
        "Tuning and sensitivity",
        "Targets",
    ):
        assert part in text, part
    assert len(text) < 300_000


UNEQUAL = {"adamw": {"config": {"optimizer": {"name": "adamw"}}, "trials": 9}, "sgd": {}}
WIDER = {
    "sgd": {},
    "adamw": {
        "space": {"optimizer": {"learning_rate": (0.1, 0.2), "weight_decay": (0.0, 0.1)}},
    },
}

DENSER = {
    "sgd": {},
    "adamw": {
        "space": {"optimizer": {"learning_rate": {"low": 1e-3, "high": 1.0, "scale": "log"}}}
    },
}


def against_sgd(**config):
    return {"sgd": {}, "adamw": {"config": config}}


@pytest.mark.parametrize(
    ("changes", "own", "message"),
    [
        ({"optimizers": UNEQUAL}, {}, r"tuned unequally can't be ranked .*9 trials"),
        ({"optimizers": WIDER}, {}, r"tuned unequally can't be ranked .*2 keys"),
        ({"optimizers": DENSER}, {}, r"sgd: optimizer\.learning_rate over a factor of 100000"),
        ({"optimizers": against_sgd(steps=80)}, {}, r"steps is 80 for adamw and 40 for sgd"),
        ({"optimizers": against_sgd(seeds=(0, 1))}, {}, r"seeds is .* for adamw and"),
        ({"optimizers": against_sgd(data={"batch_size": 64})}, {}, r"batch_size is 64 for adamw"),
        ({"optimizers": {}}, {}, r"shootout\.optimizers is empty"),
        ({"optimizers": {"a/b": {}}}, {}, "a/b"),
        ({"optimizers": {"a": {"speed": 1}}}, {}, r"shootout\.optimizers\.a: speed is not a key"),
        ({"workloads": {"w": {}}}, {}, r"shootout\.workloads\.w: target is missing"),
        ({"workloads": {"w": {"target": 1.0, "metric": "validation/f1"}}}, {}, "isn't measured"),
        ({"workloads": {"w": {"target": 1.0, "config": {"modle": {}}}}}, {}, "modle"),
        ({"space": {"optimizer": {"lr": (1.0,)}}}, {}, r"shootout\.space\.optimizer\.lr"),
        ({"tuning_seed": 1}, {}, "should be fresh"),
        ({}, {"evaluation": {"every": 0}}, "can't tell when a target is met"),
        ({}, {"early_stopping": {"metric": "validation/loss"}}, "isn't for a shoot-out"),
    ],
)
def test_a_mistake_is_told_before_there_is_a_folder(tmp_path, changes, own, message):
    with pytest.raises(UserError, match=message):
        start(make_config(changes, **own), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unequal_tuning_is_shown_without_a_ranking(tmp_path):
    changes = {**MISSED, "optimizers": UNEQUAL, "ranking": False}
    changes["optimizers"] = {**UNEQUAL, "adamw": {**UNEQUAL["adamw"], "trials": 3}}
    result = start(make_config(changes, seeds=(0,), steps=5), tmp_path / "run")
    assert "ranked" not in result.summary["shootout"]
    assert result.summary["shootout"]["tuning"]["adamw"]["trials"] == 3
    assert "Ranking" not in Path(result.workdir, folder.REPORT).read_text()


def test_check_tells_workloads_optimizers_and_cost(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(configs.to_json(make_config()))
    assert check.main([f"--config={path}", "--compile=false"]) == 0
    text = capsys.readouterr().out
    assert "2 optimizers (adamw, sgd)" in text
    assert "quadratic: validation/loss <= 0.5000 within 40 steps" in text
    assert "4 pairs, 1,440 steps in all" in text
