"""What the benchmark measures: cases by section, each with this package's ways of doing it and its peers'."""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import resource
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import peers
from jax import lax

from dilformer_jax import models
from dilformer_jax.ops import conv, losses, spatial
from dilformer_jax.training import parallel, state

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
Shape = tuple[int, int, int]
Run = Callable[[], Any]
Row = dict[str, Any]


@dataclasses.dataclass
class Case:
    """One thing, done by this package in some ways and by its peers in others; each way returns when asked to block.

    Attributes:
      name, size, dtype: what is done, to what.
      ours: this package's ways, by name; a row is printed for each, against each peer.
      theirs: the peers' ways.
      target: the largest ratio aimed at, against the first peer; by the name of our way where these have their own.
      rounds: at most, where a round is slow.
      extra: what else the rows show, by the name of our way.
    """

    name: str
    size: str
    ours: dict[str, Run]
    theirs: dict[str, Run] = dataclasses.field(default_factory=dict)
    target: float | dict[str, float] | None = None
    dtype: str = "float32"
    rounds: int | None = None
    extra: dict[str, Row] = dataclasses.field(default_factory=dict)


# --- 1. Convolutions ---


def convolutions(arguments: argparse.Namespace) -> Iterator[Case]:
    """`ops.conv` against PyTorch, forward and with the gradients of input and kernel."""
    fine, middle, coarse = [(8, 8, 8)] * 3 if arguments.quick else [(80, 96, 112), (40, 48, 56), (20, 24, 28)]
    layers: list[tuple[str, Shape, tuple[int, ...], dict[str, Any], float | None]] = [
        ("dense 3³", fine, (3, 3, 3, 16, 16), {}, 2.0),
        ("dense 3³", middle, (3, 3, 3, 32, 32), {}, 1.5),
        ("dense 3³", coarse, (3, 3, 3, 64, 64), {}, 1.3),
        ("stride 2, 3³", fine, (3, 3, 3, 16, 32), {"stride": 2}, 1.8),
        ("stride 2, 2³", fine, (2, 2, 2, 16, 32), {"stride": 2}, 1.8),
        ("stride 2, 4³", fine, (4, 4, 4, 1, 16), {"stride": 2}, 1.8),
        ("dense 3³, dilation 2", middle, (3, 3, 3, 32, 32), {"dilation": 2}, 2.5),
        ("dense 3³, dilation 3", middle, (3, 3, 3, 32, 32), {"dilation": 3}, 2.5),
        ("depthwise 3³", coarse, (3, 3, 3, 64), {}, 1.0),
        ("depthwise 3³, dilation 2", coarse, (3, 3, 3, 64), {"dilation": 2}, 1.0),
        ("depthwise 3³, dilation 3", coarse, (3, 3, 3, 64), {"dilation": 3}, 1.0),
        ("axis-wise 3x1x1", fine, (3, 1, 1, 16, 16), {}, 1.0),
        ("axis-wise 1x3x1", fine, (1, 3, 1, 16, 16), {}, 1.0),
        ("axis-wise 1x1x3", fine, (1, 1, 3, 16, 16), {}, 1.0),
    ]
    if arguments.quick:
        layers = [layers[0], layers[3], layers[8]]
    for name, shape, kernel_shape, options, target in layers:
        channels = kernel_shape[-1 if len(kernel_shape) == 4 else -2]
        x, kernel = noise(0, 1, *shape, channels), noise(1, *kernel_shape)
        size = f"{channels} to {kernel_shape[-1]}, {by(shape)}"
        function: Callable = functools.partial(conv.depthwise if len(kernel_shape) == 4 else conv.conv, **options)
        for suffix, gradients in (("forward", False), ("forward and backward", True)):
            program = with_gradients(function) if gradients else function
            theirs = torch_run(peers.convolution, x, kernel, gradients=gradients, **options)
            yield Case(f"{name}, {suffix}", size, {"conv": compiled(program, x, kernel)}, theirs,
                       target if gradients else None)  # fmt: skip


# --- 2. Warps ---


def warps(arguments: argparse.Namespace) -> Iterator[Case]:
    """`spatial.warp` against `grid_sample` alone, whose grid of normalised places is made beforehand."""
    for shape, channels in ((80, 96, 112), 16), ((160, 192, 224), 1):
        if arguments.quick:
            shape = (8, 8, 8)
        image, u = noise(0, 1, *shape, channels), smooth_displacement(shape)
        for name, variables, target in (
            ("forward", (), 0.6),
            ("gradient to u", (1,), 0.5),
            ("both gradients", (0, 1), 1.0),
        ):
            program = with_gradients(spatial.warp, variables) if variables else spatial.warp
            yield Case(f"trilinear warp, {name}", f"{channels} channel{'s' * (channels > 1)}, {by(shape)}",
                       {"warp": compiled(program, image, u)}, torch_run(peers.sampling, image, u, variables),
                       target)  # fmt: skip


