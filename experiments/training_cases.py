"""What the benchmark measures of a training run: the memory and time of its step, its data, its start."""

import argparse
import contextlib
import functools
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from cases import CONFIGS, Case, Row, Run, by, compiled, noise, with_gradients
from network_cases import random_parameters

from dilformer_jax import models
from dilformer_jax.data import pipeline
from dilformer_jax.data.sources import DATASETS
from dilformer_jax.ops import conv, conv_cpu, platforms
from dilformer_jax.training import feeding, parallel, state

ROOT = CONFIGS.parent


# --- 5. What a step keeps, and what calling it costs ---


def remats(arguments: argparse.Namespace) -> Iterator[Case | Row]:
    """The step that computes features anew, against the one that keeps them: memory, planned by XLA, and time."""
    config = configuration("lpba40.py", arguments)
    sizes = [(32, 32, 32)] if arguments.quick else [(80, 96, 80), (160, 192, 160)]
    for shape in sizes:
        # Full size is only compiled: run, it would need more than a small machine has.
        programs = {remat: compiled_step(config, shape, remat=remat) for remat in (False, True)}
        kept, anew = (program.memory_analysis().temp_size_in_bytes / 2**30 for program in programs.values())
        yield {
            "case": "training step, temporary memory", "of": "remat", "size": by(shape), "dtype": "float32",
            "unit": "GiB", "ours": anew, "peer": "kept", "theirs": kept, "ratio": anew / kept, "target": 0.6,
            "rounds": 1,
        }  # fmt: skip
        if shape == sizes[0]:
            runs = {remat: run_of(config, program, shape) for remat, program in programs.items()}
            yield Case("training step, time", by(shape), {"remat": runs[True]}, {"kept": runs[False]}, 1.35)
    yield dispatch(config)


def compilings(arguments: argparse.Namespace) -> Iterator[Case | Row]:
    """For a CPU: tracing its forms alone, against those of every platform; compiling as far as `training.state` does,
    against level 3, XLA's own, and the time of a step so compiled; convolutions of a small volume, against the form
    that large ones have."""
    if jax.default_backend() != "cpu":
        return
    config = configuration("lpba40_cpu.py", arguments)
    shape = (32, 32, 32) if arguments.quick else (80, 96, 80)
    image = jax.ShapeDtypeStruct((1, *shape, 1), jnp.float32, sharding=parallel.sharded(one_device()))
    _, now = step_of(config)
    spent, traced = {}, {}
    ways = (("every form", platforms.every), ("the CPU's forms", contextlib.nullcontext))
    for forms, asked in (*ways, *reversed(ways)):  # the first time with all that Python has yet to import
        with asked():
            step, _ = step_of(config)
            jax.clear_caches()
            begin = time.process_time()
            traced[forms] = step.trace(now, {"fixed": image, "moving": image})
            spent[forms] = time.process_time() - begin
    yield compared("training step, tracing", shape, {forms: spent[forms] for forms, _ in reversed(ways)}, 0.75)
    lowered = traced["the CPU's forms"].lower()
    fresh = functools.partial(state.fresh, models.create(config.model.name, **config.model.options.to_dict()))
    beginning = jax.jit(fresh).lower(jax.random.key(0))
    programs = {}
    for what, program, ours in (("fresh parameters", beginning, 0), ("training step", lowered, 1)):
        spent = {}
        for level in (ours, 3):
            begin = time.process_time()
            programs[what, level] = program.compile({"xla_backend_optimization_level": level})
            spent[level] = time.process_time() - begin
        yield compared(f"{what}, compiling", shape, {f"level {n}": seconds for n, seconds in spent.items()}, 0.75)
    first, second = ({f"level {n}": run_of(config, programs["training step", n], shape)} for n in (1, 3))
    yield Case("training step, time", by(shape), first, second, 1.05)
    x, kernel = noise(0, 2, 5, 6, 5, 128), noise(1, 3, 3, 3, 128, 128)  # of a coarsest level
    spent, runs = {}, {}
    for form, small in (("small", conv_cpu.SMALL), ("large", 0)):
        with mock.patch.object(conv_cpu, "SMALL", small):
            begin = time.process_time()
            runs[form] = compiled(with_gradients(lambda x, kernel: conv.conv(x, kernel)), x, kernel)
            spent[form] = time.process_time() - begin
    yield compared("a small volume's convolution, compiling", x.shape[1:4], spent, 0.5)
    yield Case("a small volume's convolution, time", by(x.shape[1:4]), {"small": runs["small"]},
               {"large": runs["large"]}, 1.0)  # fmt: skip


