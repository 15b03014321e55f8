"""Devices and processes: one mesh whose axis 'data' splits the batch and whose axis 'space' splits each volume."""

import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from dilformer_jax.io.volumes import BadInput
from dilformer_jax.ops.slabs import Slabs, planes

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


def mesh(space: int = 1) -> Mesh:
    """All devices of all processes: `space` of them share each volume, and so many groups share the batch.

    The axes are 'data' and 'space'; devices that share a volume stand beside each other, in one process where it has as
    many.

    Raises BadInput where the devices, or those of a process, do not divide so.
    """
    devices, local = jax.device_count(), jax.local_device_count()
    if space < 1 or devices % space or max(space, local) % min(space, local):
        raise BadInput(
            f"space is {space} and there are {devices} devices, {local} to a process; give a number of devices a "
            "volume that divides both, or is a multiple of those of a process."
        )
    in_order = np.array(sorted(jax.devices(), key=lambda device: (device.process_index, device.id)))
    # Without the axis type the default decides, which JAX has changed before.
    return Mesh(in_order.reshape(-1, space), ("data", "space"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def slabs(mesh: Mesh, depth: int, multiple: int) -> Slabs | None:
    """How volumes of `depth` planes are split over the mesh, for a network that needs multiples of `multiple`; None
    where each is on one device."""
    count = mesh.shape["space"]
    return None if count == 1 else Slabs("space", ("data", "space"), count, depth, planes(depth, count, multiple))


def share(mesh: Mesh) -> tuple[int, int]:
    """Which share of each batch this process reads, and how many there are: processes that split a volume between them
    read the same."""
    processes = max(1, mesh.shape["space"] // jax.local_device_count())
    return jax.process_index() // processes, jax.process_count() // processes


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, jax.P())


def sharded(mesh: Mesh) -> NamedSharding:
    """Volumes (b, d, ...): the batch, and the first spatial axis of each volume, split over the devices."""
    return NamedSharding(mesh, jax.P("data", "space"))


def to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Global arrays (b * shares, ...) from each process's share (b, ...) of a batch; devices that share volumes get
    them whole."""
    index, shares = share(mesh)

    def placed(array: np.ndarray) -> Array:
        def rows(place: tuple[slice, ...] | None) -> np.ndarray:
            assert place is not None
            start, end, _ = place[0].indices(len(array) * shares)
            return array[start - index * len(array) : end - index * len(array)]

        whole = (len(array) * shares, *array.shape[1:])
        return jax.make_array_from_callback(whole, NamedSharding(mesh, jax.P("data")), rows)

    return {name: placed(array) for name, array in batch.items()}


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
