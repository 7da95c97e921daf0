"""What several processes do together around a checkpoint."""

import time

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from lamina.platform.checkpoints import manifest

TIMEOUT = 600.0  # seconds that processes wait for each other's part of a save
_SUMS = "checksums"


def contribute(stage: epath.Path, sums: dict[str, int]) -> None:
    """Hands this process's shares of the checksums to process 0, through the folder."""
    folder = stage / _SUMS
    folder.mkdir(parents=True, exist_ok=True)
    manifest.write_file(folder / f"{jax.process_index()}.json", manifest.seal(sums))


def collect(stage: epath.Path, sums: dict[str, int]) -> dict[str, int]:
    """Adds the shares of all processes, on process 0."""
    for process in range(1, jax.process_count()):
        path = stage / _SUMS / f"{process}.json"
        await_file(path)
        theirs = manifest.unseal(path.read_text())
        sums = {name: (value + theirs[name]) % 2**64 for name, value in sums.items()}
    return sums


def await_file(path: epath.Path) -> None:
    """Waits until another process has written a file.

    Raises:
        TimeoutError: it did not within `TIMEOUT` seconds.
    """
    deadline = time.monotonic() + TIMEOUT
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"another process did not write {path} within {TIMEOUT:.0f} s")
        time.sleep(0.02)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; the same answer in all."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


def check_writable(directory: epath.Path) -> None:
    """With several processes, has process 0 try the folder before all begin to save.

    A process that failed alone would leave the others waiting for it.

    Raises:
        OSError: the folder can't be written, in all processes.
    """
    if jax.process_count() == 1:
        return
    problem: OSError | None = None
    if jax.process_index() == 0:
        try:
            (directory / ".saving-probe").write_text("")
            (directory / ".saving-probe").unlink()
        except OSError as error:
            problem = error
    if any_process(problem is not None):
        raise problem or OSError("process 0 could not write to the folder")


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_first(number: int) -> int:
    """Process 0's number, in all processes."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))
