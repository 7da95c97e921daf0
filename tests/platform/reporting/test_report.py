import base64
import html.parser
import json

import numpy as np
import pytest

from lamina.platform.errors import UserError
from lamina.platform.reporting import charts, curves, folder, records, report, storage
from lamina.platform.reporting.records import Record

HOSTILE = "</style></pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'--><!--$x$"


class Page(html.parser.HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text.append(data.strip())

    def assert_needs_nothing(self):
        assert not self.tags & {"script", "link", "iframe", "object", "base", "form"}
        for name, value in self.attributes:
            assert not name.startswith("on"), (name, value)
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("data:image/png;base64,", "#")), (name, value)


def test_a_report_shows_everything_of_a_finished_run_in_one_small_file(finished_run):
    path = report.render(finished_run)
    text = path.read_text()
    page = Page(text)
    page.assert_needs_nothing()
    assert len(text) < 100_000
    assert text.count("<svg") == 3
    shown = set(page.text)
    result = folder.read_result(finished_run)["final"]["test/accuracy"]
    assert {f"{result['mean']:.4f}", *(f"{value:.4f}" for value in result["values"])} <= shown
    assert {"done", "loss", "accuracy", "log scale", "Worst mistakes", "stem/kernel"} <= shown
    assert {"kernel_h, kernel_w, in_channels, out_channels", "29,066", "4f1c2ab39d07"} <= shown
    assert {"0.001", "file: 0.0003", "34.8k", "3.6 s", "6 arrays"} <= shown
    assert any("-w = 16\n+w = 32" in part for part in shown)


def test_a_report_is_the_same_for_the_same_files(finished_run):
    assert report.build(finished_run) == report.build(finished_run)


def test_a_report_follows_the_readers_light_or_dark_theme(finished_run):
    text = report.build(finished_run)
    svg = text[text.index("<svg") : text.rindex("</svg>")]
    assert "prefers-color-scheme: dark" in text
    assert "var(--s0)" in svg
    assert "#" not in svg.replace("url(#", "").replace('href="#', "")  # no fixed colour is left


@pytest.mark.parametrize("last", range(6))
def test_a_report_is_made_of_whatever_files_there_are(tmp_path, make, last):
    make.run(tmp_path / "run")
    for name in ("result", "parameters", "manifest", "config", "status", "metrics")[: last + 1]:
        file = f"{name}.jsonl" if name == "metrics" else f"{name}.json"
        (tmp_path / "run" / file).unlink()
    page = Page(report.build(tmp_path / "run"))
    assert ("Nothing is recorded yet." in page.text) == (last >= 5)
    assert "Newest numbers" in page.text


def test_a_report_of_an_empty_folder_says_that_the_run_is_new(tmp_path):
    assert {"new", "Nothing is recorded yet."} <= set(Page(report.build(tmp_path)).text)


def test_a_diverged_seed_is_named_and_has_no_mean(tmp_path, make):
    entries = [
        entry._replace(value=None) if entry.seed == 1 and entry.step > 300 else entry
        for entry in make.records()
        if entry.split == "train"
    ]
    (tmp_path / folder.METRICS).write_bytes(records.lines(entries))
    folder.write_status(tmp_path, "diverged", "the loss of seed 1 is not finite")
    shown = Page(report.build(tmp_path)).text
    assert "train: seed 1 is not finite at step 310" in shown
    assert "the loss of seed 1 is not finite" in shown
    assert "–" in shown  # noqa: RUF001


def test_a_run_without_a_finite_value_still_has_a_report(tmp_path):
    entries = [Record(step, "train", "loss", None) for step in (1, 2, 3)]
    (tmp_path / folder.METRICS).write_bytes(records.lines(entries))
    assert "train: seed 0 is not finite at step 1" in Page(report.build(tmp_path)).text


def test_hostile_strings_stay_text_everywhere(tmp_path, make):
    make.run(tmp_path / "run")
    run = tmp_path / "run"
    config = {**make.config(), "name": HOSTILE, HOSTILE: HOSTILE, "model": {"name": HOSTILE}}
    folder.write_config(run, json.dumps(config), defaults=json.dumps({"model": {"name": "<b>"}}))
    entries = [
        Record(step, split, name, 0.5 / step, seed)
        for step in (1, 2)
        for split in (HOSTILE, "train")
        for name in (HOSTILE, "loss")
        for seed in (0, 1)
    ]
    (run / folder.METRICS).write_bytes(records.lines(entries))
    storage.write_json(run / folder.STATUS, {"state": HOSTILE, "message": HOSTILE})
    folder.write_result(run, {"final": records.summarise(entries), HOSTILE: HOSTILE, "x": HOSTILE})
    activation = {"axes": [HOSTILE], "shape": [1], "sharding": HOSTILE}
    parameter = {"path": HOSTILE, "shape": [1], "axes": [HOSTILE]}
    folder.write_parameters(run, [parameter], [activation])
    folder.write_samples(
        run, [{"title": HOSTILE, "text": HOSTILE}, {"title": "i", "png_base64": HOSTILE}]
    )
    storage.write_json(
        run / folder.MANIFEST,
        {"command": [HOSTILE], "git": {"diff": HOSTILE}, "packages": {HOSTILE: HOSTILE}},
    )
    text = report.build(run)
    page = Page(text)
    page.assert_needs_nothing()
    assert "onerror" in " ".join(page.text)  # it is there, as text
    assert text.count("</style>") == 1
    assert "img" not in page.tags


