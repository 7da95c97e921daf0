"""Damaged checkpoints are never taken for good ones, and the older one is used instead."""

import gc
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina.platform.checkpoints.restoring import restore_subtree
from lamina.platform.checkpoints.store import open_store
from lamina.platform.errors import UserError

# Orbax leaves its other reads unawaited when one of them fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _collect_abandoned_reads():
    yield
    time.sleep(0.05)  # TensorStore's threads let go of them
    gc.collect()


def make_state(step):
    key = jax.random.key(step)
    return {
        "params": {
            "kernel": jax.random.normal(key, (40, 30)),
            "bias": jnp.zeros(30),
            "table": jnp.arange(64, dtype=jnp.bfloat16) * step,
        },
        "keys": jax.random.split(key, 2),
        "step": jnp.int32(step),
    }


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    store = open_store(folder)
    for step in (1, 2):
        store.save(step, make_state(step), {"step": step})
    store.close()
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "c")
    return tmp_path / "c"


def restore(folder):
    store = open_store(folder)
    try:
        return store.restore(make_state(0)), store
    finally:
        store.close()


def assert_is_step(restored, step):
    assert restored.step == step
    assert restored.extra == {"step": step}
    for a, b in zip(
        jax.tree.leaves(restored.state), jax.tree.leaves(make_state(step)), strict=True
    ):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def files(folder):
    return sorted(p for p in (folder / "2").rglob("*") if p.is_file())


def test_no_flipped_byte_in_any_file_gets_through(folder):
    """Each file, at several offsets: the right step 2, or step 1 with a note. Nothing else."""
    fell_back = set()
    for path in files(folder):
        content = path.read_bytes()
        for offset in sorted({int(f * (len(content) - 1)) for f in (0, 0.2, 0.5, 0.8, 1)}):
            changed = bytearray(content)
            changed[offset] ^= 0x41
            path.write_bytes(changed)
            restored, store = restore(folder)
            assert_is_step(restored, restored.step)
            if restored.step == 1:
                assert len(restored.notes) == 1
                assert str(folder / "2") in restored.notes[0]
                assert store.steps() == (1,)
                fell_back.add(path.name)
            else:
                assert restored.notes == ()
        path.write_bytes(content)
    assert "manifest.json" in fell_back
    assert max((folder / "2").rglob("d/*"), key=lambda p: p.stat().st_size).name in fell_back


def test_a_flip_in_the_data_names_the_array(folder):
    needle = np.asarray(make_state(2)["params"]["kernel"]).tobytes()[400:464]
    for path in files(folder):
        content = path.read_bytes()
        if needle in content:
            at = content.index(needle)
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            break
    else:
        pytest.fail("the raw values are not in any file")
    restored, _ = restore(folder)
    assert_is_step(restored, 1)
    assert "changed bits in the array(s) params/kernel" in restored.notes[0]
    # What does not need the damaged array can still be read from the newer one.
    assert restore_subtree(folder, "step").step == 2
    assert restore_subtree(folder, "params").step == 1


@pytest.mark.parametrize("how", ["truncated", "deleted", "emptied"])
def test_a_truncated_or_missing_file_falls_back_or_does_no_harm(folder, how):
    fell_back = set()
    for path in files(folder):
        content = path.read_bytes()
        if how == "deleted":
            path.unlink()
        else:
            path.write_bytes(b"" if how == "emptied" else content[: len(content) // 2])
        restored, _ = restore(folder)
        assert_is_step(restored, restored.step)
        assert len(restored.notes) == 2 - restored.step
        if restored.step == 1:
            fell_back.add(path.name)
        path.write_bytes(content)
    assert "manifest.json" in fell_back
    assert len(fell_back) >= 3


def test_notes_say_what_was_wrong(folder):
    shutil.copytree(folder / "2", folder / "3")
    for path in (folder / "3").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(folder / "2", folder / "4")
    (folder / "4" / "manifest.json").unlink()
    shutil.copytree(folder / "2", folder / "5")
    (folder / "5" / "manifest.json").write_text("")
    shutil.copytree(folder / "2", folder / "6")
    (folder / "7").write_text("a file")
    restored, store = restore(folder)
    assert_is_step(restored, 2)
    found = [note.removeprefix(f"checkpoint {folder}/") for note in restored.notes]
    assert found == [
        "7 is not a folder",
        "6 has been renamed: it holds step 2",
        "5 is damaged: manifest.json is empty",
        "4 is incomplete: manifest.json is missing",
        "3 is an empty folder",
    ]
    assert store.steps() == (1, 2)


def test_if_every_checkpoint_is_bad_it_says_so_and_deletes_nothing(folder):
    for step in ("1", "2"):
        path = folder / step / "manifest.json"
        path.write_bytes(path.read_bytes()[:-9])
    before = sorted(str(p) for p in folder.rglob("*"))
    with pytest.raises(UserError, match=r"every checkpoint .* nothing was deleted") as caught:
        restore(folder)
    assert str(caught.value).count("manifest.json does not match its own checksum") == 2
    assert sorted(str(p) for p in folder.rglob("*")) == before


def test_one_chosen_step_that_is_damaged_is_an_error_without_falling_back(folder):
    (folder / "2" / "manifest.json").unlink()
    store = open_store(folder)
    with pytest.raises(UserError, match=r"step 2 .* is damaged"):
        store.restore(make_state(0), step=2)
    store.close()


def test_a_damaged_step_is_replaced_when_the_run_reaches_it_again(folder):
    path = folder / "2" / "manifest.json"
    path.write_text("")
    store = open_store(folder)
    assert store.restore(make_state(0)).step == 1
    store.save(2, make_state(2), {"step": 2})
    store.close()
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2-1"]
    restored, _ = restore(folder)
    assert_is_step(restored, 2)
    assert restored.notes == ()


def test_damaged_checkpoints_do_not_count_as_kept(folder):
    path = folder / "2" / "manifest.json"
    path.write_text("")
    store = open_store(folder, keep=2)
    store.restore(make_state(0))
    store.save(3, make_state(3))
    store.wait()
    assert store.steps() == (1, 3)
    assert (folder / "2").exists()  # to be looked at until it is older than all that is kept
    store.save(4, make_state(4))
    store.close()
    assert sorted(p.name for p in folder.iterdir()) == ["3", "4"]


def test_leftovers_of_killed_saves_are_ignored_and_removed_on_opening(folder):
    shutil.copytree(folder / "2", folder / ".saving-3")
    shutil.copytree(folder / "2", folder / ".saving-4.orbax-checkpoint-tmp")
    assert restore_subtree(folder, "step").step == 2
    assert (folder / ".saving-3").exists()  # reading changes nothing
    restored, _ = restore(folder)
    assert_is_step(restored, 2)
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]