def smooth_displacement(shape: Shape) -> jax.Array:
    """Up to three voxels long, neighbours alike, as displacements are: neighbours read neighbours."""
    return spatial.resize(6 * noise(1, 1, *(max(n // 8, 2) for n in shape), 3) - 3, shape)


# --- 3. LNCC, integration ---


def correlations(arguments: argparse.Namespace) -> Iterator[Case]:
    """LNCC by 1-D sums, with its gradient to the moved image, against convolutions with a window of ones."""
    shape, window = ((12, 12, 12), 3) if arguments.quick else ((160, 192, 224), 9)
    fixed, moved = noise(0, 1, *shape, 1), noise(1, 1, *shape, 1)
    program = jax.value_and_grad(functools.partial(losses.lncc, window=window), 1)
    ours = compiled(program, fixed, moved)
    theirs = torch_run(peers.similarity, fixed, moved, window)
    slow = jax.default_backend() == "cpu" and not arguments.quick
    if not slow:
        # On a CPU, XLA's would take a quarter of an hour.
        with mock.patch.object(losses, "_window_sum", dense_sum):
            theirs["XLA, ones"] = compiled(lambda *operands: program(*operands), fixed, moved)
    yield Case(f"LNCC {window}³, forward and backward", by(shape), {"sums along the axes": ours}, theirs, 0.01,
               rounds=1 if slow else None)  # fmt: skip


def dense_sum(x: jax.Array, window: int) -> jax.Array:
    ones = jnp.ones((window, window, window, 1, 1), x.dtype)
    return lax.conv_general_dilated(x, ones, (1, 1, 1), "SAME", dimension_numbers=conv.LAYOUT_3D)


def integrations(arguments: argparse.Namespace) -> Iterator[Case]:
    """Scaling and squaring: its time against PyTorch's, and its compile time for 12 steps against that for 4."""
    shape = (8, 8, 8) if arguments.quick else (80, 96, 112)
    velocity = smooth_displacement(shape)
    yield Case("integration, 7 steps", by(shape), {"rolled": compiled(spatial.integrate, velocity)},
               torch_run(peers.integration, velocity, 7))  # fmt: skip

    # A new function and a new constant each time, or JAX would remember the last compilation.
    constants = itertools.count(1)

    def compilation(steps: int) -> Run:
        def run() -> None:
            factor = next(constants)
            jax.jit(lambda v: spatial.integrate(factor * v, steps)).lower(velocity).compile()

        return run

    yield Case("integration, compilation", by(shape), {"12 steps": compilation(12)}, {"4 steps": compilation(4)}, 1.2)


# --- 4. Inference ---


def inferences(arguments: argparse.Namespace) -> Iterator[Case]:
    """A pair to its finest displacement, at full resolution and from half of it on, against the official networks."""
    for shape, dtype in problems(arguments, (160, 192, 160)):
        fixed, moving = noise(0, 1, *shape, 1), noise(1, 1, *shape, 1)
        ours, extra = {}, {}
        for name in names(arguments):
            program = network_program(name, dtype, arguments.quick, fixed, moving)
            if program is not None:
                ours[name], extra[name] = program.run, work(program.compiled)
        if not ours:
            continue
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


def network_program(name: str, dtype: str, quick: bool, fixed: jax.Array, moving: jax.Array) -> Program | None:
    """None where this network does not compute in that type."""
    options = OURS[name] | (QUICK if quick else {})
    if dtype != "float32":
        if "dtype" not in models.MODELS["dilformer"].__dataclass_fields__:
            return None
        options["dtype"] = dtype
    module = models.create("dilformer", **options)
    params = random_parameters(module)
    program = jax.jit(lambda params, fixed, moving: module.apply({"params": params}, fixed, moving)[0])
    executable = program.lower(params, fixed, moving).compile()
    return Program(functools.partial(executable, params, fixed, moving), executable)


def random_parameters(module: Any) -> Any:
    """Without compiling the initialisation, which takes as long as the network's own compilation."""
    image = jax.ShapeDtypeStruct((1, *3 * (2 * module.downsampling,), 1), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), image, image)["params"]
    random = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.asarray(0.1 * random.random(leaf.shape), leaf.dtype), shapes)


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
        assert program is not None
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
    for shape, dtype in problems(arguments, (80, 96, 80)):
        run = step_run(dtype, arguments.quick, shape)
        if run is None:
            continue
        pair = noise(0, 1, *shape, 1), noise(1, 1, *shape, 1)
        name, size, ours = "training step", by(shape), {"dilformer": run}
        for peer, clone in clones(arguments):
            target = 0.5 if peer == "rdp" else None
            yield Case(name, size, ours, {peer: peers.training_step(peer, clone, *pair, dtype)}, target, dtype)
        if not clones(arguments):
            yield Case(name, size, ours, {}, 0.5, dtype)


def step_run(dtype: str, quick: bool, shape: Shape) -> Run | None:
    config = runpy.run_path(str(CONFIGS / "lpba40.py"))["get_config"]("tiny" if quick else "")
    options = config.model.options.to_dict()
    if dtype != "float32":
        if "dtype" not in models.MODELS["dilformer"].__dataclass_fields__:
            return None
        options["dtype"] = dtype
    module = models.create("dilformer", **options)
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


# --- The forms for other platforms ---


def work(executable: Any) -> Row:
    """XLA's count of a program's operations and bytes moved; a loop's body counts once."""
    analysis = executable.cost_analysis() or {}
    memory = executable.memory_analysis()
    return {
        "operations": analysis.get("flops"),
        "bytes": analysis.get("bytes accessed"),
        "temporary_gib": memory and memory.temp_size_in_bytes / 2**30,
    }


def forms(arguments: argparse.Namespace) -> Iterator[Case]:
    """The form that `ops.conv` has for the CPU against XLA's native convolution, and the other engine of the warp: on
    an accelerator this shows which to take there."""
    fine, coarse = ((8, 8, 8), (8, 8, 8)) if arguments.quick else ((80, 96, 80), (40, 48, 40))
    layers: list[tuple[str, Shape, tuple[int, ...], dict[str, Any]]] = [
        ("dense 3³", fine, (3, 3, 3, 16, 16), {}),
        ("dense 3³", coarse, (3, 3, 3, 32, 32), {}),
        ("dense 3³, dilation 2", coarse, (3, 3, 3, 32, 32), {"dilation": 2}),
        ("axis-wise 3x1x1", fine, (3, 1, 1, 16, 16), {}),
        ("axis-wise 1x3x1", fine, (1, 3, 1, 16, 16), {}),
        ("axis-wise 1x1x3", fine, (1, 1, 3, 16, 16), {}),
        ("depthwise 3³", coarse, (3, 3, 3, 64), {}),
        ("depthwise 3³, dilation 3", coarse, (3, 3, 3, 64), {"dilation": 3}),
        ("stride 2, 2³", fine, (2, 2, 2, 16, 32), {"stride": 2}),
        ("stride 2, 3³", fine, (3, 3, 3, 16, 32), {"stride": 2}),
        ("stride 2, 4³", fine, (4, 4, 4, 1, 16), {"stride": 2}),
    ]
    for name, shape, kernel_shape, options in layers[:1] if arguments.quick else layers:
        channels = kernel_shape[-1 if len(kernel_shape) == 4 else -2]
        x, kernel = noise(0, 1, *shape, channels), noise(1, *kernel_shape)
        function: Callable = functools.partial(conv.depthwise if len(kernel_shape) == 4 else conv.conv, **options)
        for suffix, program in ("forward", function), ("forward and backward", with_gradients(function)):
            cpu, native = (as_on(kind, program, x, kernel) for kind in ("cpu", "default"))
            yield Case(f"forms: {name}, {suffix}", f"{channels} to {kernel_shape[-1]}, {by(shape)}",
                       {"CPU form": cpu}, {"native": native})  # fmt: skip
    image, u = noise(0, 1, *fine, 16), smooth_displacement(fine)
    for suffix, variables in ("forward", None), ("both gradients", (0, 1)):
        ways = {}
        for engine in "gather", "map_coordinates":
            warp = functools.partial(spatial.warp, engine=engine)
            ways[engine] = compiled(with_gradients(warp, variables) if variables else warp, image, u)
        yield Case(f"forms: trilinear warp, {suffix}", f"16 channels, {by(fine)}", {"gather": ways["gather"]},
                   {"map_coordinates": ways["map_coordinates"]})  # fmt: skip


def as_on(kind: str, program: Callable, *operands: jax.Array) -> Run:
    """The program, compiled for this machine in the form that `ops.conv` has for the CPU or, 'default', for others."""
    chosen = lambda *operands, cpu, default, **_: (cpu if kind == "cpu" else default)(*operands)
    with mock.patch.object(lax, "platform_dependent", chosen):
        return compiled(program, *operands)


# --- What the cases are made of ---


def noise(seed: int, *shape: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), shape)


def with_gradients(function: Callable, variables: tuple[int, ...] = (0, 1)) -> Callable:
    """Value and gradients of the sum of squares, so that no cotangent is a constant that the compiler could use."""
    return jax.value_and_grad(lambda *operands: jnp.square(function(*operands)).sum(), variables)


def compiled(program: Callable, *operands: jax.Array) -> Run:
    # A function of its own: what JAX traced for another form must not be taken for this one.
    return functools.partial(jax.jit(lambda *operands: program(*operands)).lower(*operands).compile(), *operands)


def torch_run(make: Callable[..., Run], *operands: Any, **options: Any) -> dict[str, Run]:
    """PyTorch's way, where it is installed."""
    return {"PyTorch": make(*operands, **options)} if peers.available() else {}


def clones(arguments: argparse.Namespace) -> list[tuple[str, Path]]:
    given = [(name, getattr(arguments, name)) for name in peers.NETWORKS]
    return [(name, clone) for name, clone in given if clone and peers.available()]


def problems(arguments: argparse.Namespace, on_cpu: Shape) -> list[tuple[Shape, str]]:
    """Sizes and types of whole networks: one on the CPU, the published ones on an accelerator."""
    if arguments.quick:
        return [((32, 32, 32), "float32")]
    if jax.default_backend() == "cpu":
        return [(on_cpu, "float32")]
    return [(shape, dtype) for shape in ((160, 192, 160), (160, 192, 224)) for dtype in ("float32", "bfloat16")]


def by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
