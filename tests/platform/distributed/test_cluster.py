"""What tells that a process is one of several, and which flags make sense."""

import pytest

from lamina.platform import cli
from lamina.platform.distributed import cluster
from lamina.platform.distributed.cluster import Cluster
from lamina.platform.errors import UserError

SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
MPIRUN_4 = MPIRUN | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
UNSET = ("", 0, -1)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "a,b"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {name: value for name, value in SRUN.items() if name != "SLURM_STEP_NODELIST"},  # sbatch
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},  # the shell that salloc opens
        SRUN | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
        MPIRUN | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
)
def test_a_process_that_was_started_alone_is_alone(environment):
    assert cluster.find(*UNSET, environment) is None


@pytest.mark.parametrize(
    ("environment", "method"),
    [
        (SRUN, "slurm"),
        (MPIRUN_4, "ompi"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, None),
    ],
)
def test_jax_finds_what_a_launcher_tells(environment, method):
    assert cluster.find(*UNSET, environment) == Cluster(None, None, None, method)
    with_address = cluster.find("h:1", 0, -1, environment)
    assert with_address == Cluster("h:1", None, None, method)


def test_flags_go_before_what_the_environment_says():
    assert cluster.find("h:1", 3, 2, SRUN) == Cluster("h:1", 3, 2, "deactivate")
    assert cluster.find("", 1, -1, SRUN) is None


def test_an_open_mpi_that_hides_its_launcher_needs_the_address_alone():
    with pytest.raises(UserError, match="add --coordinator=HOST:PORT"):
        cluster.find(*UNSET, MPIRUN)
    assert cluster.find("h:1", 0, -1, MPIRUN) == Cluster("h:1", 2, 1, "deactivate")


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--coordinator=localhost"], "HOST:PORT"),
        (["--coordinator=localhost:http", "--num_processes=2", "--process_id=0"], "HOST:PORT"),
        (["--coordinator=:80", "--num_processes=2", "--process_id=0"], "HOST:PORT"),
        (["--coordinator=h:70000", "--num_processes=2", "--process_id=0"], "HOST:PORT"),
        (["--coordinator=h:1"], "needs --num_processes"),
        (["--coordinator=h:1", "--num_processes=2"], "go together"),
        (["--coordinator=h:1", "--num_processes=2", "--process_id=2"], "go together"),
        (["--coordinator=h:1", "--num_processes=-2", "--process_id=-3"], "go together"),
        (["--num_processes=2", "--process_id=0"], "go together"),
        (["--process_id=0"], "go together"),
        (["--num_processes=two"], "num_processes"),
    ],
)
def test_flags_that_make_no_sense_are_told(tmp_path, capsys, flags, what):
    code = cli.main(["run", "--config=quickstart", f"--workdir={tmp_path / 'run'}", *flags])
    assert code == 2
    assert what in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