def test_a_corrupt_file_is_named(finished_run):
    (finished_run / folder.PARAMETERS).write_text("[")
    with pytest.raises(UserError, match=folder.PARAMETERS):
        report.render(finished_run)


def test_a_report_shows_where_activations_lie_if_there_are_several_devices(tmp_path):
    row = {
        "axes": ["batch", "", "heads"],
        "shape": [1648],
        "dtype": "bfloat16",
        "before": "tensor P",
        "sharding": "data S(0), tensor B",
        "bytes": 4096,
    }
    folder.write_parameters(tmp_path, [], [row])
    text = report.build(tmp_path)
    assert "<h2>Activations</h2>" in text
    for part in ("batch, -, heads", "1648", "bfloat16", "tensor P", "tensor B", "4 KiB"):
        assert part in text
    folder.write_parameters(tmp_path / "one", [])
    assert "Activations" not in report.build(tmp_path / "one")


def test_a_report_stays_small_however_much_there_is_to_show(tmp_path):
    entries = [
        Record(step, f"task_{task}", f"metric_{name}", float(np.sin(step * task + name)))
        for name in range(40)
        for task in range(5)
        for step in range(0, 200)
    ]
    (tmp_path / folder.METRICS).write_bytes(records.lines(entries))
    image = base64.b64encode(bytes(1000)).decode()
    folder.write_samples(tmp_path, [{"title": "t", "png_base64": image, "text": "x" * 9000}] * 50)
    rows = [{"path": f"layer/{row}", "shape": [row, 2], "bytes": 8 * row} for row in range(5000)]
    folder.write_parameters(tmp_path, rows)
    text = report.build(tmp_path)
    assert len(text) < 330_000
    assert "Not drawn, to keep this page small: metric_" in text
    assert f"{2 * sum(range(5000)):,}" in text  # totals count the rows that are left out


def test_thinning_keeps_ends_and_extremes():
    steps = np.arange(10_000)
    mean = np.zeros(10_000)
    mean[4321] = 9.0
    curve = curves.Curve(steps, mean, np.zeros(10_000), 1)
    thinned = curves.thin(curve)
    assert len(thinned.steps) <= curves.POINTS + 2
    assert {0, 4321, 9999} <= set(thinned.steps.tolist())


def test_curves_are_mean_and_sample_deviation_over_the_seeds_that_are_finite():
    logged = [
        Record(1, "train", "loss", 1.0, 0),
        Record(1, "train", "loss", 3.0, 5),
        Record(2, "train", "loss", 2.0, 0),
        Record(2, "train", "loss", None, 5),
        Record(3, "train", "loss", None, 5),
    ]
    curve = curves.collect(logged)["loss"]["train"]
    assert curve.steps.tolist() == [1, 2, 3]
    np.testing.assert_allclose(curve.mean, [2.0, 2.0, np.nan])
    np.testing.assert_allclose(curve.std, [np.sqrt(2), 0, 0])
    assert (curve.seeds, curve.lost, curve.last) == (2, ((5, 2),), None)


@pytest.mark.parametrize(
    ("mean", "log"), [([2.3, 0.05], True), ([0.1, 0.99], False), ([1e-3, 0.0], False), ([], False)]
)
def test_a_log_axis_is_for_positive_curves_over_a_wide_range(mean, log):
    curve = curves.Curve(np.arange(len(mean)), np.array(mean), np.zeros(len(mean)), 1)
    assert curves.wants_log([curve]) is log


def test_labels_move_apart_in_order_and_stay_on_the_chart():
    found = charts.spread([0.99, 0.98, 1.0, 0.1], 0.1)
    ordered = sorted(found)
    assert found[1] < found[0] < found[2]
    assert min(np.diff(ordered)) >= 0.1 - 1e-9
    assert max(found) <= 1.0
    assert found[3] == pytest.approx(0.1)
    assert charts.spread([0.0, 0.01], 0.2, low=0.1) == pytest.approx([0.1, 0.3])