def compared(case: str, shape: tuple[int, ...], seconds: dict[str, float], target: float) -> Row:
    """A row of the CPU's seconds of two ways, each measured once."""
    (of, ours), (peer, theirs) = seconds.items()
    return {
        "case": case, "of": of, "size": by(shape), "dtype": "float32", "unit": "CPU s", "ours": ours, "peer": peer,
        "theirs": theirs, "ratio": ours / theirs, "target": target, "rounds": 1,
    }  # fmt: skip


def configuration(name: str, arguments: argparse.Namespace) -> Any:
    return runpy.run_path(str(CONFIGS / name))["get_config"]("tiny" if arguments.quick else "")


def step_of(config: Any, **how: Any) -> tuple[Any, state.State]:
    """The step of a configuration on one device, and a state for it on the host, of random numbers."""
    module = models.create(config.model.name, **config.model.options.to_dict())
    transformation = state.optimiser(total_steps=10_000, **config.optimiser.to_dict())
    step = state.step_function(
        module, transformation, config.loss.to_dict(), bidirectional=config.bidirectional, mesh=one_device(), **how
    )
    params = jax.device_get(random_parameters(module))
    return step, state.State(np.int32(0), params, jax.device_get(transformation.init(params)))


def one_device() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "space"))


def compiled_step(config: Any, shape: tuple[int, ...], **how: Any) -> Any:
    step, now = step_of(config, **how)
    image = jax.ShapeDtypeStruct((1, *shape, 1), jnp.float32, sharding=parallel.sharded(one_device()))
    return step.lower(now, {"fixed": image, "moving": image}).compile()


def run_of(config: Any, program: Any, shape: tuple[int, ...]) -> Run:
    now = jax.device_put(step_of(config)[1], parallel.replicated(one_device()))
    images = np.random.default_rng(0).random((2, 1, *shape, 1), np.float32)
    batch = feeding.feeder(one_device())(dict(zip(("fixed", "moving"), images, strict=True)))

    def run() -> Any:
        nonlocal now
        now, measured = program(now, batch)
        return measured

    return run


def dispatch(config: Any, calls: int = 200) -> Row:
    """Python's part of a step: a call with the whole state, every leaf donated, of a program that passes it on."""
    place = parallel.replicated(one_device())
    metrics = dict.fromkeys(("loss", "similarity", "regulariser", "regulariser_share", "gradient_norm"), 0.0)

    def nothing(now, batch):
        advanced = jax.tree.map(lambda x: x + 1 if x.ndim == 0 else x, now)
        return advanced, jax.tree.map(lambda value: value + batch["fixed"][0, 0, 0, 0, 0], metrics)

    step = jax.jit(nothing, donate_argnums=0, out_shardings=(place, place))
    image = jnp.zeros((1, 8, 8, 8, 1))
    now, batch = jax.device_put(step_of(config)[1], place), {"fixed": image, "moving": image}
    now, _ = jax.block_until_ready(step(now, batch))
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        now, measured = step(now, batch)
        seconds.append(time.perf_counter() - start)
        jax.block_until_ready((now, measured))
    return {
        "case": "calling a step, Python's time", "size": f"{len(jax.tree.leaves(now))} arrays", "dtype": "float32",
        "unit": "s", "ours": statistics.median(seconds), "peer": "a millisecond", "theirs": 1e-3,
        "ratio": statistics.median(seconds) / 1e-3, "target": 1.0, "rounds": calls,
    }  # fmt: skip


# --- 6. Data ---


