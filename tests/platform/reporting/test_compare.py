import numpy as np
import pytest
from scipy import stats

from lamina.platform.errors import UserError
from lamina.platform.reporting import compare, folder


def test_the_paired_test_agrees_with_scipy():
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 6))
    found = compare.paired(dict(enumerate(one)), dict(enumerate(two)))
    expected = stats.ttest_rel(one, two)
    assert found.n == 6
    assert found.p == pytest.approx(expected.pvalue)
    assert found.difference / found.error == pytest.approx(expected.statistic)


def test_only_seeds_that_both_runs_have_are_paired():
    found = compare.paired({0: 1.0, 1: 2.0, 2: None, 5: 9.0}, {1: 1.5, 0: 0.0, 2: 3.0, 7: 1.0})
    assert (found.n, found.difference) == (2, 0.75)


@pytest.mark.parametrize(
    ("run", "baseline", "expected"),
    [
        ({0: 1.0}, {0: 0.5}, (1, 0.5, None, None)),
        ({0: 1.0}, {1: 0.5}, (0, None, None, None)),
        ({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}, (2, 0.0, 0.0, None)),
        ({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5}, (2, 0.5, 0.0, None)),
    ],
)
def test_there_is_no_p_value_without_two_pairs_that_differ_differently(run, baseline, expected):
    assert compare.paired(run, baseline) == expected


def test_a_comparison_shows_curves_numbers_and_only_what_differs(tmp_path, make):
    make.run(tmp_path / "plain")
    make.run(tmp_path / "tuned", learning_rate=3e-3, gain=0.006)
    path = compare.compare([tmp_path / "plain", tmp_path / "tuned"], tmp_path / "compare.html")
    text = path.read_text()
    assert len(text) < 150_000
    assert text.count("<svg") == 5  # loss and accuracy of two splits, and the learning rate
    assert "optimizer.learning_rate" in text
    assert "<td>0.003</td>" in text
    assert "batch_size" not in text
    values = [folder.read_result(tmp_path / name)["final"] for name in ("plain", "tuned")]
    one, two = (final["test/accuracy"]["values"] for final in values)
    assert f"+{np.mean(two) - np.mean(one):.4g}"[:6] in text
    assert compare.p_value(float(stats.ttest_rel(two, one).pvalue)).replace("<", "&lt;") in text


def test_runs_of_other_metrics_and_without_records_can_stand_side_by_side(tmp_path, make):
    make.run(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    text = compare.build([tmp_path / "full", tmp_path / "empty"])
    assert "new, 1 seed" in text


def test_hostile_names_stay_text(tmp_path, make):
    hostile = tmp_path / "<img src=x onerror=alert(1)>"
    make.run(hostile)
    make.run(tmp_path / "b", learning_rate=1.0)
    text = compare.build([hostile, tmp_path / "b"])
    assert "<img" not in text
    assert "&lt;img src=x" in text


def test_labels_are_the_shortest_that_differ():
    assert compare.labels(["r/a", "r/b"]) == ["a", "b"]
    assert compare.labels(["x/run", "y/run"]) == ["x/run", "y/run"]
    assert compare.labels(["x/run", "x/run"]) == ["run (1)", "run (2)"]


def test_a_comparison_needs_two_run_folders(tmp_path):
    with pytest.raises(UserError, match="two runs"):
        compare.build([tmp_path])
    with pytest.raises(UserError, match="nowhere"):
        compare.build([tmp_path, tmp_path / "nowhere"])


def test_a_comparison_shows_the_speeds_that_runs_know(make, tmp_path):
    first, second = make.run(tmp_path / "a"), make.run(tmp_path / "b")
    page = compare.build([first, second])
    assert page.count("<td>41.3%</td>") == page.count("<td>42.3%</td>") == 2
    assert "tokens a second" not in page
