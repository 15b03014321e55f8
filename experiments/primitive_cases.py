"""What the benchmark measures of the primitives: convolutions, warps, LNCC, integration, and their forms."""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import peers
from cases import Case, Run, Shape, by, compiled, noise, torch_run, with_gradients
from jax import lax

from dilformer_jax.ops import conv, platforms, similarities, spatial

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
    program = jax.value_and_grad(functools.partial(similarities.lncc, window=window), 1)
    ours = compiled(program, fixed, moved)
    theirs = torch_run(peers.similarity, fixed, moved, window)
    slow = jax.default_backend() == "cpu" and not arguments.quick
    if not slow:
        # On a CPU, XLA's would take a quarter of an hour.
        with mock.patch.object(similarities, "_window_sum", dense_sum):
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


# --- The forms for other platforms ---


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
    with mock.patch.object(platforms, "by_platform", chosen):
        return compiled(program, *operands)
