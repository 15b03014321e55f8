"""Which parts of the network and of its training help: one training after another, each with one thing changed.

    python experiments/ablation.py --data LPBA40 --output runs/ablation            (goes on where it was stopped)
    python experiments/ablation.py --output runs/ablation --table

Every run is `configs/lpba40_cpu.py` with fewer steps, at half or a quarter of LPBA40's resolution, trained on S11-S34,
scored at its last step on the 30 ordered pairs of S35-S40, their labels at full resolution. A seed gives the parameters
and the order of the pairs: runs of one seed see the same pairs. `--study parts` has the network's parts off in turn,
`recipe` what concerns their training. Each run leaves OUTPUT/SCALE-STEPS/NAME-SEED.json; `--table` prints what they
show.

An effect is the mean difference to the base's Dice, over pairs and over the seeds that both have. Its standard error
comes from the differences of single seeds to their means, which all variants of a study share; below two of them the
table says 'none shown'.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import queue
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
BASE = "base"
VOXELMORPH = {
    "name": "voxelmorph",
    "options": {"down": (16, 32, 32, 32), "up": (32, 32, 32, 32), "final": (32, 16, 16)},
}
# What is changed, by the keys of the configuration; those that begin with `test.` are options of the network at test
# time only.
STUDIES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "parts": {
        BASE: {},
        "no MSR": {"model.options.msr": False},
        "no Dilformer": {"model.options.dilformer": "plain"},
        "Dilformer on fused features": {"model.options.dilformer": "fused"},
        "no SRF": {"model.options.srf": False},
        # As large as the base.
        "no SRF, narrower": {"model.options.srf": False, "model.options.width": 10},
        "loss at one level": {"loss.weights": (1.0,), "loss.windows": (9,)},
        "dilations 1, 1, 1": {"model.options.dilations": (1, 1, 1)},
        "attention in windows": {"model.options.attention": "windows"},
        "an encoder for each stream": {"model.options.separate_encoders": True},
        "no correlation": {"model.options.correlation": False},
        "none of MSR, Dilformer, SRF": {
            "model.options.msr": False,
            "model.options.dilformer": "plain",
            "model.options.srf": False,
        },
        "two recursions": {"model.options.recursions": 2},
        "diffeomorphic": {"model.options.diffeomorphic": True},
        "VoxelMorph-2": {"model": VOXELMORPH},
    },
    "recipe": {
        BASE: {},
        "rate 5e-4": {"optimiser.learning_rate": 5e-4},
        "rate 2e-3": {"optimiser.learning_rate": 2e-3},
        "constant rate": {"optimiser.schedule": "constant"},
        "amsgrad": {"optimiser.kind": "amsgrad"},
        "adamw, decay 0.01": {"optimiser.kind": "adamw", "optimiser.decay": 0.01},
        "no clipping": {"optimiser.clip": 1e6},
        "running mean 0.99": {"average": 0.99},
        "running mean 0.995": {"average": 0.995},
        "constant rate, running mean 0.99": {"optimiser.schedule": "constant", "average": 0.99},
        "windows 5, 5, 5, 3, 3": {"loss.windows": (5, 5, 5, 3, 3)},
        "windows 13, 11, 9, 5, 3": {"loss.windows": (13, 11, 9, 5, 3)},
        "LNCC of the foreground": {"loss.foreground": True, "loss.regulariser_weight": 6.0},
        "equal weights": {"loss.weights": (1.0,) * 5},
        "coarse to fine in 0.3": {"loss.coarse_to_fine": 0.3},
        "regulariser 1": {"loss.regulariser_weight": 1.0},
        "regulariser 4": {"loss.regulariser_weight": 4.0},
        "smoothness 0.25 to 4, told": {"model.options.smoothness": (0.25, 4.0)},
        "one direction": {"bidirectional": False},
        "inverse consistency 0.1": {"loss.inverse_weight": 0.1},
        "no flips": {"data.flips": ()},
        "no affine maps": {"data.affine": (0.0, 0.0)},
        "gamma 0.2": {"data.gamma": 0.2},
        "two recursions at test time": {"test.recursions": 2},
        "labels": {"loss.label_count": 54, "loss.label_weight": 1.0},
    },
}
SCALES = ("quarter", "half")


def configured(edits: Mapping[str, Any], scale: str, steps: int, seed: int, directory: Path) -> Any:
    """The configuration of a run."""
    from dilformer_jax import cli

    config = cli.load_config(str(ROOT / "configs" / "lpba40_cpu.py"))
    config.unlock()
    given = {
        "seed": seed,
        "total_steps": steps,
        "log_every": math.gcd(50, steps),
        "validate_every": steps,
        "checkpoint_every": steps,
        "validation_pairs": 1,
        "data.directory": str(directory),
        "data.cache": "device",
        "optimiser.warmup_steps": min(50, steps // 10),
    }
    for key, value in (given | dict(edits)).items():
        *parents, name = key.split(".")
        if parents != ["test"]:
            functools.reduce(lambda node, parent: node[parent], parents, config)[name] = value
    if scale == "quarter":
        # One level less: the coarsest one is as coarse as at half the resolution.
        config.data.preprocessing.downsample = 4
        if config.model.name == "dilformer":
            config.model.options.levels -= 1
        else:
            for name in ("down", "up"):
                config.model.options[name] = config.model.options[name][1:]
        kept = max(1, len(config.loss.weights) - 1)
        config.loss.weights, config.loss.windows = config.loss.weights[:kept], config.loss.windows[-kept:]
    return config


def run(study: str, name: str, scale: str, steps: int, seed: int, directory: Path, output: Path) -> None:
    """Trains a variant with a seed, where that has not been done, and scores it."""
    from dilformer_jax import train
    from dilformer_jax.io import executables

    path = output / f"{scale}-{steps}" / f"{filed(name)}-{seed}.json"
    if path.is_file():
        return
    executables.keep()
    edits, begin = STUDIES[study][name], time.monotonic()
    workdir = path.with_suffix("")
    config = configured(edits, scale, steps, seed, directory)
    train.train(config, workdir)
    trained = time.monotonic()
    found = scored(workdir, edits, directory)
    log = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((workdir / "run.json").read_text())
    found |= {
        "name": name, "scale": scale, "steps": steps, "seed": seed,
        "edits": dict(edits),
        "loss": [line["loss"] for line in log if "loss" in line],
        "versions": record["versions"], "devices": record["devices"],
        "seconds": {"training": trained - begin, "scoring": time.monotonic() - trained},
    }  # fmt: skip
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found) + "\n")
    partial.replace(path)


def filed(name: str) -> str:
    """The name of a variant in those of files."""
    return re.sub(r"\W+", "_", name)


def scored(workdir: Path, edits: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Dice and folding of each validation pair by the parameters after the last step."""
    import jax

    from dilformer_jax.data.lpba40 import lpba40
    from dilformer_jax.ops import folding, overlap
    from dilformer_jax.registration.pipeline import warp_labels
    from dilformer_jax.registration.predictor import load_predictor

    predictor = load_predictor(workdir=workdir)
    at_test = {key.removeprefix("test."): value for key, value in edits.items() if key.startswith("test.")}
    predictor = dataclasses.replace(predictor, module=dataclasses.replace(predictor.module, **at_test))
    dataset = lpba40(directory)
    subjects = {pair.fixed.name: pair.fixed for pair in dataset.validation}
    images, labels = volumes(tuple(subjects.values()))
    pairs = []
    for pair in dataset.validation:
        u = predictor.displacement(images[pair.fixed.name], images[pair.moving.name])
        there = labels[pair.moving.name]
        dice = overlap.dice(labels[pair.fixed.name], warp_labels(there, u), dataset.labels, there)
        pairs.append({"name": pair.name, "dice": float(np.nanmean(dice)), "folding": folding.folding_percent(u)})
    count = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(predictor.params))
    return {"pairs": pairs, "parameters": count}