def feeds(arguments: argparse.Namespace) -> Iterator[Row]:
    """A step fed in each way of `data.cache` against the same step on a batch that is there already, and a batch by
    itself; of the data set of `lpba40_cpu.py`, where it is, or of phantoms for --quick."""
    config = configuration("demo.py" if arguments.quick else "lpba40_cpu.py", arguments)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        directory = Path(f"{folder}/phantoms" if arguments.quick else arguments.data or ROOT / config.data.directory)
        if not arguments.quick and not directory.is_dir():
            return
        pairs = DATASETS[config.data.name](directory, **config.data.options.to_dict()).train
        preprocessing = config.data.preprocessing.to_dict()
        shape = pipeline.common_shape(pairs, preprocessing)
        volumes = feeding.upload(pairs, preprocessing, shape, parallel.replicated(one_device()))
        step, first = step_of(config)
        now = jax.device_put(first, parallel.replicated(one_device()))
        ways: dict[str, Callable[[], Any]] = {}
        for cache in "memory", "folder", "device":
            batches = stack.enter_context(
                pipeline.batches(
                    pairs, preprocessing, batch_size=1, seed=0, flips=config.data.flips, affine=(0.05, 0.02),
                    images=cache != "device", cache=f"{folder}/cache" if cache == "folder" else None,
                )
            )  # fmt: skip
            feed = feeding.feeder(one_device(), None, volumes if cache == "device" else None)
            ways[cache] = lambda batches=batches, feed=feed: feed(next(batches))
        there = ways["device"]()

        def loop(supply: Callable[[], Any], count: int) -> float:
            """Seconds of a step in a loop as `train` has it: the next batch ahead, the figures of a step behind."""
            nonlocal now
            images, running = supply(), []
            jax.block_until_ready((now, images))
            start = time.perf_counter()
            for _ in range(count):
                now, measured = step(now, images)
                running.append(measured)
                images = supply()
                if len(running) > 1:
                    jax.device_get(running.pop(0))
            jax.device_get(running.pop())
            return (time.perf_counter() - start) / count

        loop(lambda: there, 1)
        for supply in ways.values():
            # Each program compiled, and each subject decoded, before anything is timed.
            for _ in range(2):
                jax.block_until_ready(supply())
        for subject in {subject for pair in pairs for subject in (pair.fixed, pair.moving)}:
            pipeline.load_image(subject, preprocessing)
            pipeline.load_image(subject, preprocessing, cache=f"{folder}/cache")
        of_a_batch: dict[str, float] = {}
        for name, supply in ways.items():
            times = []
            for _ in range(3):
                start = time.perf_counter()
                # More than the two batches that are read ahead.
                for _ in range(12):
                    jax.block_until_ready(supply())
                times.append((time.perf_counter() - start) / 12)
            of_a_batch[name] = statistics.median(times)
        for name, supply in ways.items():
            fed, alone = [], []
            for _ in range(1 if arguments.quick else arguments.rounds):
                alone.append(loop(lambda: there, 3))
                fed.append(loop(supply, 3))
            ratios = [a / b for a, b in zip(fed, alone, strict=True)]
            yield {
                "case": f"training step fed from {name}", "size": by(shape), "dtype": "float32", "unit": "s",
                "ours": statistics.median(fed), "peer": "not fed", "theirs": statistics.median(alone),
                "ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)], "target": 1.03,
                "rounds": len(ratios), "of_a_batch": of_a_batch[name],
            }  # fmt: skip
        for name in ways:
            # What feeding would cost if nothing of it were hidden behind the step.
            alone_now = statistics.median(alone)
            yield {
                "case": f"a batch from {name}, against a step", "size": by(shape), "dtype": "float32", "unit": "s",
                "ours": of_a_batch[name], "peer": "step", "theirs": alone_now,
                "ratio": of_a_batch[name] / alone_now, "target": 0.03, "rounds": 3,
            }  # fmt: skip


# --- 9. Start-up ---


def starts(arguments: argparse.Namespace) -> Iterator[Row]:
    """By the clock from outside: imports, --help, and a `:tiny` run with an empty and a filled compilation cache."""
    python = sys.executable
    commands = {
        "import dilformer_jax": ([python, "-c", "import dilformer_jax"], 1.5),
        "dilformer --help": ([python, "-m", "dilformer_jax", "--help"], 1.0),
    }
    for name in "train", "evaluate", "register", "export":
        commands[f"{name} --help"] = ([python, "-m", f"dilformer_jax.{name}", "--help"], 1.0)
    for case, (command, target) in commands.items():
        seconds = [clocked(command) for _ in range(1 if arguments.quick else 5)]
        yield {
            "case": case, "size": "", "dtype": "float32", "unit": "s", "ours": statistics.median(seconds),
            "peer": "allowed", "theirs": target, "ratio": statistics.median(seconds) / target, "target": 1.0,
            "rounds": len(seconds),
        }  # fmt: skip
    if arguments.quick:
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [
            python, "-m", "dilformer_jax.train", "--config", f"{CONFIGS}/demo.py:tiny", "--config.total_steps=2",
            "--config.validate_every=2", "--config.checkpoint_every=2", f"--config.data.directory={folder}/phantoms",
        ]  # fmt: skip
        environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/caches"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        first_step = {}
        for case in "cold", "warm":
            workdir = Path(folder) / case
            whole = clocked([*command, "--workdir", str(workdir)], env=environment)
            # Until the first step is done: compiling the step, and reading its data.
            first_step[case] = json.loads((workdir / "timing.jsonl").read_text().splitlines()[0])["seconds"]
            yield {
                "case": f"two steps of demo:tiny, {case} compilation cache", "size": "", "dtype": "float32",
                "unit": "s", "ours": whole, "rounds": 1, "first_step": first_step[case],
            }  # fmt: skip
        yield {
            "case": "its first step", "of": "warm", "size": "", "dtype": "float32", "unit": "s",
            "ours": first_step["warm"], "peer": "cold", "theirs": first_step["cold"],
            "ratio": first_step["warm"] / first_step["cold"], "rounds": 1,
        }  # fmt: skip


def clocked(command: list[str], **settings: Any) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT, **settings)
    return time.perf_counter() - start
