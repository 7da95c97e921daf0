"""The command line: what it says of mistakes, with which exit code, and that it leaves nothing."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys

import pytest

from lamina.platform import cli


@pytest.fixture
def lamina(capsys):
    """Returns `lamina(*arguments)`: exit code, output, error output."""

    def call(*arguments):
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished.workdir, tmp_path / "copy")


def files(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["list"], ["--version"]])
def test_help_imports_neither_jax_nor_ml_collections(arguments, tmp_path):
    program = (
        "import sys; from lamina.platform import cli; code = cli.main(sys.argv[1:]);"
        "print(sorted({'jax', 'ml_collections', 'flax'} & set(sys.modules))); sys.exit(code)"
    )
    if arguments == ["list"]:
        program = program.replace("'ml_collections', ", "")
    found = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "[]"


def test_each_command_has_help(lamina):
    for command in cli.COMMANDS:
        code, out, _ = lamina(command, "--help")
        assert code == 0
        assert f"lamina {command}" in out


def test_the_version_is_that_of_the_package(lamina):
    assert lamina("--version") == (0, f"lamina {importlib.metadata.version('lamina')}\n", "")


def test_nothing_and_a_wrong_command_show_what_there_is(lamina):
    assert lamina()[0] == 2
    code, out, error = lamina("rnu")
    assert (code, out) == (2, "")
    assert "no command 'rnu' (did you mean 'run'?)" in error


# --- mistakes in the command and in the config ----------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.modle.name=mlp"], "modle is not a key (did you mean 'model'?)"),
        (["--config.model.width=3"], "model.width is not a key (did you mean 'widths'?)"),
        (["--config.model.name=mpl"], "model.name = 'mpl' is unknown (did you mean 'mlp'?)"),
        (["--config.model.name=mlp,vit"], "sweep.space.model.name = ('mlp', 'vit')"),
        (
            ["--config.optimizer.lr=0.1"],
            "optimizer.lr is not a key (did you mean 'learning_rate'?)",
        ),
        (["--config.data.batch_size=100000"], "hold each of them 93 times; use at most 1078"),
        (["--config.steps=many"], "steps = 'many' should be an int"),
        (["--config.seeds=()"], "seeds is empty"),
        (["--config.seeds=1,1"], "holds a value twice"),
        (["--config.log_every=7"], "log_every = 7 is no multiple of steps_per_call = 5"),
        (["--config.model=mlp"], "model is a block; set one of model.name, model.widths"),
        (["--config.steps.x=1"], "steps is a value, not a block"),
        (["--config.program=trian"], "program = 'trian' is unknown"),
        (["--config.mesh.data=3"], "data=3 needs 3 devices, but there are 8"),
        (["--config.data.batch_size=60"], "batch_size = 60 doesn't divide by 8"),
        (["--config.data.name=fashion_mnist", "--config.data.data_dir=."], "is not in ."),
        (["--config.data.name=tfds", "--config.data.dataset=mnist"], "mnist is not prepared"),
        (["--config.trackers=('tensorbored',)"], "'tensorbored' is unknown"),
        (
            ["--config.checkpoint.best=validation/acc", "--config.evaluation.every=5"],
            "one of validation/accuracy",
        ),
        (
            ["--config.early_stopping.metric=validation/acc", "--config.evaluation.every=5"],
            "isn't measured: one of",
        ),
        (["--config.evaluators.more.every=5"], "evaluators.more: config: data.name is missing"),
        (["--config.init_from=nowhere"], "nowhere is no run folder"),
        (["--stpes=3"], "Unknown command line flag 'stpes'"),
        (["extra"], "'extra' is no flag"),
        (["--num_processes=2"], "go together"),
    ],
)
def test_a_mistake_is_told_with_exit_code_2_and_leaves_no_folder(
    lamina, tiny_config, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAMINA_DATA_DIR", str(tmp_path / "no_data"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no_data"))
    workdir = tmp_path / "run"
    code, _, error = lamina("run", f"--config={tiny_config()}", f"--workdir={workdir}", *arguments)
    assert (code, message in error) == (2, True), error
    assert error.startswith("lamina run: ")
    assert not workdir.exists()


def test_all_mistakes_of_a_config_are_told_at_once(lamina, tiny_config, tmp_path):
    _, _, error = lamina(
        "run",
        f"--config={tiny_config()}",
        f"--workdir={tmp_path / 'run'}",
        "--config.stepz=1",
        "--config.optimizer.lr=1",
        "--config.model.name=mpl",
    )
    assert "3 mistakes" in error
    assert "model.name = 'mpl' is unknown" in error
    assert "stepz" in error
    assert "optimizer.lr" in error


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.py", b"def get_config(:\n", "SyntaxError"),
        ("a.py", b"steps = 1\n", "has no get_config()"),
        ("a.py", b"def get_config(): 1 / 0\n", "ZeroDivisionError"),
        ("a.py", b"def get_config(): return None\n", "not a ConfigDict"),
        (
            "a.py",
            b"from ml_collections import ConfigDict, config_dict\n"
            b"def get_config(): return ConfigDict({'a': config_dict.required_placeholder(int)})\n",
            "RequiredValueError",
        ),
        ("a.json", b'{"steps": 1', "is not valid JSON"),
        ("a.json", b"\xff\xfe{}", "is not valid JSON"),
        ("a.json", b"[1]", "should hold a JSON object"),
        ("a.json", b'{"steps": null}', "steps is None"),
        ("a.json", b'{"steps": Infinity}', "not finite"),
    ],
)
def test_a_config_file_that_cannot_be_used_is_named(lamina, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    code, _, error = lamina("run", f"--config={tmp_path / name}", f"--workdir={tmp_path / 'run'}")
    assert (code, message in error) == (2, True), error
    assert not (tmp_path / "run").exists()


def test_a_config_that_is_not_there_is_told_with_the_nearest(lamina, tmp_path):
    for given, message in (
        ("quickstrat", "did you mean 'quickstart'?"),
        ("gone.py", "there is no file gone.py"),
        ("quickstart:big", "takes no argument"),
        ("", "--config is empty"),
    ):
        code, _, error = lamina("run", f"--config={given}", f"--workdir={tmp_path / 'run'}")
        assert (code, message in error) == (2, True), error


def test_the_code_that_a_json_config_names_is_not_run_without_trust(
    lamina, tiny_config, tmp_path, monkeypatch
):
    (tmp_path / "their_code.py").write_text(
        "print('their code runs')\nfrom lamina.models.mlp import mlp\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = tiny_config(
        model={"name": "their_code:mlp", "widths": (8,)}, data={"name": "digits", "batch_size": 64}
    )
    command = ["run", f"--config={path}", f"--workdir={tmp_path / 'run'}"]
    code, out, error = lamina(*command)
    assert code == 2
    assert "--trust=their_code" in error
    assert "their code runs" not in out
    assert not (tmp_path / "run").exists()
    code, out, _ = lamina(*command, "--trust=their_code")
    assert code == 0
    assert "their code runs" in out


# --- run folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/nowhere/run"])
def test_a_folder_that_cannot_be_written_is_named(lamina, tiny_config, tmp_path, place):
    (tmp_path / "file").write_text("not a folder")
    workdir = tmp_path / place
    code, _, error = lamina(
        "run",
        f"--config={tiny_config(data={'name': 'digits', 'batch_size': 64})}",
        f"--workdir={workdir}",
    )
    assert code == 2
    assert str(workdir) in error


def test_the_config_of_another_run_is_refused_with_the_difference(lamina, finished):
    from pathlib import Path

    folder = Path(finished.workdir)
    before = files(folder)
    config = f"--config={folder / 'config.json'}"
    for change, message in (
        ("--config.model.widths=(9,)", "model.widths: (8,) -> (9,)"),
        ("--config.seeds=4", "seeds: (4, 2) -> (4,)"),
        ("--config.steps=5", "steps: 10 -> 5"),
    ):
        code, _, error = lamina("run", config, f"--workdir={folder}", change)
        assert (code, message in error) == (2, True), error
        assert "go on with the old config" in error
        assert lamina("check", config, f"--workdir={folder}", change)[0] == 2
    assert files(folder) == before


def test_a_finished_run_prints_its_result_again(lamina, copy):
    before = files(copy)
    code, out, _ = lamina("run", f"--config={copy / 'config.json'}", f"--workdir={copy}")
    assert code == 0
    assert "test/accuracy" in out
    assert files(copy) == before


@pytest.mark.parametrize("name", ["config.json", "status.json", "result.json", "metrics.jsonl"])
def test_a_corrupt_file_of_a_run_is_named_by_each_command(lamina, finished, copy, name, tmp_path):
    (copy / name).write_text('{"a": \n')
    before = files(copy)
    commands = [
        ["report", copy],
        ["compare", copy, finished.workdir, f"--out={tmp_path / 'x.html'}"],
    ]
    commands.append(["run", f"--config={finished.workdir}/config.json", f"--workdir={copy}"])
    for command in commands:
        if name == "metrics.jsonl" and command[0] == "run":
            (copy / "status.json").unlink()  # a finished run isn't read that far
            before = files(copy)
        code, _, error = lamina(*command)
        assert (code, name in error) == (2, True), (command, error)
        if command[0] != "run" or name != "metrics.jsonl":
            assert files(copy) == before
    code, out, _ = lamina("list", copy)
    assert code == 0
    assert "unreadable" in out


@pytest.mark.parametrize("command", ["list", "report", "compare", "export"])
def test_a_folder_that_is_no_run_is_named_and_not_written(lamina, tmp_path, command, finished):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    before = files(tmp_path)
    for name in ("nowhere", "empty", "file"):
        arguments = {
            "compare": [finished.workdir, f"--out={tmp_path / 'x.html'}"],
            "export": [f"--out={tmp_path / 'x.safetensors'}"],
        }.get(command, [])
        code, out, error = lamina(command, tmp_path / name, *arguments)
        assert name in out + error
        assert code == (0 if (command, name) == ("list", "empty") else 2), (name, out, error)
    assert files(tmp_path) == before
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report"], "give one run folder"),
        (["compare", "FINISHED", "--out=x.html"], "two runs"),
        (["compare", "one", "two"], "--out is missing"),
        (["export", "one"], "should end in .safetensors or .jax"),
        (["export", "FINISHED", "--out=x.jax", "--seed=9"], "has no seed 9: its seeds are (4, 2)"),
        (["export", "FINISHED", "--out=x.jax", "--step=7"], "no checkpoint of step 7"),
        (["export", "FINISHED", "--out=/proc/nowhere/x.jax"], "can't be written"),
        (["export", "FINISHED", "--out=/proc/nowhere/x.safetensors"], "could not write"),
        (["compare", "FINISHED", "FINISHED", "--out=/proc/nowhere/x.html"], "can't be written"),
        (["check"], "--config is empty"),
    ],
)
def test_wrong_arguments_of_the_other_commands_are_told(lamina, finished, arguments, message):
    arguments = [finished.workdir if a == "FINISHED" else a for a in arguments]
    code, _, error = lamina(*arguments)
    assert (code, message in error) == (2, True), error


def test_the_commands_work_on_a_finished_run(lamina, finished, tmp_path):
    assert "done" in lamina("list", finished.workdir)[1]
    assert lamina("report", finished.workdir)[0] == 0
    assert (
        lamina("compare", finished.workdir, finished.workdir, f"--out={tmp_path / 'c.html'}")[0]
        == 0
    )
    assert lamina("export", finished.workdir, f"--out={tmp_path / 'w.safetensors'}")[0] == 0
    assert (tmp_path / "c.html").stat().st_size > 1000
    assert (tmp_path / "w.safetensors").stat().st_size > 1000


def test_check_computes_and_writes_nothing(lamina, tiny_config, tmp_path):
    path = tiny_config()
    before = files(tmp_path)
    code, out, _ = lamina("check", f"--config={path}", "--config.steps=20", "--nocompile")
    assert code == 0
    assert "steps = 20  <- command line (file: 10)" in out
    assert "layers/0/kernel" in out
    assert files(tmp_path) == before


def test_a_run_with_values_that_are_not_finite_is_listed_reported_and_compared(
    lamina, finished, copy, tmp_path
):
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    changed = [json.dumps(json.loads(line) | {"value": None}) for line in lines]
    (copy / "metrics.jsonl").write_text("\n".join(changed) + "\n")
    (copy / "result.json").unlink()
    for command in (
        ["list", copy],
        ["report", copy],
        ["compare", copy, finished.workdir, f"--out={tmp_path / 'x.html'}"],
    ):
        code, _, error = lamina(*command)
        assert code == 0, error


def test_a_bug_is_no_users_mistake(lamina, finished, monkeypatch):
    from lamina.platform.reporting import report

    def broken(workdir):
        raise KeyError("a bug")

    monkeypatch.setattr(report, "render", broken)
    with pytest.raises(KeyError, match="a bug"):
        lamina("report", finished.workdir)


def test_a_reader_that_has_gone_is_no_error(finished):
    read, write = os.pipe()
    os.close(read)
    found = subprocess.run(
        [sys.executable, "-m", "lamina.platform.cli", "list"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (found.returncode, found.stderr) == (0, "")
