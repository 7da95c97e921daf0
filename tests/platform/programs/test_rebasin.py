"""The program `rebasin`: what it measures, that it goes on where it was, and what it refuses."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from lamina.platform import config as configs
from lamina.platform.errors import UserError
from lamina.platform.merging import barrier, symmetries
from lamina.platform.programs import rebasin
from lamina.platform.programs import table as programs
from lamina.platform.run import run
from lamina.platform.training import trained


def make(**changes):
    config = ConfigDict()
    config.program = "rebasin"
    config.seeds = (3, 1)
    config.steps = 40
    config.data = ConfigDict(dict(name="digits", batch_size=32, seed=0))
    config.model = ConfigDict(dict(name="mlp", widths=(24,)))
    config.task = ConfigDict(dict(name="classification"))
    config.optimizer = ConfigDict(dict(name="adam", learning_rate=3e-3))
    config.schedule = ConfigDict(dict(name="constant", warmup_steps=0))
    config.checkpoint = ConfigDict(dict(every=20))
    config.log_every = 20
    config.steps_per_call = 20
    config.rebasin = ConfigDict(dict(points=5))
    if "model" in changes:
        del config.model  # another one has other keys
    with config.unlocked():
        config.update(changes)
    return config


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("rebasin") / "run"
    return workdir, run(make(), workdir, console=False)


def test_matching_lowers_the_barrier_and_all_is_in_the_result(measured):
    workdir, result = measured
    final = result.final
    assert result.status == "done"
    assert (
        final["validation/loss_barrier_after"].mean < final["validation/loss_barrier_before"].mean
    )
    share = final["validation/loss_barrier_left"]
    assert share.mean == pytest.approx(
        final["validation/loss_barrier_after"].mean / final["validation/loss_barrier_before"].mean
    )
    assert len(share.values) == 2  # a value for each seed, that of its pair
    page = (workdir / "report.html").read_text()
    assert "loss between models" in page
    assert "from seed 3 to 1" in page


def test_the_ends_of_the_lines_are_the_trained_models(measured):
    workdir, result = measured
    (pair,) = result.summary["pairs"]
    own = [
        r for r in _records(workdir / "train") if (r["split"], r["name"]) == ("validation", "loss")
    ]
    last = {r["seed"]: r["value"] for r in own}
    for kind in ("before", "after"):
        line = pair["curves"][kind]["loss"]
        assert [line[0], line[-1]] == pytest.approx([last[3], last[1]], rel=1e-4)


def _records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_middle_is_the_mean_of_the_parameters(measured):
    workdir, result = measured
    (pair,) = result.summary["pairs"]
    trees = [
        symmetries.joined(found.params, found.model_state)
        for found in (trained.read(workdir / "train", seed=seed) for seed in (3, 1))
    ]
    config = rebasin.resolve(make())
    parts = rebasin.prepare(config, configs.EVERYONE, None, True).parts
    source = parts.dataset.splits["validation"]
    batch = {k: np.stack([source[i][k] for i in range(len(source))]) for k in source[0]}
    middle = barrier.interpolate(*trees, 0.5)
    logits = parts.recipe.model.apply(middle, {}, batch["inputs"], train=False)[0].logits
    accuracy = float((np.argmax(logits, -1) == batch["labels"]).mean())
    assert pair["curves"]["before"]["accuracy"][2] == pytest.approx(accuracy, abs=1e-6)


def test_a_run_that_lost_its_end_goes_on_to_the_same_numbers(measured):
    workdir, result = measured
    (workdir / "status.json").write_text(json.dumps({"state": "interrupted"}))
    (workdir / "result.json").unlink()
    (workdir / "pairs" / "3_1.json").unlink()
    again = run(make(), workdir, console=False)
    for name, entry in result.final.items():
        assert again.final[name] == entry, name


def test_another_measurement_is_refused_in_the_same_folder(measured):
    workdir, _ = measured
    with pytest.raises(UserError, match="points"):
        run(make(rebasin=ConfigDict(dict(points=7))), workdir, console=False)


def test_the_folder_is_no_model_and_says_where_its_models_are(measured):
    with pytest.raises(UserError, match=r"of the program 'rebasin'.*its models are in train"):
        trained.read(measured[0])


def test_check_describes_pairs_and_groups():
    config = rebasin.resolve(make(seeds=(0, 1, 5, 6)))
    parts = rebasin.prepare(config, configs.EVERYONE, None, True).parts
    lines = programs.PROGRAMS["rebasin"].describe(config, configs.EVERYONE, parts.dataset)
    assert lines[1] == "seeds 5 and 6: 5 points on validation"
    assert lines[2].startswith("permutes 24 units")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": (0, 1, 2)}, "should be pairs"),
        ({"rebasin": ConfigDict(dict(points=2))}, "points = 2 should be 3 or more"),
        ({"rebasin": ConfigDict(dict(restarts=0))}, "restarts = 0 should be 1"),
        ({"rebasin": ConfigDict(dict(split="exam"))}, "split"),
    ],
)
def test_what_is_wrong_is_told(changes, message):
    with pytest.raises(UserError, match=message):
        rebasin.resolve(make(**changes))


@pytest.mark.slow
def test_batch_norm_is_repaired_along_the_line(tmp_path):
    model = ConfigDict(dict(name="convnet", width=8, stages=2))
    block = ConfigDict(dict(points=5, repair=True, examples=256))
    final = run(make(model=model, steps=60, rebasin=block), tmp_path / "run", console=False).final
    after, repaired = (final[f"validation/loss_barrier_{k}"].mean for k in ("after", "repaired"))
    assert repaired < after
