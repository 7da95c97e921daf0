"""Learners x streams: a run for each, resumed cell by cell, and compared seed by seed."""

import json
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict

from lamina.experiments.incremental import benchmark
from lamina.platform.errors import UserError
from lamina.platform.incremental import metrics
from lamina.platform.programs import benchmark as programs
from lamina.platform.programs import incremental
from lamina.platform.reporting.compare import paired


def small(**keys):
    config = benchmark.get_config("finetune+er")
    config.seeds, config.stream.epochs, config.stream.experiences = (0, 1), 1, 2
    config.model.widths = (8,)
    config.benchmark.streams = ("class_incremental",)
    config.benchmark.stream_options = ConfigDict()
    config.benchmark.update(keys)
    return config


@pytest.mark.slow
def test_cells_are_runs_and_the_table_compares_them_seed_by_seed(train, tmp_path, monkeypatch):
    result = train(small())
    root = tmp_path / "run"
    finetune, er = (np.load(root / f"cells/class_incremental/{n}/accuracy.npy") for n in NAMES)
    means = [a[:, -1].mean(-1) for a in (finetune, er)]
    first, second = result.summary["table"]
    np.testing.assert_allclose([first["mean"], second["mean"]], [m.mean() for m in means])
    np.testing.assert_allclose(first["error"], means[0].std(ddof=1) / np.sqrt(2))
    expected = paired(*({s: float(v) for s, v in enumerate(m)} for m in means[::-1]))
    assert (second["difference"], second["p"]) == pytest.approx((expected.difference, expected.p))
    assert "difference" not in first
    page = (root / "comparisons" / "class_incremental.html").read_text()
    assert "final_average_accuracy" in page
    # A cell that is removed from a benchmark, be it done, is run again, the others aren't.
    shutil.rmtree(root / "cells/class_incremental/er")
    ran, real = [], incremental.run

    def counted(prepared, context):
        ran.append(context.workdir.rpartition("/")[2])
        return real(prepared, context)

    monkeypatch.setattr(incremental, "run", counted)
    again = train(small())
    assert ran == ["er"]
    assert train(small()).final == again.final
    assert ran == ["er"]
    assert again.final["class_incremental/er"].values == result.final["class_incremental/er"].values


NAMES = ("finetune", "er")


@pytest.mark.slow
def test_intransigence_is_against_the_model_of_all_data_so_far(tmp_path):
    tensors = np.random.default_rng(0).random((2, 2, 3, 3))
    for name, accuracy in zip(("finetune", "cumulative"), tensors, strict=True):
        root = tmp_path / "cells/class_incremental" / name
        root.mkdir(parents=True)
        final = {m: {"mean": 1.0, "std": 0.0, "values": [1.0, 1.0]} for m in metrics.METRICS}
        result = {"final": final, "accuracy": {"ends": [0, 1, 2]}}
        (root / "result.json").write_text(json.dumps(result))
        np.save(root / "accuracy.npy", accuracy)
    config = small(learners=("finetune", "cumulative"), metric="intransigence")
    config.benchmark.learner_options = ConfigDict()
    resolved = programs.resolve(config)
    prepared = programs.Prepared(None, resolved, programs.cells(resolved, ("*",)), None, None)
    found = programs.summarise(prepared, str(tmp_path))
    gaps = np.diagonal(tensors[1] - tensors[0], axis1=1, axis2=2).mean(-1)
    values = found["final"]["class_incremental/finetune"]["values"]
    np.testing.assert_allclose(values, gaps)
    assert found["table"][0]["intransigence"] == pytest.approx(gaps.mean())
    assert found["final"]["class_incremental/cumulative"]["values"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"learners": ()}, "benchmark.learners = .* at least one"),
        ({"learners": ("er", "er")}, "should be different names"),
        ({"learners": ("finetune",)}, "learner_options.er: 'er' is none of benchmark.learners"),
        ({"metric": "accuracy"}, "benchmark.metric = 'accuracy' should be one of"),
        ({"streams": ("online",), "learners": ("er",)}, "er on online: .* needs to know where"),
        ({"streams": ("split",)}, "finetune on split: .*unknown"),
    ],
)
def test_what_is_wrong_is_named_before_there_is_a_folder(keys, message, train, tmp_path):
    with pytest.raises(UserError, match=f"(?s){message}"):
        train(small(**keys))
    assert not (tmp_path / "run").exists()
