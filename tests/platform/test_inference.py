"""Restored models predict what the run measured."""

import os
import shutil

import numpy as np
import pytest

from lamina.platform.data.digits import digits
from lamina.platform.errors import UserError
from lamina.platform.inference import restore


@pytest.fixture(scope="module")
def test_split():
    return digits().splits["test"].arrays


@pytest.mark.parametrize("seed", [4, 2])
def test_a_restored_model_predicts_with_the_accuracy_of_the_run(finished, test_split, seed):
    model = restore(finished.workdir, seed=seed)
    accuracy = (model.predict(test_split["inputs"]) == test_split["labels"]).mean()
    place = finished.seeds.index(seed)
    assert accuracy == pytest.approx(finished.final["test/accuracy"].values[place], abs=1e-6)


def test_predictions_do_not_depend_on_the_batch_size(finished, test_split):
    model = restore(finished.workdir)
    inputs = test_split["inputs"][:50]
    np.testing.assert_array_equal(model.predict(inputs), model.predict(inputs, batch_size=7))


def test_a_run_is_found_by_a_relative_path_and_a_checkpoint_by_its_folder(finished, monkeypatch):
    monkeypatch.chdir(os.path.dirname(finished.workdir))
    name = os.path.basename(finished.workdir)
    assert restore(name).trained.step == 10
    assert restore(f"{name}/checkpoints/5").trained.step == 5
    monkeypatch.chdir(name)
    assert restore("checkpoints/5").trained.step == 5
    assert restore(".", step=5).trained.seed == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 3}, r"has no seed 3: its seeds are \(4, 2\)"),
        ({"step": 7}, r"no checkpoint of step 7 .*\(steps: 5, 10\)"),
    ],
)
def test_what_a_run_does_not_have_is_refused_with_what_it_has(finished, arguments, message):
    with pytest.raises(UserError, match=message):
        restore(finished.workdir, **arguments)


def test_a_folder_without_a_run_or_a_checkpoint_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        restore(tmp_path / "nowhere")
    shutil.copy(f"{finished.workdir}/config.json", tmp_path)
    with pytest.raises(UserError, match="there is no checkpoint"):
        restore(tmp_path)


def test_inputs_of_another_shape_are_refused(finished, test_split):
    model = restore(finished.workdir)
    with pytest.raises(UserError, match=r"takes inputs \[B, 8, 8, 1\], not \[8, 8, 1\]"):
        model(test_split["inputs"][0])
    with pytest.raises(UserError, match="no examples"):
        model.predict(test_split["inputs"][:0])
    with pytest.raises(UserError, match="needs the model 'transformer', not 'mlp'"):
        model.generate("text")


def test_an_added_seed_is_restored_from_its_own_checkpoints(tiny_run, tmp_path):
    tiny_run(tmp_path / "run", steps=5)
    tiny_run(tmp_path / "run", steps=5, seeds=(0, 3))
    alone = tiny_run(tmp_path / "alone", steps=5, seeds=(3,))
    added, wanted = restore(tmp_path / "run", seed=3), restore(alone.workdir)
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(
            added.trained.params["head"][name], wanted.trained.params["head"][name]
        )
    assert restore(tmp_path / "run").trained.seed == 0


def test_two_runs_follow_one_another_in_one_process(tiny_run, tmp_path):
    first = tiny_run(tmp_path / "first", steps=5)
    second = tiny_run(tmp_path / "second", steps=5)
    plain = lambda result: [r._replace(time=0.0) for r in result.metrics]
    assert plain(first) == plain(second)
