"""Devices and processes: data parallelism by `jax.jit` over one mesh axis."""

import functools
import os
from typing import TypeVar

import jax
from jax.sharding import Mesh, NamedSharding

from dilformer_jax.io.volumes import BadInput

Tree = TypeVar("Tree")
COORDINATOR, PROCESSES, PROCESS_ID = "DILFORMER_COORDINATOR", "DILFORMER_PROCESSES", "DILFORMER_PROCESS_ID"
# How the launchers of Open MPI, and of MPICH and Intel MPI, tell a process how many there are.
RANKS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def initialise() -> None:
    """Joins the processes of a run into one, where there are several; to be called before any other use of JAX.

    Under srun, on TPU pods and under the mpirun of Open MPI before 5, nothing need be set. Elsewhere each process is
    told by the environment: DILFORMER_COORDINATOR (address:port of process 0), DILFORMER_PROCESSES (their number) and
    DILFORMER_PROCESS_ID (from 0); DILFORMER_COORDINATOR=auto leaves it to JAX.

    Raises BadInput where these contradict, where the others do not answer, and under a launcher of MPI that JAX does
    not know: each process would take itself for the only one.
    """
    if jax.distributed.is_initialized():
        return
    told = {name: os.environ[name] for name in (COORDINATOR, PROCESSES, PROCESS_ID) if os.environ.get(name)}
    try:
        if told.get(COORDINATOR) == "auto" or (not told and _in_cluster()):
            jax.distributed.initialize()
        elif told:
            address, processes, process = _explicit(told)
            jax.distributed.initialize(address, processes, process)
        elif ranks := [name for name in RANKS if os.environ.get(name, "1") != "1"]:
            raise BadInput(
                f"{ranks[0]} says that {os.environ[ranks[0]]} processes were started, by a launcher that JAX does not "
                f"know; set {COORDINATOR} (host:port of process 0), {PROCESSES} and {PROCESS_ID} for each."
            )
    except (RuntimeError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        reason = str(error).splitlines()[0]
        raise BadInput(f"the processes of this run could not be joined ({reason}); start all of them anew.") from error


def mesh() -> Mesh:
    """All devices of all processes along one axis, 'data'."""
    # Without the axis type the default decides, which JAX has changed before.
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def shardings(mesh: Mesh) -> tuple[NamedSharding, NamedSharding]:
    """(replicated, sharded): a copy on every device, and the leading axis split over the devices."""
    return NamedSharding(mesh, jax.P()), NamedSharding(mesh, jax.P("data"))


def to_devices(batch: Tree, sharded: NamedSharding) -> Tree:
    """Global arrays from each process's share (b, ...) of the batch, b times the number of processes along axis 0."""
    return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, sharded), batch)


def describe() -> str:
    """What runs here, as in 'backend: cpu (4 devices, 1 process)'."""
    devices, processes = jax.device_count(), jax.process_count()
    return (
        f"backend: {jax.default_backend()} ({devices} device{'s' * (devices != 1)}, "
        f"{processes} process{'es' * (processes != 1)})"
    )


def _explicit(told: dict[str, str]) -> tuple[str, int, int]:
    missing = [name for name in (COORDINATOR, PROCESSES, PROCESS_ID) if name not in told]
    if missing:
        raise BadInput(f"{', '.join(told)} needs {' and '.join(missing)} beside it; set all three or none.")
    if not (told[PROCESSES].isdecimal() and told[PROCESS_ID].isdecimal()):
        raise BadInput(
            f"{PROCESSES}={told[PROCESSES]} and {PROCESS_ID}={told[PROCESS_ID]} must be whole numbers, such as 2 and 0."
        )
    processes, process = int(told[PROCESSES]), int(told[PROCESS_ID])
    if process >= processes:
        raise BadInput(f"{PROCESS_ID}={process} is beyond {PROCESSES}={processes}; count from 0 to {processes - 1}.")
    if not told[COORDINATOR].rpartition(":")[2].isdecimal():
        raise BadInput(f"{COORDINATOR}={told[COORDINATOR]} has no port; write it as address:port.")
    return told[COORDINATOR], processes, process


def _in_cluster() -> bool:
    """Whether a launcher that JAX knows has started several processes; a lone one has nobody to wait for."""
    srun = "SLURM_STEP_NODELIST" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1"
    mpirun = "OMPI_MCA_orte_hnp_uri" in os.environ and os.environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1"
    tpu_pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    return srun or mpirun or tpu_pod
