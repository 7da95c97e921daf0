"""A tiny shoot-out on a stream: its cells, shared programs, that it goes on, what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from lamina.platform import config as configs
from lamina.platform.commands import check
from lamina.platform.errors import UserError
from lamina.platform.incremental import metrics
from lamina.platform.programs import shootout, streamed_cells
from lamina.platform.reporting import folder
from lamina.platform.run import restore, run
from lamina.platform.sweeps import cells, pairs, rivals

ER = {
    "program": "incremental",
    "stream": {"name": "class_incremental", "experiences": 2},
    "learner": {"name": "er", "memory": 32, "replay": 16},
}
STREAM = {"target": 0.2, "config": ER}
SHOOTOUT = {
    "workloads": {"stream": STREAM},
    "optimizers": {
        "adam": {"config": {"optimizer": {"name": "adam"}}},
        "sgd": {"config": {"optimizer": {"name": "sgd", "momentum": 0.9}}},
    },
    "space": {"optimizer": {"learning_rate": (0.03, 1e30)}},  # the second diverges
    "trials": 2,
}
BASE = {
    "program": "shootout",
    "seeds": (0,),
    "steps": 40,
    "data": {"name": "digits", "batch_size": 64, "order": "per_seed"},
    "model": {"name": "mlp", "widths": (8,)},
    "task": {"name": "classification"},
    "optimizer": {"name": "adam", "learning_rate": 0.1},
    "schedule": {"name": "constant"},
    "log_every": 5,
    "steps_per_call": 5,
    "evaluation": {"every": 5},
    "checkpoint": {"every": 5},
    "trackers": (),
}


def make_config(**changes):
    return ConfigDict({**BASE, "shootout": {**SHOOTOUT, **changes}})


def start(config, workdir):
    return run(config, workdir, console=False, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a shoot-out, its result, and how many programs were compiled."""
    compiled, real = [], streamed_cells.compiled.compile_program
    workdir = tmp_path_factory.mktemp("shootout") / "run"
    with pytest.MonkeyPatch.context() as patch:
        counted = lambda *a: compiled.append(a) or real(*a)
        patch.setattr(streamed_cells.compiled, "compile_program", counted)
        result = start(make_config(), workdir)
    return workdir, result, len(compiled)


def study(root, optimizer):
    """Returns the trials of a study, that which converges first."""
    cell = json.loads((root / f"cells/stream/{optimizer}/study_0.json").read_text())
    return sorted(cell["trials"], key=lambda trial: trial["values"]["optimizer.learning_rate"])


def test_the_trials_of_a_study_share_a_program_and_the_best_point_is_an_ordinary_run(finished):
    root, result, compiled = finished
    assert result.status == "done"
    assert compiled == 4  # two optimizers: a study, and fresh seeds
    best = root / "best/stream/sgd"
    own, _ = configs.load(str(best / "config.json"))
    assert (own.program, tuple(own.seeds), own.stream.evaluate_on) == (
        "incremental",
        (0,),
        "validation",
    )
    assert own.optimizer.learning_rate == 0.03
    assert restore(best).predict(np.zeros((2, 8, 8, 1))).shape == (2,)


def test_the_target_is_met_where_the_mean_over_all_tasks_first_meets_it(finished):
    root, result, _ = finished
    for optimizer in ("adam", "sgd"):
        trial = study(root, optimizer)[0]
        path = root / f"cells/stream/{optimizer}/study_0/{trial['trial']:03d}"
        accuracy = np.load(path / "accuracy.npy")[0].mean(-1)
        assert trial["curve"]["steps"] == [5, 9, 10, 15, 18]
        np.testing.assert_allclose(trial["curve"]["values"][0], accuracy, rtol=1e-12)
        met = [s for s, v in zip(trial["curve"]["steps"], accuracy, strict=True) if v >= 0.2]
        assert trial["steps"] == [met[0] if met else None]
        found = result.summary["shootout"]["times"]["steps"][optimizer]["stream"]
        assert found == trial["steps"][0]
    assert study(root, "adam")[0]["steps"][0] is not None


