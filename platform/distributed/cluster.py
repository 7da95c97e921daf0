"""Which processes form a run: from flags, or from what started them (Slurm, Open MPI, a TPU pod).

The finding itself is jax's. What stands here is only whether there is anything to find: jax would
ask the network for it, which on a machine of its own takes time, warns, or fails.
"""

import glob
import importlib.util
from collections.abc import Mapping
from typing import NamedTuple

from lamina.platform.errors import UserError

FLAGS = "--coordinator=HOST:PORT, --num_processes=N and --process_id=0..N-1"


class Cluster(NamedTuple):
    """The processes of a run, as far as they are known before jax looks.

    Attributes:
        coordinator: "host:port" of process 0; None: jax finds it.
        num_processes: how many there are; None: jax finds it.
        process_id: which of them this is; None: jax finds it.
        method: jax's name of the way to find what isn't known; None: jax tries them.
    """

    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    method: str | None


def find(
    coordinator: str, num_processes: int, process_id: int, environment: Mapping[str, str]
) -> Cluster | None:
    """Returns the cluster that this process belongs to, or None if it runs alone.

    Args:
        coordinator: the flag `--coordinator`, "" if not given.
        num_processes: the flag, 0 if not given; 1 alone means that there are no others, whatever
            the environment says.
        process_id: the flag, -1 if not given.
        environment: the environment variables.

    Raises:
        UserError: the flags don't fit each other, or the environment names processes but not how
            to reach them.
    """
    if coordinator:
        check_address(coordinator)
    given = (bool(coordinator), num_processes != 0, process_id != -1)
    if all(given) and 0 <= process_id < num_processes:
        return Cluster(coordinator, num_processes, process_id, "deactivate")
    if given == (False, True, False) and num_processes == 1:
        return None
    if any(given[1:]):
        raise UserError(
            f"{FLAGS} go together; got {coordinator!r}, {num_processes} and {process_id}"
        )
    if open_mpi(environment):
        return _open_mpi(coordinator, environment)
    if slurm(environment):
        return Cluster(coordinator or None, None, None, "slurm")
    if tpu_pod(environment):
        return Cluster(coordinator or None, None, None, None)
    if coordinator:
        raise UserError(
            f"--coordinator={coordinator} needs --num_processes=N and --process_id=0..N-1: neither "
            "Slurm nor Open MPI nor a TPU pod, which would tell them, has started this process"
        )
    return None


def check_address(coordinator: str) -> None:
    """Raises a `UserError` where an address isn't HOST:PORT."""
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(
            f"--coordinator={coordinator} is no HOST:PORT, with a port from 1 to 65535, such as "
            "--coordinator=10.0.0.1:8476"
        )


def slurm(environment: Mapping[str, str]) -> bool:
    """Whether `srun` has started this process as one of several.

    A script that `sbatch` runs has a task count too, but is no task of a step: it runs alone.
    """
    step = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS")
    named = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    return _number(step) > 1 and all(name in environment for name in named)


def open_mpi(environment: Mapping[str, str]) -> bool:
    """Whether `mpirun` of Open MPI has started this process as one of several."""
    return _number(environment.get("OMPI_COMM_WORLD_SIZE")) > 1


def tpu_pod(environment: Mapping[str, str]) -> bool:
    """Whether this host is one of several of a TPU slice or of several slices.

    On Kubernetes the environment tells it. A Cloud TPU VM has chips and the TPU library; its
    metadata server, which jax asks, knows the rest.
    """
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return False
    if _number(environment.get("MEGASCALE_NUM_SLICES")) > 1:
        return True
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if name in environment:
            return "," in environment[name]
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _open_mpi(coordinator: str, environment: Mapping[str, str]) -> Cluster:
    """Open MPI 4 tells where its launcher is; version 5 no longer does, so the user has to."""
    if "OMPI_MCA_orte_hnp_uri" in environment:
        return Cluster(coordinator or None, None, None, "ompi")
    if not coordinator:
        raise UserError(
            "this Open MPI doesn't tell its processes where process 0 is: add "
            "--coordinator=HOST:PORT with the host of process 0 and a free port"
        )
    size = _number(environment["OMPI_COMM_WORLD_SIZE"])
    rank = _number(environment.get("OMPI_COMM_WORLD_RANK"))
    return Cluster(coordinator, size, rank, "deactivate")


def _number(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() else 0


def join(cluster: Cluster) -> None:
    """Joins the other processes.

    Raises:
        UserError: they did not come together; the message has jax's reason.
    """
    import jax

    try:
        jax.distributed.initialize(
            cluster.coordinator,
            num_processes=cluster.num_processes,
            process_id=cluster.process_id,
            cluster_detection_method=cluster.method,
        )
    except ValueError:
        if cluster != Cluster(None, None, None, None):  # else: a TPU VM without a pod around it
            raise
    except RuntimeError as error:
        where = cluster.coordinator or "the coordinator"
        raise UserError(
            f"the processes did not come together at {where}: are all started, with the same "
            f"address and number, and can they reach it? ({str(error).splitlines()[0]})"
        ) from error
