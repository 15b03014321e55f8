"""Several devices, and several processes that join: what each holds, and what contradicts."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dilformer_jax.io.volumes import BadInput
from dilformer_jax.training import parallel
from dilformer_jax.training.checkpoint import restore_params


def test_batches_are_split_over_the_devices():
    mesh = parallel.mesh()
    replicated, batch = (
        parallel.replicated(mesh),
        parallel.to_devices({"fixed": np.arange(8.0).reshape(8, 1)}, mesh),
    )
    assert batch["fixed"].shape == (8, 1)
    pieces = {shard.device.id: np.asarray(shard.data).ravel().tolist() for shard in batch["fixed"].addressable_shards}
    assert list(pieces.values()) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert jax.device_put(jnp.ones(3), replicated).is_fully_replicated
    assert parallel.describe() == "backend: cpu (4 devices, 1 process)"
    parallel.initialise()
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"DILFORMER_PROCESSES": "2"}, "DILFORMER_COORDINATOR and DILFORMER_PROCESS_ID"),
        ({"DILFORMER_COORDINATOR": "h:1", "DILFORMER_PROCESSES": "two", "DILFORMER_PROCESS_ID": "0"}, "whole numbers"),
        ({"DILFORMER_COORDINATOR": "h:1", "DILFORMER_PROCESSES": "2", "DILFORMER_PROCESS_ID": "2"}, "from 0 to 1"),
        ({"DILFORMER_COORDINATOR": "h", "DILFORMER_PROCESSES": "2", "DILFORMER_PROCESS_ID": "0"}, "address:port"),
        ({"DILFORMER_COORDINATOR": "auto"}, "could not be joined"),
        # Open MPI 5 and Intel MPI, of which JAX knows nothing: two runs of one process would share the workdir.
        ({"OMPI_COMM_WORLD_SIZE": "2", "PRTE_LAUNCHED": "1"}, "OMPI_COMM_WORLD_SIZE says that 2 processes"),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, "PMI_SIZE says that 4 processes .* set DILFORMER_COORDINATOR"),
    ],
)
def test_contradicting_processes_are_one_sentence(monkeypatch, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=said):
        parallel.initialise()


def test_two_processes_join_and_share_a_checkpoint(tmp_path):
    code = (
        "import sys, numpy as np, jax, jax.numpy as jnp\n"
        "from dilformer_jax.training import feeding, parallel\n"
        "from dilformer_jax.training.checkpoint import Checkpoints\n"
        "parallel.initialise()\n"
        "mesh = parallel.mesh()\n"
        "share = {'a': np.arange(4.0).reshape(4, 1) + 4 * jax.process_index()}\n"
        "batch = parallel.to_devices(share, mesh)\n"
        "total = jax.jit(jnp.sum, out_shardings=parallel.replicated(mesh))(batch['a'])\n"
        # A volume on all four devices: both processes read it, and each holds its planes of it, padded at the end.
        "mesh = parallel.mesh(4)\n"
        "assert parallel.share(mesh) == (0, 1) and parallel.share(parallel.mesh(2)) == (jax.process_index(), 2)\n"
        "volume = np.arange(1.0, 11.0, dtype=np.float32).reshape(1, 10, 1, 1, 1)\n"
        "feed = feeding.feeder(mesh, parallel.slabs(mesh, 10, 1))\n"
        "fed = feed({'fixed': volume, 'moving': -volume})['fixed']\n"
        "held = [np.asarray(part.data).ravel().tolist() for part in fed.addressable_shards]\n"
        "assert held == [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 0, 0]]][jax.process_index()], held\n"
        "with Checkpoints(sys.argv[1] + '/checkpoints') as c:\n"
        "    c.save(1, {'params': {'total': total}}, dice=0.5)\n"
        "print(parallel.describe(), float(total))\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "DILFORMER_COORDINATOR": f"127.0.0.1:{port}",
        "DILFORMER_PROCESSES": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, tmp_path],
            env={**environment, "DILFORMER_PROCESS_ID": str(k)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for k in range(2)
    ]
    # 0 + 1 + ... + 7
    for process in processes:
        assert process.communicate(timeout=60)[0].splitlines()[-1] == "backend: cpu (4 devices, 2 processes) 28.0"
        assert process.returncode == 0
    assert restore_params(tmp_path)[0]["total"] == 28
