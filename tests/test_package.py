"""The layout of the repo and of the package: what stands where, and what is declared."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
FOLDERS = ("experiments", "models", "platform", "sharding")
TOP = {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"}
TOP |= {"pyproject.toml", "constraints.txt", "docs", "tests", *FOLDERS}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
ALIASES = {"mlflow": "mlflow-skinny"}
"""Imports whose name tells nothing of their distribution, for those that may not be installed."""

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
ALLOWED = {
    "experiments": {"ml_collections", "lamina.experiments"},
    "models": {"jax", "flax", "numpy", "lamina.models"},
    "sharding": {"jax", "flax", "numpy", "lamina.sharding"},
}
"""What the folders besides the platform may import, apart from the standard library."""


def _files(*suffixes: str) -> list[Path]:
    """Files of the repo, tracked or about to be, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = {Path(name) for name in listing.split("\0") if name}
    there = [file for file in sorted(files) if (ROOT / file).is_file()]
    return [file for file in there if not suffixes or file.suffix in suffixes]


def _sources() -> list[Path]:
    return [file for file in _files(".py") if file.parts[0] in FOLDERS]


def _parse(file: Path) -> ast.Module:
    return ast.parse((ROOT / file).read_text(), str(file))


def _imports(tree: ast.AST, at_import: bool = False) -> Iterator[str]:
    """Modules that the tree names in imports; with `at_import` those outside functions only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import of {node.module} at line {node.lineno}"
            assert node.module
            yield node.module
        elif not (at_import and isinstance(node, ast.FunctionDef)):
            yield from _imports(node, at_import)


@functools.cache
def _installed() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def _distributions(module: str) -> set[str]:
    """Canonical names of the distributions that may provide a top-level module."""
    found = _installed().get(module, [ALIASES.get(module, module)])
    return {canonicalize_name(name) for name in found}


def _requirements(*extras: str) -> dict[str, Requirement]:
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return {canonicalize_name(each.name): each for each in map(Requirement, lines)}


def _third_party(names: Iterator[str]) -> set[str]:
    tops = {name.partition(".")[0] for name in names}
    return tops - {"lamina"} - sys.stdlib_module_names


def test_only_the_agreed_names_stand_at_the_top():
    names = {file.parts[0] for file in _files()}
    assert {name for name in names if not name.startswith(".")} <= TOP


def test_folders_that_would_shadow_others_have_no_init():
    inits = {file for file in _files(".py") if file.name == "__init__.py"}
    assert not inits & {Path(folder, "__init__.py") for folder in FOLDERS}
    assert not [file for file in inits if file.parts[0] == "tests"]


def test_python_at_the_root_finds_the_standard_platform_module():
    code = "import platform; print(platform.system())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_every_package_is_declared_with_its_folder():
    setuptools = PYPROJECT["tool"]["setuptools"]
    folders = {file.parent for file in _sources()} | {Path(folder) for folder in FOLDERS}
    expected = {"lamina." + ".".join(folder.parts): folder.as_posix() for folder in folders}
    assert setuptools["package-dir"] == expected
    assert sorted(setuptools["packages"]) == sorted(expected)


def test_sub_packages_have_an_init():
    folders = {file.parent for file in _sources()} - {Path(folder) for folder in FOLDERS}
    assert [folder for folder in folders if not (ROOT / folder / "__init__.py").exists()] == []


def test_folders_are_marked_as_typed():
    assert all((ROOT / folder / "py.typed").exists() for folder in FOLDERS)


def test_links_for_type_checkers_reach_the_folders():
    for folder in FOLDERS:
        assert (ROOT / ".types" / "lamina" / folder).resolve() == (ROOT / folder).resolve()


def test_imports_carry_the_lamina_prefix():
    for file in _files(".py"):
        for name in _imports(_parse(file)):
            bare = name.partition(".")[0] in {"models", "sharding", "experiments"}
            assert not bare, f"{file} imports {name}"
            assert not name.startswith("platform."), f"{file} imports {name}"


@pytest.mark.parametrize("folder", ALLOWED)
def test_folder_imports_only_what_it_may(folder):
    for file in _sources():
        if file.parts[0] == folder:
            for name in _imports(_parse(file)):
                top = name.partition(".")[0]
                known = any((name + ".").startswith(allowed + ".") for allowed in ALLOWED[folder])
                assert known or top in sys.stdlib_module_names, f"{file} imports {name}"


def test_third_party_imports_are_declared():
    core, everything = _requirements(), _requirements(*PROJECT["optional-dependencies"])
    for file in _sources():
        tree = _parse(file)
        for module in _third_party(_imports(tree, at_import=True)):
            assert _distributions(module) & core.keys(), f"{file}: {module} is no dependency"
        for module in _third_party(_imports(tree)):
            assert _distributions(module) & everything.keys(), f"{file}: {module} is in no extra"


def test_imports_of_tests_are_declared():
    declared = _requirements("dev", "text", "benchmarks").keys()
    for file in _files(".py"):
        # The references are run in environments of their own.
        if file.parts[0] == "tests" and file.parts[1] != "references":
            for module in _third_party(_imports(_parse(file), at_import=True)):
                assert _distributions(module) & declared, f"{file} imports {module}"


def test_constraints_pin_versions_that_the_requirements_allow():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    for name, requirement in _requirements("dev", "docs", "search", "text").items():
        if name != "lamina":
            assert requirement.specifier.contains(pins[name]), f"{requirement}: {pins[name]}"


def test_nothing_imports_tensorflow():
    for file in _files(".py"):
        tops = {name.partition(".")[0] for name in _imports(_parse(file))}
        assert "tensorflow" not in tops, file


def test_no_file_names_a_registry_or_a_machine():
    hosts = [("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "(org|com)"), ("debian", "org")]
    texts = [rf"\b{name}\.{top}\b" for name, top in hosts]
    texts += [r"(?<![\w.~$}])/(root|home|Users|work|opt)/\w"]
    forbidden = re.compile("|".join(texts))
    for file in _files():
        try:
            text = (ROOT / file).read_text()
        except UnicodeDecodeError:
            continue
        found = forbidden.search(text)
        assert not found, f"{file}: {found[0]}"


def test_files_are_short_enough_to_read():
    lengths = {str(file): (ROOT / file).read_text().count("\n") for file in _files(".py")}
    assert {file: length for file, length in lengths.items() if length > 400} == {}


def test_everything_public_has_a_docstring():
    bare = []
    for file in _sources():
        nodes: list[ast.AST] = [_parse(file)]
        for node in nodes:
            name = getattr(node, "name", "")
            if name.startswith("_") or not isinstance(node, DOCUMENTED):
                continue
            if not ast.get_docstring(node):
                bare.append(f"{file}:{getattr(node, 'lineno', 1)} {name}")
            if isinstance(node, ast.Module | ast.ClassDef):
                nodes.extend(node.body)
    assert bare == []


def test_readme_has_the_commands_that_continuous_integration_runs():
    readme, script = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r'^[A-Z]+_COMMAND="(.*)"$', script, re.MULTILINE)
    assert len(commands) == 2
    assert [command for command in commands if command not in readme.splitlines()] == []


def test_help_imports_neither_jax_nor_ml_collections():
    code = """
import atexit, sys
heavy = {"jax", "ml_collections", "flax", "numpy"}
atexit.register(lambda: print("imported:", sorted(heavy & set(sys.modules))))
sys.argv = ["lamina", "--help"]
from lamina.platform.cli import main
sys.exit(main())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("imported: []\n"), run.stdout


@pytest.mark.slow
def test_wheel_holds_the_tree_and_nothing_else(tmp_path):
    for file in _files():
        (tmp_path / "src" / file.parent).mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / file).write_bytes((ROOT / file).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    build = subprocess.run(
        [*command, tmp_path / "src"], capture_output=True, text=True, cwd=tmp_path
    )
    assert build.returncode == 0, build.stdout + build.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {f"lamina/{file.as_posix()}" for file in _files() if file.parts[0] in FOLDERS}
