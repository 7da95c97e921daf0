import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(page.name for page in DOCS.glob("*.md"))
TRAINING = ("own_data.md", "own_model.md", "python.md", "training.md")
"""Pages whose blocks train: a quarter of a minute each."""


@pytest.fixture
def vocabulary():
    spec = importlib.util.spec_from_file_location("vocabulary", DOCS / "vocabulary.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_configs_are_those_of_the_code(vocabulary):
    page = (DOCS / "configs.md").read_text()
    assert page == vocabulary.updated(page), "run `python docs/vocabulary.py`"


def test_every_key_of_a_training_config_is_explained(vocabulary):
    from lamina.platform.config import options
    from lamina.platform.training.experiment import SCHEMA

    page = (DOCS / "configs.md").read_text()
    sections = dict(re.findall(r"\n### (.*?)\n(.*?)(?=\n### |\Z)", page, re.DOTALL))
    blocks = {f"`{name}`": factory for name, factory in SCHEMA.blocks.items()}
    shared = {f"`{name}`": kind.shared for name, kind in SCHEMA.kinds.items() if kind.shared}
    for title, factory in {"Top-level keys": SCHEMA.settings, **blocks, **shared}.items():
        explained = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", sections[title], re.M))
        for key in options(factory):
            assert explained.get(key), f"{title}: {key} is not explained"
    for name, kind in SCHEMA.kinds.items():
        for entry in kind.table:
            assert f"`{entry}`" in sections[f"`{name}`"], f"{name}.name = {entry!r} is not there"


def test_the_readme_counts_what_the_tables_have():
    from lamina.platform.incremental.learners import LEARNERS
    from lamina.platform.merging.table import MERGERS
    from lamina.platform.optimizers.table import OPTIMIZERS

    page = " ".join((ROOT / "README.md").read_text().split())
    learners = set(LEARNERS) - {"chain"}
    assert f"{len(OPTIMIZERS)} optimizers" in page
    assert f"{len(MERGERS)} ways to merge models" in page
    assert f"{len(learners)} incremental learners that chain" in page


@pytest.mark.parametrize("name", [*PAGES, "../README.md"])
def test_links_between_pages_lead_somewhere(name):
    page = DOCS / name
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        if target.startswith("api/"):
            module = ROOT / target.removeprefix("api/").removesuffix("/index.md")
            assert module.with_suffix(".py").is_file() or module.is_dir(), target
        else:
            assert (page.parent / target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in TRAINING else ())
        for name in PAGES
        if "<!-- runs" in (DOCS / name).read_text()
    ],
)
def test_what_a_page_shows_runs(name, tmp_path):
    # As a user runs it: on one device, and without the tests' stricter rules for arrays.
    strict = ("XLA_FLAGS", "JAX_NUMPY_RANK_PROMOTION")
    environment = {key: value for key, value in os.environ.items() if key not in strict}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "run_page.py"), str(DOCS / name)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert not done.stdout.endswith("\n0 blocks\n")
