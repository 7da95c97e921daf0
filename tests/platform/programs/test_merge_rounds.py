"""The program `merge` in rounds: each starts from the merge of the one before, here by hand."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from lamina.platform import cli, merging
from lamina.platform import config as configs
from lamina.platform.checkpoints import exchange, names
from lamina.platform.errors import UserError
from lamina.platform.multitask import models, rounds, settings
from lamina.platform.multitask.models import Weights
from lamina.platform.programs import merge_tasks
from lamina.platform.reporting import folder
from lamina.platform.run import run
from lamina.platform.training import experiment

OWN = ("^head/",)
TASKS = ("turned", "negative")


def digits(**changes):
    return {"name": "derived", "source": "digits", "batch_size": 64, **changes}


def train_config(**changes):
    return {
        "seeds": (3,),
        "steps": 10,
        "data": digits(),
        "model": {"name": "mlp", "widths": (16, 16)},
        "task": {"name": "classification"},
        "optimizer": {"name": "adamw", "learning_rate": 3e-3},
        "schedule": {"name": "constant"},
        "log_every": 10,
        "steps_per_call": 10,
        "trackers": (),
        **changes,
    }


def config_of(**merge):
    block = {
        "tasks": {
            "turned": {"data": digits(rotation=1)},
            "negative": {"data": digits(invert=True)},
        },
        "finetune": {"init_from_rules": {"exclude": OWN}},  # heads are drawn
        "between": {"name": "task_arithmetic", "scale": 0.8, "normalize": True},
        "methods": {
            "average": {"name": "linear"},
            "arithmetic": {"name": "task_arithmetic", "scale": 0.7},
        },
    }
    return ConfigDict(train_config(program="merge", merge={**block, **merge}))


def start(config, workdir):
    return run(config, workdir, console=False, devices=jax.devices()[:1])


def base_of(workdir):
    return str(Path(workdir).parent / "base.safetensors")


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """A merge of two tasks in two rounds."""
    workdir = tmp_path_factory.mktemp("twice") / "run"
    parts = experiment.assemble(experiment.resolve(train_config()), ("*",), jax.devices()[:1])
    exchange.export_params(base_of(workdir), parts.recipe.model.init(jax.random.key(1))[0])
    return start(config_of(rounds=2, base=base_of(workdir)), workdir)


def bodies(workdir, places):
    return [models.read(f"{workdir}/{place}", OWN, 3, ()) for place in places]


def by_hand(workdir):
    """What the second round should start from: the body, and the models of the first."""
    base = models.read_base(base_of(workdir), OWN, ())
    found = bodies(workdir, [f"tasks/{task}" for task in TASKS])
    body = {}
    for path, leaf in base.body.items():
        deltas = [np.asarray(one.body[path], np.float64) - np.asarray(leaf) for one in found]
        body[path] = np.asarray(leaf) + 0.8 / 2 * (deltas[0] + deltas[1])
    return body, found


def rows(result):
    return {row["row"]: row for row in result.summary["methods"]}


def test_the_first_round_trains_as_a_merge_without_rounds(twice):
    once, rounded = (
        dict(settings.finetunings(settings.resolve(config_of(**more)), ("*",)))
        for more in ({}, {"rounds": 2})
    )
    assert once == rounded
    assert folder.read_config(f"{twice.workdir}/tasks/turned")["data"]["seed"] == 0
    assert twice.summary["steps"] == 40


def test_the_second_round_starts_from_the_merge_of_the_first(twice):
    body, found = by_hand(twice.workdir)
    for task, weights in zip(TASKS, found, strict=True):
        path = f"{twice.workdir}/rounds/2/{task}_seed3.safetensors"
        got = models.read_base(path, OWN, ())
        assert set(got.own) == {"head/bias", "head/kernel"}
        jax.tree.map(np.testing.assert_array_equal, got.own, weights.own)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got.body, body)


def test_a_task_of_the_second_round_is_a_training_from_there(twice, tmp_path):
    path = f"{twice.workdir}/rounds/2/turned_seed3"
    plain = train_config(data=digits(rotation=1, seed=1), init_from=f"{path}.safetensors")
    alone = start(ConfigDict(plain), tmp_path / "alone")
    expected, got = (models.read(where, (), 3, ()).body for where in (alone.workdir, path))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    first = bodies(twice.workdir, ["tasks/turned"])[0].body
    assert any(np.abs(got[name] - first[name]).max() > 1e-3 for name in first)


def test_the_methods_merge_the_last_round_with_task_vectors_of_that_round(twice):
    body, _ = by_hand(twice.workdir)
    found = bodies(twice.workdir, [f"rounds/2/{task}_seed3" for task in TASKS])
    merged = merging.create("task_arithmetic", scale=0.7)([one.body for one in found], base=body)
    prepared = merge_tasks.prepare(settings.resolve(config_of()), ("*",), jax.devices()[:1], False)
    table = rows(twice)
    base = models.read_base(base_of(twice.workdir), OWN, ()).body
    for task, weights in zip(TASKS, found, strict=True):
        for row, expected in (("arithmetic", merged), ("pretrained", base)):
            whole = weights._replace(body=expected)
            score = models.evaluate(prepared.tasks[task], "test", whole)["accuracy"]
            assert table[row]["tasks"][task]["values"][0] == pytest.approx(score, abs=3e-3)
        own = folder.read_result(f"{twice.workdir}/rounds/2/{task}_seed3")
        trained = own["final"]["test/accuracy"]["values"][0]
        assert table["individual"]["tasks"][task]["values"][0] == pytest.approx(trained)


def test_what_was_killed_in_a_round_goes_on_with_the_same_numbers(twice, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(twice.workdir, copy)
    before = json.loads((copy / "result.json").read_text())
    (copy / "result.json").unlink()
    folder.write_status(copy, "interrupted")
    shutil.rmtree(copy / "cells")
    shutil.rmtree(copy / "rounds" / "2" / "negative_seed3")
    (copy / "rounds" / "2" / "turned_seed3.safetensors").unlink()
    after = start(config_of(rounds=2, base=base_of(twice.workdir)), copy).summary
    timeless = lambda row: {k: v for k, v in row.items() if k != "seconds"}
    assert list(map(timeless, after["methods"])) == list(map(timeless, before["methods"]))


def test_the_number_of_rounds_of_a_run_stays(twice):
    config = config_of(rounds=3, base=base_of(twice.workdir))
    with pytest.raises(UserError, match=r"merge\.rounds: 2 -> 3"):
        start(config, twice.workdir)


def test_seeds_that_lie_on_devices_of_their_own_are_refused_in_rounds():
    config = config_of(rounds=2)
    config.seeds, config.mesh = (0, 1), ConfigDict({"seed": 2})
    with pytest.raises(UserError, match=r"merge.tasks.negative: .*mesh.seed should be 1"):
        merge_tasks.prepare(settings.resolve(config), ("*",), jax.devices()[:2], True)


def test_batch_statistics_go_along(tmp_path):
    path = str(tmp_path / "deeper" / "start.safetensors")
    state = {"norm": {"mean": np.ones(3, np.float32)}}
    body, head = {"a/kernel": np.ones(2, np.float32)}, {"head/bias": np.zeros(1, np.float32)}
    rounds.write(path, Weights(body, head, state), {})
    read = models.read_base(path, OWN, ())
    assert set(read.body) == {"a/kernel"}
    assert set(read.own) == {"head/bias"}
    np.testing.assert_array_equal(read.state["norm"]["mean"], state["norm"]["mean"])
    assert "model_state/norm/mean" in names.flatten(exchange.import_tensors(path).tree())


def test_a_round_reads_new_data_and_all_of_its_start():
    given = dict(settings.finetunings(settings.resolve(config_of()), ("*",)))["turned"]
    found = rounds.fine_tuning(given, "x.safetensors", 3, 5)
    changed = configs.difference(configs.thaw(given), configs.thaw(found))
    assert {key: new for key, (_, new) in changed.items()} == {
        "init_from": "x.safetensors",
        "init_from_rules.exclude": (),
        "data.seed": 2,
        "seeds": (5,),
    }


def test_check_lists_the_rounds(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(configs.to_json(config_of(rounds=3)))
    assert cli.main(["check", f"--config={path}", "--compile=false"]) == 0
    line = "rounds 2 to 3: every task and seed again, from the round before merged by"
    assert f"{line} task_arithmetic (rounds/ROUND/TASK_seedSEED/)" in capsys.readouterr().out
