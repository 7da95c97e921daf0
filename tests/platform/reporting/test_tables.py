import doctest
import html.parser
import importlib
import io
import pathlib
import subprocess
import sys

import pytest

from lamina.platform.reporting import console, folder, notebook, records, storage, tables
from lamina.platform.reporting.records import Record


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_plain_table_aligns_numbers_to_the_right_and_is_never_cut():
    table = tables.Table(("name", ">value"), [("a" * 200, "1.5"), ("b", "10.25")], ("sum", "11.75"))
    lines = tables.text(table).splitlines()
    assert lines[2] == "a" * 200 + "    1.5"
    assert lines[3] == "b" + " " * 199 + "  10.25"
    assert lines[5] == "sum" + " " * 197 + "  11.75"


def test_a_terminal_gets_a_drawn_table_and_a_file_plain_text(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    table = tables.Table(("[red]run", ">value"), [("[bold]x", "1")])
    terminal, file = Terminal(), io.StringIO()
    tables.show(table, terminal)
    tables.show(table, file)
    assert "─" in terminal.getvalue()
    assert "[bold]x" in terminal.getvalue()
    assert file.getvalue() == "[red]run  value\n--------  -----\n[bold]x       1\n"


def test_the_parameter_table_has_totals(finished_run):
    rows = storage.read_json(finished_run / folder.PARAMETERS)
    table = tables.parameter_table(rows)
    assert table.rows[0][:2] == ("stem/kernel", "3 × 3 × 1 × 32")  # noqa: RUF001
    assert table.footer == ("6 arrays", "", "", "", "", "29,066", "114 KiB")
    assert tables.parameter_table([]).footer[-2:] == ("0", "0 B")


def test_the_runs_table_shows_test_numbers_first(finished_run):
    (row,) = tables.runs_table(folder.list_runs(finished_run)).rows
    assert row[:4] == (".", "done", "train", "600/600")
    assert row[-1].startswith("test/loss 0.0820")
    assert "test/accuracy 0.97" in row[-1]


def test_the_result_table_has_a_column_per_seed():
    final = {"test/accuracy": {"mean": 0.95, "std": 0.0123, "values": [0.94, 0.96]}}
    table = tables.result_table(final, seeds=(3, 7))
    assert table.columns == ("metric", ">mean", ">std", ">seed 3", ">seed 7")
    assert table.rows == [("test/accuracy", "0.9500", "0.0123", "0.9400", "0.9600")]
    assert tables.result_table(final).rows == [("test/accuracy", "0.9500")]


def test_a_notebook_shows_the_numbers_and_one_curve_as_well_formed_html(make):
    entries = make.records()
    text = notebook.result_html(records.summarise(entries), entries, title="<b>&")
    assert "&lt;b&gt;&amp;" in text
    assert "test accuracy" in text
    assert text.count("<polyline") == 1
    assert "validation loss" in text
    assert len(text) < 4000
    opened = []

    class Balance(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Balance().feed(text)
    assert not opened


def test_a_sparkline_takes_the_wanted_curve_and_needs_two_finite_points(make):
    assert "train accuracy" in notebook.sparkline(make.records(), ("train", "accuracy"))
    assert notebook.sparkline([Record(1, "a", "x", 1.0), Record(2, "a", "x", None)]) == ""
    flat = [Record(step, "a", "x", 1.0) for step in (1, 2, 3)]
    assert "nan" not in notebook.sparkline(flat)


EXAMPLES = ["charts", "clock", "compare", "console", "formats", "page", "protocol", "records"]


@pytest.mark.parametrize("name", [*EXAMPLES, "storage"])
def test_the_examples_in_the_docstrings_are_true(name):
    found = doctest.testmod(importlib.import_module(f"lamina.platform.reporting.{name}"))
    assert found.attempted > 0
    assert found.failed == 0


def test_reporting_is_quick_to_import():
    modules = sorted(path.stem for path in pathlib.Path(console.__file__).parent.glob("*.py"))
    program = "import sys, importlib\n" + "".join(
        f"importlib.import_module('lamina.platform.reporting.{name}')\n"
        for name in modules
        if name != "__init__"
    )
    slow = "('jax', 'matplotlib', 'jinja2', 'rich', 'scipy', 'tensorboardX', 'etils', 'wandb')"
    program += f"print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"