def test_a_trial_that_diverges_is_a_miss_that_is_told(finished):
    root, result, _ = finished
    for optimizer in ("adam", "sgd"):
        trial = study(root, optimizer)[1]
        assert set(trial["diverged"]) == {"1000"}
        assert trial["steps"] == trial["last"] == [None]
        assert result.summary["shootout"]["diverged"][optimizer]["stream"] == 1
        path = root / f"cells/stream/{optimizer}/study_0/{trial['trial']:03d}"
        assert "is not finite" in folder.read_status(path)["message"]


def test_scores_of_the_whole_stream_are_known_at_its_end(finished):
    config = rivals.resolve(make_config())
    root, _, _ = finished
    devices = jax.devices()[:1]
    pair = pairs.plan(config, shootout.ENGINES, configs.EVERYONE, devices)[0]
    number = study(root, "adam")[0]["trial"]
    path = root / f"cells/stream/adam/study_0/{number:03d}"
    trial = pair.studies[0][number]
    choose = streamed_cells.select(pair.parts, "metric")
    for name, target in (("final_average_accuracy", 0.0), ("forgetting", 1.0)):
        metric, mode = choose(name, "auto")
        own = pair._replace(metric=metric, mode=mode, target=target)
        cell = cells.make(own, {number: streamed_cells.ended(str(path), own, trial)})
        assert cell["trials"][0]["steps"] == [18]
        value = metrics.METRICS[name](np.load(path / "accuracy.npy"), [1, 4])
        np.testing.assert_allclose(cell["trials"][0]["last"], value)


def test_a_shootout_that_is_lost_inside_a_trial_goes_on_with_the_same_numbers(
    finished, tmp_path, monkeypatch, timeless
):
    root, again = finished[0], tmp_path / "run"
    shutil.copytree(root, again)
    number = study(root, "sgd")[0]["trial"]
    (again / "cells/stream/sgd/study_0.json").unlink()
    shutil.rmtree(again / f"cells/stream/sgd/study_0/{number:03d}")
    folder.write_status(again, "failed")
    calls, real = [], streamed_cells.incremental.sequence.of_span

    def failing(cut, first, stop):
        calls.append(first)
        if len(calls) == 3:
            raise RuntimeError("the machine is gone")
        return real(cut, first, stop)

    with monkeypatch.context() as patched:
        patched.setattr(streamed_cells.incremental.sequence, "of_span", failing)
        with pytest.raises(RuntimeError):
            start(make_config(), again)
    result = start(make_config(), again)
    assert calls == [0, 5, 10]
    assert result.status == "done"
    assert timeless(study(again, "sgd")) == timeless(study(root, "sgd"))
    assert timeless(result.summary) == timeless(finished[1].summary)


def of(**changes):
    return {"workloads": {"stream": {**STREAM, "config": {**ER, **changes}}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (of(program="sweep"), "stream.config.program = 'sweep' can't be a workload: one of incr"),
        (of(stream={"name": "rows"}), r"workloads\.stream .*stream\.name = 'rows' is unknown"),
        (of(learner={}), r"learner\.name is missing"),
        (of(learner={"name": "er", "memory": 4}), "stream, adam: learner.memory = 4 is smaller"),
        (of(stream={"name": "class_incremental", "evaluate_on": "test"}), "isn't for tuning"),
        (of(steps=5), "steps = 5: an incremental run doesn't have it"),
        ({"workloads": {"s": {**STREAM, "metric": "validation/loss"}}}, "of average_accuracy, fin"),
        (
            {"optimizers": {"a": {"config": {"program": "incremental"}}}},
            r"optimizers\.a\.config\.program: the program is the workload's",
        ),
    ],
)
def test_a_mistake_is_told_before_there_is_a_folder(tmp_path, changes, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        start(make_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_check_tells_what_the_stream_is(tmp_path, capsys):
    path = tmp_path / "config.json"
    workloads = {"digits": {"target": 0.8}, "stream": STREAM}
    path.write_text(configs.to_json(make_config(workloads=workloads)))
    assert check.main([f"--config={path}", "--compile=false"]) == 0
    text = capsys.readouterr().out
    assert "digits: validation/accuracy >= 0.8000 within 40 steps\n" in text
    assert "stream: average_accuracy >= 0.2000 within 18 steps of class_incremental (2 exp" in text
    assert "4 pairs, 348 steps in all" in text
