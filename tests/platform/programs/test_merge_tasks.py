"""The program `merge`: stages, cells, choice on validation, resuming, references and refusals."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from lamina.platform import cli, merging
from lamina.platform import config as configs
from lamina.platform.checkpoints import names
from lamina.platform.errors import UserError
from lamina.platform.multitask import bench, cells, models, settings
from lamina.platform.programs import merge_tasks
from lamina.platform.reporting import folder
from lamina.platform.run import run

OWN = ("^head/",)


def digits(**changes):
    return {"name": "derived", "source": "digits", "batch_size": 64, **changes}


def config_of(**merge):
    block = {
        "own": ("head",),
        "finetune": {"steps": 10, "optimizer": {"learning_rate": 3e-3}},
        "tasks": {
            "turned": {"data": digits(rotation=1)},
            "negative": {"data": digits(invert=True)},
        },
        "methods": {
            "average": {"name": "linear"},
            "arithmetic": {"name": "task_arithmetic", "scale": (0.2, 0.6, 1.0)},
            "fisher": {"name": "fisher"},
            "regmean": {"name": "regmean"},
            "adamerging": {"name": "adamerging", "learning_rate": 0.01},
            "labels": {"name": "adamerging", "objective": "labels", "learning_rate": 0.01},
        },
        "examples": 32,
        "steps": 5,
        "batch_size": 8,
    }
    return ConfigDict(
        {
            "program": "merge",
            "seeds": (0, 3),
            "steps": 10,
            "data": digits(),
            "model": {"name": "mlp", "widths": (16, 16)},
            "task": {"name": "classification"},
            "optimizer": {"name": "adamw", "learning_rate": 3e-3},
            "schedule": {"name": "constant"},
            "log_every": 10,
            "steps_per_call": 10,
            "trackers": (),
            "merge": {**block, **merge},
        }
    )


def start(config, workdir):
    return run(config, workdir, console=False, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished merge of two tasks and two seeds."""
    return start(config_of(), tmp_path_factory.mktemp("merge") / "run")


def rows(result):
    return {row["row"]: row for row in result.summary["methods"]}


@pytest.mark.slow
def test_the_result_has_every_model_on_every_task_and_seed(finished):
    found = rows(finished)
    assert list(found) == ["individual", "pretrained", *sorted(config_of().merge.methods)]
    for row in found.values():
        assert set(row["tasks"]) == {"turned", "negative"}
        assert len(row["tasks"]["turned"]["values"]) == 2
    assert found["individual"]["normalised_mean"]["mean"] == 1.0
    own, average = found["individual"]["tasks"], found["average"]
    values = average["tasks"]["turned"]["values"]
    assert average["normalised"]["turned"]["values"] == pytest.approx(
        [v / o for v, o in zip(values, own["turned"]["values"], strict=True)]
    )
    means = [np.mean([average["tasks"][t]["values"][i] for t in own]) for i in range(2)]
    assert finished.final["test/average"].values == pytest.approx(means)
    assert found["fisher"]["bytes"] > average["bytes"]
    shapes = {k: np.shape(v) for k, v in found["adamerging"]["coefficients"].items()}
    assert all(shape == (2,) for shape in shapes.values())
    assert not any("head" in name for name in shapes)


@pytest.mark.slow
def test_the_average_is_that_of_the_runs_and_heads_are_kept(finished):
    workdir = finished.workdir
    read = lambda task: models.read(f"{workdir}/tasks/{task}", ("head",), 3, ())
    weights = {task: read(task) for task in ("turned", "negative")}
    body = merging.create("linear")([w.body for w in weights.values()])
    prepared = merge_tasks.prepare(settings.resolve(config_of()), ("*",), jax.devices()[:1], False)
    for task, own in weights.items():
        score = models.evaluate(prepared.tasks[task], "test", own._replace(body=body))
        assert rows(finished)["average"]["tasks"][task]["values"][1] == score["accuracy"]
    individual = models.evaluate(prepared.tasks["turned"], "test", weights["turned"])
    trained = folder.read_result(f"{workdir}/tasks/turned")["final"]["test/accuracy"]["values"]
    assert individual["accuracy"] == pytest.approx(trained[1])


