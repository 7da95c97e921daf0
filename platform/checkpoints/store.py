"""Asynchronous checkpoints of a train state that verify themselves, in one folder.

Each checkpoint is a folder named by its step, written by Orbax, with a manifest (manifest.py) that
holds a checksum per array. A save goes to a hidden folder beside and gets its name by one rename
when it is whole, manifest included; only then are older ones deleted. So a process killed at any
moment leaves either the previous set of checkpoints or the new one. (Where rename isn't atomic,
`gs://`, the folder has its name from the start and counts once its manifest is there.)

    checkpoints/
        100/            manifest.json and Orbax's files
        200-1/          the first replacement of step 200, saved again after 200 was found damaged
        .saving-300/    a save under way, or what is left of a killed one
"""

import json
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
from etils import epath
from jax.sharding import Sharding, SingleDeviceSharding

from lamina.platform.checkpoints import arrays as arrays_lib
from lamina.platform.checkpoints import checksum, folders, manifest, processes
from lamina.platform.checkpoints.failures import CheckpointError, cause, quieten
from lamina.platform.checkpoints.manifest import ArrayRecord, BadManifest, Manifest
from lamina.platform.checkpoints.names import flatten, unflatten
from lamina.platform.checkpoints.restoring import Restored, newest_good, other_model
from lamina.platform.checkpoints.retention import best_entry, surplus
from lamina.platform.errors import UserError

if TYPE_CHECKING:
    import orbax.checkpoint as ocp


def open_store(
    directory: epath.PathLike,
    *,
    keep: int = 2,
    keep_best: tuple[str, str] | None = None,
) -> "Store":
    """Opens a folder of checkpoints for the one run that writes to it.

    Creates the folder, and removes what killed saves left behind; so hold the run's lock (lock.py)
    first, and use `restore_subtree` and `list_steps` to read a folder that a run may be using.
    With several processes, all of them call this and every method of the store.

    Args:
        directory: the folder, local or `gs://`.
        keep: how many of the newest checkpoints to keep, at least 1. Default 2: one spare.
        keep_best: (metric, "min" or "max") to keep besides these the checkpoint whose
            `extra["metrics"][metric]` is best; of equal ones the earlier. Default: none.

    Raises:
        UserError: a bad option.
        CheckpointError: the folder can't be created or read.
    """
    if keep < 1:
        raise UserError(f"checkpoint.keep is {keep}; keep at least 1 checkpoint")
    if keep_best is not None and keep_best[1] not in ("min", "max"):
        raise UserError(f'the mode of the best metric is {keep_best[1]!r}; use "min" or "max"')
    path = folders.normal(directory)
    quieten()
    try:
        if jax.process_index() == 0:
            path.mkdir(parents=True, exist_ok=True)
            folders.remove_leftovers(path)
        processes.barrier("lamina_checkpoints_open")
        return Store(path, keep, keep_best)
    except OSError as error:
        raise CheckpointError(f"can't use the checkpoint folder {path}: {cause(error)}") from error