@functools.cache
def volumes(subjects: tuple[Any, ...]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Images and label maps of the subjects by their names, as their files have them."""
    from dilformer_jax.io.volumes import read_image, read_labels

    return (
        {subject.name: read_image(subject.image).array for subject in subjects},
        {subject.name: read_labels(subject.labels).array for subject in subjects},
    )


def table(output: Path, study: str, scale: str, steps: int) -> str:
    """What the runs of a study show, in Markdown."""
    runs: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in STUDIES[study]}
    for path in sorted((output / f"{scale}-{steps}").glob("*.json")):
        found = json.loads(path.read_text())
        if found["name"] in runs:
            runs[found["name"]][found["seed"]] = found
    if not runs[BASE]:
        return f"No run of the base in {output / f'{scale}-{steps}'} yet."
    dice = {name: {seed: mean(run, "dice") for seed, run in seeds.items()} for name, seeds in runs.items() if seeds}
    apart = {
        name: np.array([of[seed] - dice[BASE][seed] for seed in sorted(of.keys() & dice[BASE].keys())])
        for name, of in dice.items()
        if name != BASE and of.keys() & dice[BASE].keys()
    }
    error = spread(list(apart.values()))
    first = next(iter(runs[BASE].values()))
    lines = [
        f"{scale} resolution, {first['steps']} steps, {first['devices']}, commit {first['versions'].get('commit')}",
        "",
        "| | seeds | Dice | effect | standard error | | folding (%) | parameters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, of in dice.items():
        some = next(iter(runs[name].values()))
        start = f"| {name} | {len(of)} | {np.mean(list(of.values())):.4f}"
        end = f"{np.mean([mean(run, 'folding') for run in runs[name].values()]):.4f} | {some['parameters']:,} |"
        if name not in apart:
            lines.append(f"{start} | | | | {end}")
            continue
        effect, its_error = apart[name].mean(), error / np.sqrt(apart[name].size)
        # Of a single seed the error is no number, and nothing is shown.
        shown = ("better" if effect > 0 else "worse") if abs(effect) >= 2 * its_error else "none shown"
        lines.append(f"{start} | {effect:+.4f} | {its_error:.4f} | {shown} | {end}")
    return "\n".join(lines)


def mean(run: Mapping[str, Any], measure: str) -> float:
    return float(np.mean([pair[measure] for pair in run["pairs"]]))


def spread(apart: list[np.ndarray]) -> float:
    """The standard deviation of a single seed's difference, from all variants that have several seeds; not a number
    where none has."""
    freedom = sum(differences.size - 1 for differences in apart)
    squares = sum(float(np.square(differences - differences.mean()).sum()) for differences in apart)
    return float(np.sqrt(squares / freedom)) if freedom else float("nan")


def share_cores(share: str) -> None:
    """Leaves the process one of so many equal parts of its cores ('0/2' is the first of two), where the system can."""
    part, parts = map(int, share.split("/"))
    if hasattr(os, "sched_setaffinity") and (mine := sorted(os.sched_getaffinity(0))[part::parts]):
        os.sched_setaffinity(0, mine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="LPBA40's folder")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--study", choices=tuple(STUDIES), default="parts")
    parser.add_argument("--scale", choices=SCALES, default="quarter")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the variants; the base always")
    parser.add_argument("--workers", type=int, default=1, help="variants that are trained at the same time")
    parser.add_argument("--table", action="store_true", help="print what there is, in Markdown")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--share", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        print(table(options.output, options.study, options.scale, options.steps))
        return
    if options.data is None:
        parser.error("give --data, LPBA40's folder")
    if options.one is not None:
        share_cores(options.share)
        for seed in options.seeds:
            run(options.study, options.one, options.scale, options.steps, seed, options.data, options.output)
        return
    known = STUDIES[options.study]
    if unknown := [name for name in options.only or () if name not in known]:
        parser.error(f"--study {options.study} has no {unknown[0]!r}; it has {', '.join(known)}")
    names = [name for name in known if name == BASE or name in (options.only or known)]
    folder = options.output / f"{options.scale}-{options.steps}"
    folder.mkdir(parents=True, exist_ok=True)

    # Of small networks several on a core each make more steps than one on all.
    shares: queue.SimpleQueue[str] = queue.SimpleQueue()
    for worker in range(options.workers):
        shares.put(f"{worker}/{options.workers}")

    def start(name: str) -> bool:
        # A process each: a program that has been compiled stays in a process's memory.
        log, share = folder / f"{filed(name)}.log", shares.get()
        with log.open("a") as file:
            code = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--one", name, "--share", share], stdout=file, stderr=file,
                env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            ).returncode  # fmt: skip
        shares.put(share)
        print(f"{time.strftime('%H:%M:%S')} {name}: {'done' if code == 0 else f'failed, see {log}'}", flush=True)
        return code == 0

    with ThreadPoolExecutor(options.workers) as pool:
        done = list(pool.map(start, names))
    print(table(options.output, options.study, options.scale, options.steps))
    sys.exit(not all(done))


if __name__ == "__main__":
    main()
