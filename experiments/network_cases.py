"""What the benchmark measures of whole networks: inference, its memory, a training step."""

import argparse
import dataclasses
import functools
import json
import math
import resource
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
from cases import CONFIGS, Case, Row, Run, Shape, by, clones, noise, problems, work

from dilformer_jax import models
from dilformer_jax.training import parallel, state

# --- 4. Inference ---


def inferences(arguments: argparse.Namespace) -> Iterator[Case]:
    """A pair to its finest displacement, at full resolution and from half of it on, against the official networks."""
    for shape, dtype in problems(arguments, (160, 192, 160)):
        fixed, moving = noise(0, 1, *shape, 1), noise(1, 1, *shape, 1)
        ours, extra = {}, {}
        for name in names(arguments):
            program = network_program(name, dtype, arguments.quick, fixed, moving)
            ours[name], extra[name] = program.run, work(program.compiled)
        for name, clone in clones(arguments):
            theirs = {name: peers.inference(name, clone, fixed, moving, dtype)}
            yield Case("inference of a pair", by(shape), ours, theirs, INFERENCE_TARGETS if name == "rdp" else None,
                       dtype, extra=extra)  # fmt: skip
        if not clones(arguments):
            yield Case("inference of a pair", by(shape), ours, {}, INFERENCE_TARGETS, dtype, extra=extra)


# Compiles in three seconds, with its gradients.
QUICK = {"width": 4, "levels": 1, "srf": False}
OURS: dict[str, dict[str, Any]] = {"dilformer": {}, "dilformer, finest=1": {"finest": 1}}
INFERENCE_TARGETS = {"dilformer": 1 / 4, "dilformer, finest=1": 1 / 12}


def names(arguments: argparse.Namespace) -> list[str]:
    return list(OURS)[: 1 if arguments.quick else None]


@dataclasses.dataclass
class Program:
    run: Run
    compiled: Any


def network_program(name: str, dtype: str, quick: bool, fixed: jax.Array, moving: jax.Array) -> Program:
    module = models.create("dilformer", **OURS[name] | (QUICK if quick else {}), dtype=dtype)
    params = random_parameters(module)
    program = jax.jit(lambda params, fixed, moving: module.apply({"params": params}, fixed, moving)[0])
    executable = program.lower(params, fixed, moving).compile()
    return Program(functools.partial(executable, params, fixed, moving), executable)


def random_parameters(module: Any) -> Any:
    """Without compiling the initialisation, which takes as long as the network's own compilation."""
    image = jax.ShapeDtypeStruct((1, *3 * (2 * module.downsampling,), 1), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), image, image)["params"]
    random = np.random.default_rng(2)

    def leaf(path: Any, shape: Any) -> jax.Array:
        # Displacements of about a voxel: where all points end at the border, the warp's gradient adds to few voxels.
        size = 1e-4 if "head" in jax.tree_util.keystr(path) else 0.1
        return jnp.asarray(size * random.random(shape.shape), shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def memories(arguments: argparse.Namespace) -> Iterator[Row]:
    """The memory of one inference, each network in a process of its own: its peak above what the imports take."""
    shape = (32, 32, 32) if arguments.quick else (160, 192, 160)
    peak = {name: alone(arguments, name, shape) for name in (*names(arguments), *dict(clones(arguments)))}
    for name in names(arguments):
        theirs = peak.get("rdp")
        yield {
            "case": "inference of a pair, peak memory",
            "of": name,
            "size": by(shape),
            "dtype": "float32",
            "unit": "GiB",
            "ours": peak[name]["gib"],
            "planned": peak[name]["planned"],
            "peer": theirs and "rdp",
            "theirs": theirs and theirs["gib"],
            "ratio": theirs and peak[name]["gib"] / max(theirs["gib"], 1e-3),
            "target": 0.5,
            "rounds": 1,
        }


def alone(arguments: argparse.Namespace, name: str, shape: Shape) -> dict[str, float]:
    clone = dict(clones(arguments)).get(name)
    command = [
        sys.executable,
        str(Path(__file__).with_name("benchmark.py")),
        "--alone",
        name,
        *map(str, shape),
        str(clone or ""),
        "quick" * arguments.quick,
    ]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def one_inference(name: str, d: str, h: str, w: str, clone: str, quick: str) -> None:
    """In a process of its own: prints by how much one inference raised its peak memory, compilation included."""
    shape = int(d), int(h), int(w)
    if name in OURS:
        jax.devices()
        before = peak_memory()
        program = network_program(name, "float32", bool(quick), noise(0, 1, *shape, 1), noise(1, 1, *shape, 1))
        jax.block_until_ready(program.run())
        planned = program.compiled.memory_analysis().temp_size_in_bytes / 2**30
    else:
        import torch  # noqa: F401

        before, planned = peak_memory(), math.nan
        volume = lambda seed: jax.device_get(noise(seed, 1, *shape, 1))
        peers.inference(name, Path(clone), volume(0), volume(1))()
    print(json.dumps({"gib": peak_memory() - before, "planned": planned}))


def peak_memory() -> float:
    """The most memory that this process has had resident, in GiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not `ru_maxrss`: on Linux it begins with the peak of the process that started this one.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


# --- 5. Training steps ---


def steps(arguments: argparse.Namespace) -> Iterator[Case]:
    """A training step of one pair in one direction, against the official networks' steps."""
    # As many voxels as half of LPBA40's resolution, in a shape that TransMorph can halve as often as it does.
    for shape, dtype in problems(arguments, (96, 96, 64)):
        pair = noise(0, 1, *shape, 1), noise(1, 1, *shape, 1)
        name, size, ours = "training step", by(shape), {"dilformer": step_run(dtype, arguments.quick, shape)}
        for peer, clone in clones(arguments):
            target = 0.5 if peer == "rdp" else None
            yield Case(name, size, ours, {peer: peers.training_step(peer, clone, *pair, dtype)}, target, dtype)
        if not clones(arguments):
            yield Case(name, size, ours, {}, 0.5, dtype)


def step_run(dtype: str, quick: bool, shape: Shape) -> Run:
    config = runpy.run_path(str(CONFIGS / "lpba40.py"))["get_config"]("tiny" if quick else "")
    module = models.create("dilformer", **config.model.options.to_dict() | {"dtype": dtype})
    transformation = state.optimiser(total_steps=10_000, **config.optimiser.to_dict())
    params = random_parameters(module)
    # One device, however many there are.
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "space"))
    zero = jnp.zeros((), jnp.int32)
    first = state.State(zero, params, jax.jit(transformation.init)(params))
    now = jax.device_put(first, parallel.replicated(mesh))
    advance = state.step_function(module, transformation, config.loss.to_dict(), bidirectional=False, mesh=mesh)
    batch = {"fixed": noise(0, 1, *shape, 1), "moving": noise(1, 1, *shape, 1)}
    batch = jax.device_put(batch, parallel.sharded(mesh))

    def run() -> Any:
        nonlocal now
        now, measured = advance(now, batch)
        return measured

    return run
