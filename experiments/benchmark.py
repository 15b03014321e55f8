"""Every speed that this project claims, measured: `python experiments/benchmark.py [--quick] [--json FILE]`.

What is compared takes turns within one run, after compilation, and the ratio is the median of the rounds' own ratios:
other load on the machine falls on both. Times are medians (and extremes) over the rounds. Runs wherever JAX does; on
an accelerator the convolution's CPU form is measured too, which shows why it is not used there.
"""

import argparse
import datetime
import functools
import json
import math
import os
import platform
import runpy
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax

from dilformer_jax import models
from dilformer_jax.ops import conv, losses, spatial
from dilformer_jax.training import parallel, state

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SECTIONS = ("conv", "warp", "lncc", "network", "step")
Shape = tuple[int, int, int]
Run = Callable[[], Any]
# What is measured, its size, and the ways of doing it; the first is this package's, the others are set against it.
Comparison = tuple[str, str, dict[str, Run]]


# --- What is compared ---


def convolutions(image: Shape, finest: int, width: int) -> Iterator[Comparison]:
    """The network's layers, at its finest and next level: the form for the CPU against XLA's native 3-D convolution."""
    fine = half(image, finest)
    coarse, wide = half(fine, 1), 2 * width
    dilated, strided = functools.partial(conv.conv, dilation=2), functools.partial(conv.conv, stride=2)
    layers: list[tuple[str, Shape, int, tuple[int, ...], Callable]] = [
        ("dense 3³", fine, width, (3, 3, 3, width, width), conv.conv),
        ("dense 3³", coarse, wide, (3, 3, 3, wide, wide), conv.conv),
        ("dense 3³, dilation 2", coarse, wide, (3, 3, 3, wide, wide), dilated),
        ("axis-wise 3x1x1", fine, width, (3, 1, 1, width, width), conv.conv),
        ("axis-wise 1x1x3", fine, width, (1, 1, 3, width, width), conv.conv),
        ("depthwise 3³", coarse, wide, (3, 3, 3, wide), conv.depthwise),
        ("depthwise 3³, dilation 2", coarse, wide, (3, 3, 3, wide), functools.partial(conv.depthwise, dilation=2)),
        ("stride 2, 2³", fine, width, (2, 2, 2, width, wide), strided),
        ("stride 2, 3³", fine, width, (3, 3, 3, width, wide), strided),
    ]
    if finest:
        layers.append(("stride 2, 4³", image, 1, (4, 4, 4, 1, width), strided))
    for name, shape, channels, kernel_shape, function in layers:
        x, kernel = noise(0, 1, *shape, channels), noise(1, *kernel_shape)
        size = f"{by(shape)}, {channels} to {kernel_shape[-1]}"
        for suffix, program in ("", function), (", forward and gradient", with_gradients(function)):
            forms = {"CPU form": as_on("cpu", program, x, kernel), "native": as_on("default", program, x, kernel)}
            yield name + suffix, size, forms


def as_on(kind: str, program: Callable, *operands: jax.Array) -> Run:
    """The program, compiled for this machine in the form that `ops.conv` has for the CPU or, 'default', for others."""
    chosen = lambda *operands, cpu, default: (cpu if kind == "cpu" else default)(*operands)
    # A function of its own: what JAX traced for the other form must not be taken for this one.
    with mock.patch.object(lax, "platform_dependent", chosen):
        return functools.partial(jax.jit(lambda *operands: program(*operands)).lower(*operands).compile(), *operands)