@pytest.mark.slow
def test_a_grids_point_is_chosen_on_validation_and_equals_a_merge_at_that_scale(finished):
    tried = []
    for number, scale in enumerate((0.2, 0.6, 1.0)):
        point = {"name": "task_arithmetic", "scale": scale}
        scores = []
        for seed in (0, 3):
            path = cells.path_of(finished.workdir, "arithmetic", f"point{number}", seed)
            cell = cells.read(path, point)
            assert "test" not in cell.scores
            scores.append(cells.mean(cell.scores["validation"], "accuracy"))
        tried.append(np.mean(scores))
    chosen = rows(finished)["arithmetic"]["keys"]["scale"]
    assert chosen == (0.2, 0.6, 1.0)[int(np.argmax(tried))]


@pytest.mark.parametrize("name", bench.LINEAR_IN_SCALE)
def test_a_scale_stretches_what_is_merged_without_it(name):
    rng = np.random.default_rng(0)
    draw = lambda: {"w": rng.standard_normal((6, 4)).astype(np.float32)}
    base, tuned = draw(), [draw(), draw()]
    whole = merging.create(name)(tuned, base=base)
    scaled = merging.create(name, scale=0.3)(tuned, base=base)
    expected = base["w"] + 0.3 * (whole["w"] - base["w"])
    np.testing.assert_allclose(scaled["w"], expected, atol=1e-6)


@pytest.mark.slow
def test_what_was_killed_goes_on_with_the_same_numbers(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished.workdir, copy)
    before = json.loads((copy / "result.json").read_text())
    (copy / "result.json").unlink()
    folder.write_status(copy, "interrupted")
    for name in ("average", "adamerging", "fisher", "regmean"):
        (copy / "cells" / name / "chosen_seed3.json").unlink()
    (copy / "cells" / "arithmetic" / "point1_seed0.json").unlink()
    (copy / "statistics" / "grams" / "turned_seed3.safetensors").unlink()
    after = start(config_of(), copy).summary
    for old, new in zip(before["methods"], after["methods"], strict=True):
        assert {k: v for k, v in old.items() if k != "seconds"} == {
            k: v for k, v in new.items() if k != "seconds"
        }
    assert "report.html" in {path.name for path in copy.iterdir()}


@pytest.mark.slow
def test_the_report_has_table_radar_and_coefficients(finished):
    page = (Path(finished.workdir) / "report.html").read_text()
    for part in ("Test accuracy, normalised", "coefficients of adamerging", "task_arithmetic"):
        assert part in page


@pytest.mark.slow
def test_runs_that_are_there_are_merged_and_methods_can_be_added(finished, tmp_path):
    tasks = {name: {"run": f"{finished.workdir}/tasks/{name}"} for name in ("turned", "negative")}
    methods = {"average": {"name": "linear"}}
    more = {**methods, "fisher": {"name": "fisher"}}
    base = f"{finished.workdir}/pretrain"
    config = config_of(tasks=tasks, base=base, methods=methods)
    found = start(config, tmp_path / "run")
    assert not (tmp_path / "run" / "tasks").exists()
    assert found.final["test/average"] == finished.final["test/average"]
    assert found.final["test/pretrained"] == finished.final["test/pretrained"]
    again = start(config_of(tasks=tasks, base=base, methods=more), tmp_path / "run")
    assert again.final["test/fisher"] == finished.final["test/fisher"]
    assert again.final["test/average"] == found.final["test/average"]


@pytest.mark.slow
def test_a_merge_of_runs_takes_what_it_does_not_say_from_the_first(tmp_path):
    for name in ("turned", "negative"):
        (tmp_path / name).mkdir()
        part = settings.pretraining(settings.resolve(config_of()), ())
        (tmp_path / name / "config.json").write_text(configs.to_json(part))
    tasks = {name: {"run": str(tmp_path / name)} for name in ("turned", "negative")}
    block = {"tasks": tasks, "base": "x", "methods": {"average": {"name": "linear"}}}
    config = {"program": "merge", "merge": block, "data": digits(rotation=1)}
    resolved = settings.resolve(config)
    assert resolved.model == settings.resolve(config_of()).model
    assert resolved.data.rotation == 1
    with pytest.raises(UserError, match=r"optimizer\.name is missing"):
        settings.resolve({**config, "merge": {**block, "base": ""}})
    (tmp_path / "turned" / "config.json").unlink()
    with pytest.raises(UserError, match=r"merge.tasks.turned: .*no run folder"):
        settings.resolve(config)


