"""A run folder: what happens when the same run, or another one, is started there again."""

import contextlib
import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from lamina.platform.checkpoints import lock, names, restoring
from lamina.platform.errors import UserError
from lamina.platform.programs import train
from lamina.platform.reporting import added, folder, manifest

WILD = {"name": "sgd", "learning_rate": 1e30}


class Killed(BaseException):
    """Stands for a kill: nothing in the code under test handles it."""


def plain(result):
    """Records in one order, without their times."""
    return sorted(record._replace(time=0.0) for record in result.metrics)


def data_files(checkpoint):
    """Returns the files in which orbax keeps the arrays, and copies of parts of them."""
    return [path for path in checkpoint.rglob("d/*") if path.is_file()]


DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "flipped": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
    ),
    "emptied": lambda data: b"",
}


def contents(root, pattern="**/*"):
    return {path: path.read_bytes() for path in root.glob(pattern) if path.is_file()}


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy of the finished run as if it had been killed after its last checkpoint."""
    root = shutil.copytree(finished.workdir, tmp_path / "unfinished")
    (root / folder.RESULT).unlink()
    folder.write_status(root, "running")
    return root


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [*DAMAGES, "no manifest", "no files"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    finished, unfinished, tiny_run, capsys, damage
):
    checkpoint = unfinished / "checkpoints" / "10"
    if damage in DAMAGES:
        for path in data_files(checkpoint):
            path.write_bytes(DAMAGES[damage](path.read_bytes()))
    elif damage == "no manifest":
        (checkpoint / "manifest.json").unlink()
    else:
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
    result = tiny_run(unfinished, console=True, seeds=(4, 2))
    said = capsys.readouterr().err
    assert f"checkpoint {checkpoint} " in said
    assert "continues after step 5 of 10" in said
    assert result.status == "done"
    assert plain(result) == plain(finished)
    assert result.final == finished.final


def test_where_all_checkpoints_are_damaged_the_run_ends_and_nothing_is_lost(unfinished, tiny_run):
    for checkpoint in (unfinished / "checkpoints").iterdir():
        for path in data_files(checkpoint):
            path.write_bytes(b"")
    before = contents(unfinished, "checkpoints/**/*")
    metrics = (unfinished / folder.METRICS).read_bytes()
    with pytest.raises(UserError, match=r"every checkpoint .* nothing was deleted"):
        tiny_run(unfinished, seeds=(4, 2))
    assert contents(unfinished, "checkpoints/**/*") == before
    assert (unfinished / folder.METRICS).read_bytes() == metrics
    assert folder.read_status(unfinished)["state"] == "failed"


@pytest.mark.parametrize("name", [folder.STATUS, folder.RESULT])
def test_a_corrupt_file_that_is_removed_as_advised_is_made_again(
    finished, tiny_run, tmp_path, name
):
    root = shutil.copytree(finished.workdir, tmp_path / "run")
    (root / name).write_text("{")
    with pytest.raises(UserError, match=rf"{name} is not valid JSON .* or remove it"):
        tiny_run(root, seeds=(4, 2))
    (root / name).unlink()
    assert tiny_run(root, seeds=(4, 2)).final == finished.final


def test_a_run_killed_before_its_first_checkpoint_still_starts_from_what_it_was_given(
    finished, tiny_run, tmp_path, monkeypatch
):
    changes = {"init_from": finished.workdir, "optimizer": {"name": "sgd", "learning_rate": 0.0}}

    def killed(*arguments):
        raise Killed

    monkeypatch.setattr(train, "train_loop", killed)
    with pytest.raises(Killed):
        tiny_run(tmp_path / "run", **changes)
    monkeypatch.undo()
    tiny_run(tmp_path / "run", **changes)
    read = lambda root: names.flatten(restoring.restore_subtree(root, "params").state)
    given = read(f"{finished.workdir}/checkpoints")
    for name, array in read(tmp_path / "run" / "checkpoints").items():
        np.testing.assert_array_equal(array, given[name][0], err_msg=name)


# --- folders -------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_and_the_run_in_it_undisturbed(finished, tiny_run, tmp_path):
    root = shutil.copytree(finished.workdir, tmp_path / "run")
    before = contents(root)
    with lock.hold(root), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        tiny_run(root, seeds=(4, 2))
    assert contents(root) == before


def test_a_run_that_another_config_overtook_is_refused(tiny_run, tmp_path, monkeypatch):
    from lamina.platform import run as runs

    real = lock.hold

    @contextlib.contextmanager
    def overtaken(workdir):
        monkeypatch.setattr(lock, "hold", real)
        tiny_run(workdir, model={"name": "mlp", "widths": (4,)})
        with real(workdir):
            yield

    assert runs.lock is lock
    monkeypatch.setattr(lock, "hold", overtaken)
    with pytest.raises(UserError, match="holds a run of another config"):
        tiny_run(tmp_path / "run")
    assert folder.read_config(tmp_path / "run")["model"]["widths"] == [4]


def test_a_run_made_before_a_key_was_known_goes_on(unfinished, finished, tiny_run):
    written = json.loads((unfinished / folder.CONFIG).read_text())
    for block in (written, written["data"]):
        del block["seed" if block is written["data"] else "adapters"]
    (unfinished / folder.CONFIG).write_text(json.dumps(written))
    assert plain(tiny_run(unfinished, seeds=(4, 2))) == plain(finished)
    with pytest.raises(UserError, match=r"adapters\.rank: 0 -> 2"):
        tiny_run(unfinished, seeds=(4, 2), adapters={"rank": 2})


@pytest.mark.parametrize("name", ["a b", "größe # 1%?", "colon:here"])
def test_any_name_will_do_for_a_folder(tiny_run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert tiny_run(name, steps=5).status == "done"
    assert (tmp_path / name / folder.REPORT).exists()
    assert tiny_run(tmp_path / name, steps=5).state is None


def test_a_tilde_stands_for_the_home_folder(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tiny_run("~/run", steps=5).status == "done"
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"config.json", "checkpoints"}


# --- runs that ended badly -----------------------------------------------------------------------


def test_a_diverged_run_is_not_repeated(tiny_run, tmp_path, monkeypatch):
    first = tiny_run(tmp_path / "run", optimizer=WILD)
    assert first.status == "diverged"
    assert folder.read_status(tmp_path / "run")["state"] == "diverged"

    def fail(*arguments):
        pytest.fail("it trains again")

    monkeypatch.setattr(train, "train_loop", fail)
    again = tiny_run(tmp_path / "run", optimizer=WILD)
    assert again.status == "diverged"
    assert again.message.startswith(first.message)
    assert "change it, and run it in another --workdir" in again.message
    assert again.metrics == first.metrics


def test_a_failed_run_goes_on_from_its_last_checkpoint(tiny_run, finished, tmp_path, monkeypatch):
    real = train.finish

    def broken(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr(train, "finish", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        tiny_run(tmp_path / "run", seeds=(4, 2))
    status = folder.read_status(tmp_path / "run")
    assert (status["state"], status["message"]) == ("failed", "RuntimeError: a bug")
    monkeypatch.setattr(train, "finish", real)
    assert plain(tiny_run(tmp_path / "run", seeds=(4, 2))) == plain(finished)


def test_a_full_disk_under_the_records_is_told_and_the_run_resumes(
    tiny_run, finished, tmp_path, monkeypatch
):
    import errno

    from lamina.platform.training.recorder import Recorder

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Recorder, "write", full)
    with pytest.raises(UserError, match="can't go on: No space left on device"):
        tiny_run(tmp_path / "run", seeds=(4, 2))
    monkeypatch.undo()
    assert plain(tiny_run(tmp_path / "run", seeds=(4, 2))) == plain(finished)


def test_a_run_whose_last_checkpoint_cannot_be_saved_is_not_done(
    tiny_run, finished, tmp_path, monkeypatch
):
    from lamina.platform.checkpoints.failures import CheckpointError
    from lamina.platform.checkpoints.store import Store

    real = Store.save

    def full(self, step, *arguments):
        if step == 10:
            raise CheckpointError("the disk is full")
        return real(self, step, *arguments)

    monkeypatch.setattr(Store, "save", full)
    with pytest.raises(UserError, match="the disk is full"):
        tiny_run(tmp_path / "run", seeds=(4, 2))
    assert folder.read_status(tmp_path / "run")["state"] == "failed"
    assert folder.read_result(tmp_path / "run") is None
    monkeypatch.undo()
    assert plain(tiny_run(tmp_path / "run", seeds=(4, 2))) == plain(finished)


# --- seeds added to a finished run ---------------------------------------------------------------


@pytest.fixture(scope="module")
def single(tmp_path_factory, tiny_run):
    """Finished runs of one seed each, by seed."""
    root = tmp_path_factory.mktemp("single")
    return {seed: tiny_run(root / f"run_{seed}", steps=5, seeds=(seed,)) for seed in (0, 1, 2)}


@pytest.fixture
def of_seed_0(single, tmp_path):
    """A copy of the finished run of seed 0."""
    return shutil.copytree(single[0].workdir, tmp_path / "run")


def own_records(result, seed):
    return [record._replace(time=0.0) for record in result.metrics if record.seed == seed]


def test_added_seeds_equal_single_runs_bit_for_bit(tiny_run, single, of_seed_0):
    root = of_seed_0
    result = tiny_run(root, steps=5, seeds=(2, 0, 1))
    assert result.seeds == (2, 0, 1)
    assert folder.read_config(root)["seeds"] == [2, 0, 1]
    read = lambda at: names.flatten(restoring.restore_subtree(at / "checkpoints", "params").state)
    for place, seed in enumerate(result.seeds):
        alone = single[seed]
        assert own_records(result, seed) == own_records(alone, seed)
        for name, entry in alone.final.items():
            assert result.final[name].values[place] == entry.values[0]
        wanted = read(pathlib.Path(alone.workdir))
        if seed == 0:
            found = read(root)
        else:  # the new ones were trained together, in the order in which they were given
            found = {n: a[(2, 1).index(seed)] for n, a in read(root / "seeds_2_1").items()}
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_seeds_can_be_added_again_and_the_result_is_given_again(tiny_run, of_seed_0):
    root = of_seed_0
    tiny_run(root, steps=5, seeds=(0, 1))
    result = tiny_run(root, steps=5, seeds=(0, 1, 2))
    assert sorted(path.name for path in root.glob("seeds_*")) == ["seeds_1", "seeds_2"]
    assert len(result.final["test/loss"].values) == 3
    before = contents(root)
    assert tiny_run(root, steps=5, seeds=(0, 1, 2)).final == result.final
    assert contents(root) == before


@pytest.mark.parametrize(
    ("module", "name"),
    [(train, "finish"), (added, "join"), (folder, "write_result"), (manifest, "write")],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_adding_seeds_can_be_killed_anywhere(
    tiny_run, single, of_seed_0, monkeypatch, module, name, when
):
    root = of_seed_0
    real, calls = getattr(module, name), []

    def killed(*arguments, **keywords):
        calls.append(name)
        last = {"write_result": 2, "write": 2}.get(name, 1)  # the sub-run calls these two first
        if len(calls) < last:
            return real(*arguments, **keywords)
        if when == "after":
            real(*arguments, **keywords)
        raise Killed

    monkeypatch.setattr(module, name, killed)
    with pytest.raises(Killed):
        tiny_run(root, steps=5, seeds=(0, 1))
    monkeypatch.undo()
    assert folder.read_status(root)["state"] == "done"
    result = tiny_run(root, steps=5, seeds=(0, 1))
    assert result.status == "done"
    assert own_records(result, 1) == own_records(single[1], 1)
    assert result.final["test/loss"].values[1] == single[1].final["test/loss"].values[0]


def test_seeds_are_added_to_a_finished_run_only(tiny_run, unfinished, tmp_path):
    before = contents(unfinished)
    with pytest.raises(UserError, match=r"the seeds \(7,\) can be added once .* is done"):
        tiny_run(unfinished, seeds=(4, 2, 7))
    assert contents(unfinished) == before


def test_a_run_with_added_seeds_is_not_made_longer(tiny_run, of_seed_0):
    root = of_seed_0
    with pytest.raises(UserError, match="is done as it is"):
        tiny_run(root, steps=10, seeds=(0, 1))
    tiny_run(root, steps=5, seeds=(0, 1))
    with pytest.raises(UserError, match="can't be made longer, for seeds were added"):
        tiny_run(root, steps=10, seeds=(0, 1))
