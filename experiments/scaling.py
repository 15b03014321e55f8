"""One volume on several devices, measured on simulated ones: `python experiments/scaling.py --devices 8 --space 8`.

Compiles the training step of a configuration for one device and for a mesh, and prints, as one line of JSON: the
temporary memory of each device, what the compiled program exchanges in a step (its own collectives, in bytes sent by a
device), and whether it gathers anything. With --run both programs do a step, and their losses and gradients are
compared; without, no volume is ever made, so that full size needs only the compiler's memory.
`experiments/results/scaling.md` has what it printed.
"""

import argparse
import functools
import json
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1}
COLLECTIVES = "collective-permute|all-reduce|all-gather|all-to-all|reduce-scatter"


def exchanged(text: str) -> dict[str, dict[str, int]]:
    """Number and bytes of a compiled program's collectives; those inside of a loop apart, as once each.

    The only loops with collectives are the rings of `ops.ring`, which run only where a displacement reaches beyond a
    slab's halo.
    """
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    found: dict[str, Counter[str]] = {}
    looping = False
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            looping = header[1] in bodies
        if call := re.search(rf" = (.*?) ({COLLECTIVES})(?:-start)?\(", line):
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", call[1])
            size = sum(BYTES[kind] * _product(shape) for kind, shape in shapes)
            kind = found.setdefault(call[2] + (" in a ring" if looping else ""), Counter())
            kind["number"] += 1
            kind["bytes"] += size
            kind["largest"] = max(kind["largest"], size)
    return {kind: dict(counts) for kind, counts in found.items()}


def _product(shape: str) -> int:
    product = 1
    for size in filter(None, shape.split(",")):
        product *= int(size)
    return product


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    # After main has said how many devices there are to be.
    import jax
    import numpy as np
    import optax  # type: ignore[import-untyped]
    from scipy import ndimage  # type: ignore[import-untyped]

    from dilformer_jax import cli, models
    from dilformer_jax.training import feeding, parallel, state

    config = cli.load_config(str(arguments.config))
    module = models.create(config.model.name, **config.model.options.to_dict())
    # Plain descent, so that what a step changes is its gradient.
    transformation = optax.sgd(1.0)
    pairs = arguments.devices // arguments.space
    shape = tuple(arguments.size)
    # Smooth, for a gradient jumps where a point passes a voxel: in noise, rounding alone would make it another.
    noise = np.random.default_rng(0).random((2, pairs, *shape, 1), np.float32)
    fixed, moving = ndimage.gaussian_filter(noise, (0, 0, 2, 2, 2, 0)) * 20 - 9.5
    params: Any = None
    row: dict[str, Any] = {"config": arguments.config.stem, "size": shape, "pairs": pairs}
    results = {}
    for name, space, devices in ("one", 1, 1), ("mesh", arguments.space, arguments.devices):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]).reshape(-1, space), ("data", "space"))
        split = parallel.slabs(mesh, shape[0], module.downsampling)
        step = state.step_function(
            module, transformation, config.loss.to_dict(), bidirectional=config.bidirectional, mesh=mesh, split=split
        )
        first = state.initial(module, transformation, 0) if params is None else None
        if first is not None:
            # Copies, which no step that uses up its state can write into.
            params = jax.tree.map(np.array, first.params)
            for head in (key for key in params if key.startswith("head")):
                # Displacements of voxels, as a trained network's.
                params[head]["Conv_0"]["kernel"] = params[head]["Conv_0"]["kernel"] * arguments.head
        now = state.State(np.int32(0), params, transformation.init(params))
        planes = split.count * split.planes if split else shape[0]
        volumes = jax.ShapeDtypeStruct((pairs, planes, *shape[1:], 1), np.float32, sharding=parallel.sharded(mesh))
        start = time.perf_counter()
        program = step.lower(now, {"fixed": volumes, "moving": volumes}).compile()
        row[name] = {
            "mesh": dict(mesh.shape),
            "planes": planes // space,
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
            "exchanged": exchanged(program.as_text()),
            "compile_seconds": round(time.perf_counter() - start, 1),
        }
        if arguments.run:
            run = functools.partial(after, program, now, mesh, feeding.feeder(mesh, split))
            results[name] = run({"fixed": fixed, "moving": moving})
            if name == "one":
                # How far rounding alone takes it: the same with images that differ in their last bit.
                results["rounded"] = run({"fixed": np.nextafter(fixed, np.float32(2)), "moving": moving})
    row["memory_ratio"] = round(row["mesh"]["temporary_bytes"] / row["one"]["temporary_bytes"], 4)
    if arguments.run:
        losses = {name: float(measured["loss"]) for name, (_, measured) in results.items()}
        gradients = {
            name: np.concatenate(
                [np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, (params, now.params)), strict=True)]
            )
            for name, (now, _) in results.items()
        }
        largest = float(np.abs(gradients["one"]).max())
        row["loss"], row["largest_gradient"] = losses["one"], largest
        for name in "mesh", "rounded":
            row[f"{name}, loss difference"] = abs(losses[name] - losses["one"])
            norms = [float(results[key][1]["gradient_norm"]) for key in (name, "one")]
            row[f"{name}, gradient norm over one's"] = norms[0] / norms[1]
            apart = np.abs(gradients[name] - gradients["one"]).max()
            row[f"{name}, gradient difference of largest"] = float(apart / largest)
    return row


def after(program: Any, now: Any, mesh: Any, feed: Any, images: Any) -> Any:
    """State and figures after the step, on the host."""
    import jax
    import numpy as np

    from dilformer_jax.training import parallel

    now = jax.tree.map(np.array, now)
    return jax.tree.map(np.array, program(jax.device_put(now, parallel.replicated(mesh)), feed(images)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIGS / "lpba40.py")
    parser.add_argument("--devices", type=int, default=8, help="simulated devices")
    parser.add_argument("--space", type=int, default=8, help="how many of them share each volume")
    parser.add_argument("--size", nargs=3, type=int, default=(160, 192, 160), metavar=("D", "H", "W"))
    parser.add_argument("--run", action="store_true", help="compare a step as well")
    parser.add_argument("--head", type=float, default=3e3, help="by how much the heads' first kernels are enlarged")
    arguments = parser.parse_args()
    if arguments.devices % arguments.space:
        parser.error(f"--space {arguments.space} does not divide --devices {arguments.devices}")
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={arguments.devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    json.dump(measured(arguments), sys.stdout)
    print()


if __name__ == "__main__":
    main()