class Store:
    """The checkpoints of one run; made by `open_store`."""

    def __init__(self, directory: epath.Path, keep: int, keep_best: tuple[str, str] | None):
        self.directory = directory
        self._keep = keep
        self._keep_best = keep_best
        self._entries = folders.complete(directory)
        self._trusted: set[str] = set()  # written or verified by this object
        self._bad: set[str] = set()  # failed to verify
        self._checkpointer: ocp.AsyncCheckpointer | None = None
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._saving_step: int | None = None

    def steps(self) -> tuple[int, ...]:
        """Steps of the complete checkpoints, ascending, without those found damaged."""
        return tuple(sorted({e.step for e in self._entries if e.name not in self._bad}))

    def best(self) -> int | None:
        """The step of the best checkpoint by the metric of `keep_best`; None if there is none."""
        good = [e for e in self._entries if e.name not in self._bad]
        entry = best_entry(good, self._keep_best)
        return None if entry is None else entry.step

    def save(self, step: int, state: Any, extra: Mapping[str, Any] | None = None) -> bool:
        """Starts to save a train state; returns once the caller may change or donate it.

        Waits for the save before this one. A step that is already saved with the very same values
        (by checksum) in a checkpoint that this store wrote or verified is skipped; otherwise the
        new one is written beside the old, which is deleted afterwards.

        Args:
            step: the step the state belongs to.
            state: any pytree of jax.Arrays (typed PRNG keys too), on any mesh.
            extra: JSON metadata to keep with it; `extra["metrics"]` feeds `keep_best`.

        Returns:
            Whether a save was started (False: skipped).

        Raises:
            CheckpointError: the save BEFORE this one failed, and this one was not started: call
                again to go on; or this one could not be started. Earlier checkpoints are intact.
            TypeError, ValueError: a leaf is no jax.Array, `extra` is no JSON.
        """
        self.wait()
        metadata = json.loads(json.dumps(dict(extra or {})))  # as it is now
        leaves = flatten(state)
        with jax.transfer_guard("allow"):
            data = {name: arrays_lib.data_of(name, leaf) for name, leaf in leaves.items()}
            records = {name: manifest.describe(leaf) for name, leaf in leaves.items()}
            copies = arrays_lib.private_copies(data)
            jax.block_until_ready(copies)
            if self._already_saved(step, records, copies):
                return False
            name = self._new_name(step)
            stage = self._stage(name)
            self._saving_step = step
            try:
                processes.check_writable(self.directory)
                if self._checkpointer is None:
                    self._checkpointer = arrays_lib.checkpointer(processes.TIMEOUT)
                self._checkpointer.save(stage, args=arrays_lib.save_args(copies))
                blocks = checksum.on_host(copies)
            except Exception as error:
                raise self._abandon(stage, error) from error
        job = Manifest(int(step), records, metadata)
        # Not a daemon: an interpreter that exits waits for the save.
        self._thread = threading.Thread(
            target=self._finish, args=(name, job, blocks), name="lamina_checkpoint"
        )
        self._thread.start()
        return True

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
            CheckpointError: that save failed, in this process or another; raised once. Earlier
                checkpoints are intact.
        """
        try:
            self._join()
        except CheckpointError:
            processes.any_process(True)
            raise
        if processes.any_process(False):
            raise CheckpointError(
                f"another process could not save its part of the checkpoint of step "
                f"{self._saving_step} in {self.directory}. Earlier checkpoints are intact."
            )

    def _join(self) -> None:
        """Waits for this process's part of the save under way, and raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Waits for this process's part of the save under way, and frees Orbax's threads.

        Call it in a `finally`: a program that ends without it may lose the save under way.

        Raises:
            CheckpointError: that save failed.
        """
        try:
            self._join()
        finally:
            if self._checkpointer is not None:
                self._checkpointer.close()
                self._checkpointer = None

    def restore(
        self,
        abstract_state: Any,
        step: int | None = None,
        *,
        form: Callable[[Mapping[str, ArrayRecord]], Any] | None = None,
    ) -> Restored | None:
        """Restores the newest checkpoint that verifies, or that of one step.

        Args:
            abstract_state: the state's structure, with ShapeDtypeStructs (or arrays) as leaves;
                each array goes to its leaf's `sharding`, or to the first device if it has none.
                Mesh and number of processes may differ from those that saved.
            step: this step and no other. Default: the newest that verifies.
            form: path to record of a checkpoint's arrays to the abstract state to read of it,
                where that isn't the same for all checkpoints.

        Returns:
            The state, bit for bit, with a note on every newer checkpoint that was skipped; None if
            the folder holds no checkpoint at all.

        Raises:
            UserError: every checkpoint is damaged (nothing is deleted); or the checkpoint is that
                of another model; or there is none of this step.
            CheckpointError: as `wait`, before anything is read; call again to go on.
        """
        self.wait()
        default = SingleDeviceSharding(jax.local_devices()[0])

        def select(found: Manifest) -> tuple[dict[str, ArrayRecord], dict[str, Sharding | None]]:
            wanted = flatten(form(found.arrays) if form else abstract_state)
            expected = {name: manifest.describe(leaf) for name, leaf in wanted.items()}
            shardings: dict[str, Sharding | None] = {
                name: getattr(leaf, "sharding", None) or default for name, leaf in wanted.items()
            }
            lines = manifest.differences(found.arrays, expected)
            if lines:
                raise UserError(other_model(self.directory, found.step, lines))
            return {name: found.arrays[name] for name in wanted}, shardings

        result = newest_good(self.directory, step, select)
        if result is None:
            return None
        name, found, flat, notes = result
        self._trusted.add(name)
        self._bad.update(bad for bad, _ in notes)
        state = unflatten(flat, abstract_state)
        return Restored(found.step, state, found.extra, tuple(text for _, text in notes))

    def _already_saved(
        self, step: int, records: dict[str, ArrayRecord], copies: dict[str, jax.Array]
    ) -> bool:
        names = [e.name for e in self._entries if e.step == step and e.name in self._trusted]
        if not names:
            return False
        try:
            saved = manifest.read(self.directory / names[-1]).arrays
        except BadManifest:
            return False
        sums = checksum.checksums(copies)
        return saved == {n: r._replace(checksum=sums[n]) for n, r in records.items()}

    def _new_name(self, step: int) -> str:
        attempts = [a for s, a, _ in folders.listing(self.directory) if s == step]
        attempt = processes.from_first(max(attempts, default=-1) + 1)
        return f"{step}-{attempt}" if attempt else str(step)

    def _stage(self, name: str) -> epath.Path:
        atomic = manifest.is_local(self.directory)
        return self.directory / (f"{folders.STAGE}{name}" if atomic else name)

    def _finish(self, name: str, job: Manifest, blocks: dict[str, checksum.Blocks]) -> None:
        """The background part of a save: checksums, completion, retention."""
        stage = self._stage(name)
        try:
            sums = {n: checksum.own_share(b) for n, b in blocks.items()}
            blocks.clear()
            assert self._checkpointer is not None
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                sums = processes.collect(stage, sums)
                records = {n: r._replace(checksum=sums[n]) for n, r in job.arrays.items()}
                manifest.write(stage, job._replace(arrays=records))
                folders.commit(stage, self.directory / name)
            else:
                processes.contribute(stage, sums)
                processes.await_file(self.directory / name / manifest.MANIFEST)
        except BaseException as error:
            self._failure = self._abandon(stage, error)
            return
        self._trusted.add(name)
        self._bad.discard(name)
        self._entries = [e for e in self._entries if e.name != name]
        self._entries.append(folders.entry(name, job.step, job.extra))
        try:
            self._delete_surplus(job.step)
        except OSError as error:
            self._failure = CheckpointError(
                f"saved the checkpoint of step {job.step}, but could not delete older ones in "
                f"{self.directory}: {cause(error)}"
            )

    def _delete_surplus(self, new_step: int) -> None:
        """Deletes what the new, complete checkpoint has made superfluous."""
        listing = folders.listing(self.directory)
        names = surplus(listing, self._entries, self._bad, new_step, self._keep, self._keep_best)
        stay = {name for _, _, name in listing} - set(names)  # process 0 may have deleted already
        self._entries = [e for e in self._entries if e.name in stay]
        if jax.process_index() == 0:
            for name in names:
                folders.remove(self.directory / name)

    def _abandon(self, stage: epath.Path, error: BaseException) -> CheckpointError:
        """Removes what a failed save left, and says what happened."""
        message = (
            f"could not save the checkpoint of step {self._saving_step} in {self.directory}: "
            f"{cause(error)}. Earlier checkpoints are intact."
        )
        failure = CheckpointError(message)
        failure.__cause__ = error
        # Orbax keeps the errors of a failed save; the next one gets a new checkpointer.
        checkpointer, self._checkpointer = self._checkpointer, None
        try:
            if checkpointer is not None:
                checkpointer.close()
        except Exception as second:  # the same failure again, already on its way to the caller
            failure.add_note(f"closing Orbax's checkpointer: {second}")
        try:
            if jax.process_index() == 0:
                folders.remove_stage(stage)
        except OSError as second:  # the next open removes it
            failure.add_note(f"removing {stage}: {second}")
        return failure