def test_check_says_what_a_merge_will_do(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(configs.to_json(config_of()))
    assert cli.main(["check", f"--config={path}", "--compile=false"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "base: 10 steps of its own (pretrain/)",
        "task turned: 10 steps, 2 seeds (tasks/turned/)",
        "each task keeps its own: head/bias, head/kernel",
        "method arithmetic: task_arithmetic, 3 points x 2 seeds",
        "method regmean: regmean, 1 point x 2 seeds; Gram matrices of 32 training examples a task",
        "chosen by the maximum of validation/accuracy, over tasks",
    ):
        assert line in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"one": {}}}, "two tasks or more"),
        ({"methods": {}}, "merge.methods is empty"),
        ({"methods": {"a": {"name": "linnear"}}}, "merge.methods.a.*linear"),
        ({"methods": {"a": {"name": "ties", "densty": 0.1}}}, "density"),
        ({"methods": {"a": {"name": "ties", "density": (0.1, 1.5)}}}, "density = 1.5"),
        ({"methods": {"a": {"name": "weight_matching"}}}, "trained apart"),
        ({"methods": {"individual": {"name": "linear"}}}, "individual"),
        ({"own": ("(",)}, "no regular expression"),
        ({"steps": 0}, "merge.steps = 0"),
        ({"rounds": 0}, "merge.rounds = 0 should be at least 1"),
        ({"rounds": 2, "tasks": {"a": {"run": "x"}, "b": {}}}, "merge.tasks.a is a run"),
        ({"methods": {"a": {"name": "ties", "scale": ()}}}, "merge.methods.a: a grid without"),
        ({"between": {"scale": 0.3}}, "merge.between: name is missing"),
        ({"between": {"name": "linnear"}}, "merge.between: .*linear"),
        ({"between": {"name": "ties", "densty": 0.1}}, "merge.between: .*density"),
        ({"between": {"name": "ties", "density": (0.1, 0.2)}}, "merge.between: a grid"),
        ({"between": {"name": "regmean"}}, "merge.between: regmean needs data"),
        ({"between": {"name": "greedy_soup"}}, "merge.between: greedy_soup needs data"),
        ({"finetune": {"seeds": (1,)}}, "given by merge"),
        ({"finetune": {"optimizer": {"lerning_rate": 1.0}}}, "merge.tasks.*learning_rate"),
        ({"tasks": {"a": {"run": "x", "steps": 3}, "b": {}}}, "give `run` alone"),
    ],
)
def test_mistakes_are_told_before_anything_runs(changes, message):
    with pytest.raises(UserError, match=message):
        settings.resolve(config_of(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "f1"}, "merge.metric = 'f1' isn't measured"),
        ({"tasks": {"a": {"run": "/nowhere"}, "b": {}}}, "merge.tasks.a.*no run folder"),
        ({"tasks": {"a": {"data": digits(classes=(1, 77))}, "b": {}}}, "merge.tasks.a.*77"),
        ({"tasks": {"a": {"model": {"widths": (16, 8)}}, "b": {}}}, "'layers/1/bias' is .8,. in a"),
        ({"own": (".*",)}, "merge.own = .* leaves no parameter to merge"),
        ({"own": ("^head/", "^haed/")}, "merge.own: '.haed/' is found in no name"),
        ({"base": "/nowhere"}, "merge.base = '/nowhere': .*no run folder"),
    ],
)
def test_what_a_stage_refuses_is_told_with_its_name(changes, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        merge_tasks.prepare(settings.resolve(config_of(**changes)), ("*",), None, True)


def test_bodies_that_differ_are_refused_by_path():
    one = models.split({"a": np.zeros(2), "head/b": np.zeros(3)}, OWN)
    other = models.split({"a": np.zeros(3), "head/b": np.zeros(4)}, OWN)
    assert set(names.flatten(one.body)) == {"a"}
    with pytest.raises(UserError, match=r"'a' is .2,. in x and .3,. in y"):
        models.check_fit({"x": one, "y": other})