def warps(full: Shape, features: Shape, width: int) -> Iterator[Comparison]:
    """The warp by gathers against `jax.scipy.ndimage.map_coordinates`."""
    for shape, channels in (full, 1), (features, width):
        image = noise(0, 1, *shape, channels)
        # Smooth, up to three voxels long, as displacements are: neighbours read neighbours.
        u = spatial.resize(6 * noise(1, 1, *(max(n // 8, 2) for n in shape), 3) - 3, shape)
        for name, variables in ("forward", None), ("gradient to u", 1), ("gradient to image and u", (0, 1)):
            engines: dict[str, Run] = {}
            for engine in "gather", "map_coordinates":
                warp = functools.partial(spatial.warp, engine=engine)
                program = warp if variables is None else with_gradients(warp, variables)
                engines[engine] = functools.partial(jax.jit(program), image, u)
            yield f"trilinear warp, {name}", f"{by(shape)}, {channels} channel{'s' * (channels > 1)}", engines


def correlations(shape: Shape, window: int) -> Iterator[Comparison]:
    """LNCC by three 1-D sums an axis against one convolution with a window of ones, as VoxelMorph has it."""
    fixed, moved = noise(0, 1, *shape, 1), noise(1, 1, *shape, 1)
    separable = functools.partial(losses.lncc, window=window)

    def dense_sum(x: jax.Array, window: int) -> jax.Array:
        ones = jnp.ones((window, window, window, 1, 1), x.dtype)
        return lax.conv_general_dilated(x, ones, (1, 1, 1), "SAME", dimension_numbers=conv.LAYOUT_3D)

    for suffix, program in ("forward", separable), ("forward and gradient", jax.value_and_grad(separable, 1)):
        compile_now = lambda program: jax.jit(lambda f, m: program(f, m)).lower(fixed, moved).compile()
        ours = compile_now(program)
        with mock.patch.object(losses, "_window_sum", dense_sum):
            dense = compile_now(program)
        runs: dict[str, Run] = {
            "separable sums": functools.partial(ours, fixed, moved),
            "dense window": functools.partial(dense, fixed, moved),
        }
        yield f"LNCC {window}³, {suffix}", by(shape), runs


def networks(name: str, module: Any, params: Any, shape: Shape) -> Iterator[Comparison]:
    """A pair to its displacements."""
    forward = jax.jit(lambda params, fixed, moving: module.apply({"params": params}, fixed, moving)[0])
    operands = jax.device_put(params), noise(0, 1, *shape, 1), noise(1, 1, *shape, 1)
    yield f"{name}, forward, one pair", by(shape), {"network": functools.partial(forward, *operands)}


def steps(config: Any, module: Any, transformation: Any, first: state.State, shape: Shape) -> Iterator[Comparison]:
    """A training step as `train` makes it, one pair a device."""
    replicated, sharded = parallel.shardings(parallel.mesh())
    now = jax.device_put(first, replicated)
    loss, bidirectional = config.loss.to_dict(), config.bidirectional
    advance = state.step_function(
        module, transformation, loss, bidirectional=bidirectional, shardings=(replicated, sharded)
    )
    pairs = jax.local_device_count()
    batch = parallel.to_devices(
        {"fixed": jax.device_get(noise(0, pairs, *shape, 1)), "moving": jax.device_get(noise(1, pairs, *shape, 1))},
        sharded,
    )

    def run() -> Any:
        nonlocal now
        now, measured = advance(now, batch)
        return now, measured

    directions = "both directions" if bidirectional else "one direction"
    name = f"{config.model.name}, training step, {pairs} pair{'s' * (pairs > 1)}, {directions}"
    yield name, by(shape), {"step": run}


def noise(seed: int, *shape: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), shape)


def with_gradients(function: Callable, variables: int | tuple[int, ...] = (0, 1)) -> Callable:
    """Value and gradients of the sum of squares, so that no cotangent is a constant that the compiler could use."""
    return jax.value_and_grad(lambda *operands: jnp.square(function(*operands)).sum(), variables)


def half(shape: Shape, times: int) -> Shape:
    d, h, w = (size // 2**times for size in shape)
    return d, h, w


def by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


# --- Timing ---


def measure(runs: dict[str, Run], rounds: int, budget: float) -> dict[str, list[float]]:
    """Seconds of each, taking turns: as many rounds as asked for, fewer (at least one) once `budget` seconds are up."""
    for run in runs.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    while len(next(iter(seconds.values()))) < rounds:
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
        if time.perf_counter() - begin > budget:
            break
    return seconds


def machine() -> dict[str, Any]:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    return {
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "jax": jax.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load": load,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def time_text(seconds: list[float]) -> str:
    scale, digits = (1e3, 1) if statistics.median(seconds) < 1 else (1.0, 2)
    middle, low, high = (f"{scale * value:.{digits}f}" for value in (statistics.median(seconds), *extremes(seconds)))
    return f"{middle} {'ms' if scale > 1 else 's'} ({low} to {high})"


def extremes(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


# --- The run ---


def comparisons(arguments: argparse.Namespace) -> Iterator[Comparison]:
    """Everything asked for, built as it is needed."""
    sizes: list[Shape] = arguments.size or ([(32, 32, 32)] if arguments.quick else [(80, 96, 80)])
    config = runpy.run_path(str(arguments.config))["get_config"]("tiny" if arguments.quick else "")
    accelerated = jax.default_backend() != "cpu"
    if accelerated and not arguments.quick and not arguments.size:
        sizes.append((160, 192, 160))
    module = models.create(config.model.name, **config.model.options.to_dict())
    transformation = state.optimiser(total_steps=10_000, **config.optimiser.to_dict())
    # Compiled once, and kept on the host: a step uses up the state that it is given.
    first = functools.cache(lambda: jax.device_get(state.initial(module, transformation, 0)))
    width, finest = config.model.options.get("width", 16), config.model.options.get("finest", 0)
    for index, shape in enumerate(sizes):
        if "conv" in arguments.only:
            yield from convolutions(shape, finest, width)
        if "warp" in arguments.only:
            yield from warps(shape, half(shape, max(finest, 1)), width)
        if "lncc" in arguments.only and (accelerated or index == 0):
            # The dense window of full-size volumes takes a CPU minutes.
            yield from correlations(shape if accelerated else half(shape, 1), 9)
        if "network" in arguments.only:
            yield from networks(config.model.name, module, first().params, shape)
        if "step" in arguments.only and (accelerated or math.prod(shape) <= 10**6):
            yield from steps(config, module, transformation, first(), shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size_help = "the network's input, may be repeated (80 96 80; on an accelerator also 160 192 160)"
    parser.add_argument("--size", nargs=3, type=int, action="append", metavar=("D", "H", "W"), help=size_help)
    parser.add_argument("--config", type=Path, default=CONFIGS / "lpba40_cpu.py", help="network, loss and optimiser")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="parts to measure")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each, at most")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds after which a comparison gets no new round")
    parser.add_argument("--quick", action="store_true", help="tiny volumes and network: shows that it runs, not speed")
    parser.add_argument("--json", type=Path, help="every timing, in seconds")
    arguments = parser.parse_args()

    where = machine()
    print(f"JAX {where['jax']} on {where['backend']} ({', '.join(where['devices'])}), {where['cores']} cores, "
          f"load {where['load']:.1f} at the start, {where['date']}; at most {arguments.rounds} rounds\n")  # fmt: skip
    print("| measured | size | ours: median (range) | against: median (range) | against / ours (range) |")
    print("| --- | --- | --- | --- | --- |")
    rows = []
    for name, size, runs in comparisons(arguments):
        seconds = measure(runs, arguments.rounds, arguments.budget)
        (ours, mine), *others = seconds.items()
        against = [f"{other}: {time_text(theirs)}" for other, theirs in others]
        ratios = [[b / a for a, b in zip(mine, theirs, strict=True)] for _, theirs in others]
        shown = [f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios]
        first = f"{ours}: {time_text(mine)}"
        print(f"| {name} | {size} | {first} | {'; '.join(against)} | {'; '.join(shown)} |", flush=True)
        rows.append({"measured": name, "size": size, "seconds": seconds})
        if arguments.json:
            # After each row: a run stopped half-way has not been for nothing.
            partial = arguments.json.with_name(arguments.json.name + ".partial")
            partial.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")
            partial.replace(arguments.json)


if __name__ == "__main__":
    main()
