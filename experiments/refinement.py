"""Scores `register`'s presets beside an affine map, SyN and the network alone, pair by pair.

    python experiments/refinement.py --name oasis_trt --data DIR --methods affine fast default best --output FILE.jsonl
    python experiments/refinement.py --summary FILE.jsonl

It writes one line of JSON for each pair and method; a run goes on where it was stopped. `alone` is the preset 'default'
without a network. `syn` and `syncc` are ANTsPy's types SyN and SyNCC with their own settings and affine alignment, on
the images' own grids, intensities scaled by percentiles. Our methods begin with the alignment of `register`. Labels are
warped to the fixed image's own grid by nearest neighbour.

Pairs: of lpba40 all 30 of the validation brains, of oasis_trt every fourth of the 56 ordered pairs, of ixi_2mm 12 drawn
by seed 0. With --contrast the moving image is recoloured as in experiments/contrasts.py.
"""

import argparse
import dataclasses
import itertools
import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from contrasts import pairs_of, recoloured  # type: ignore[import-not-found]

from dilformer_jax.data.subjects import Pair, Subject
from dilformer_jax.io import executables
from dilformer_jax.io.geometry import apply_affine, spacing
from dilformer_jax.io.transforms import Grid, Transform, carried
from dilformer_jax.io.volumes import Volume, normalise, read_image, read_labels
from dilformer_jax.io.voxel_fields import displacement as in_voxels
from dilformer_jax.ops import folding, overlap, surfaces
from dilformer_jax.registration import refine, syn
from dilformer_jax.registration.affine import align
from dilformer_jax.registration.grids import content
from dilformer_jax.registration.pipeline import register
from dilformer_jax.registration.predictor import load_predictor
from dilformer_jax.registration.warps import warped

OURS = ("fast", "default", "best", "alone")
METHODS = ("affine", *OURS, "syn", "syncc")
EVERY = 4  # of the ordered pairs of oasis_trt


def chosen_pairs(name: str, directory: Path) -> tuple[list[Pair], tuple[int, ...]]:
    if name == "lpba40":
        return pairs_of(name, directory, 30)
    if name == "ixi_2mm":
        return pairs_of(name, directory, 12)
    images = sorted(directory.glob("*_t1.nii.gz"))
    subjects = [Subject(i.name[:-10], i, i.with_name(i.name.replace("_t1", "_seg"))) for i in images]
    maps = [read_labels(subject.labels) for subject in subjects if subject.labels is not None]
    ids = sorted({int(i) for labels in maps for i in np.unique(labels.array) if 1000 < i < 3000})
    return [Pair(*both) for both in itertools.permutations(subjects, 2)][::EVERY], tuple(ids)


def by_ants(kind: str) -> Callable[[Volume, Volume], tuple[Transform, Transform, np.ndarray]]:
    def found(fixed, moving):
        import ants

        with tempfile.TemporaryDirectory() as folder:
            images = []
            for image in (fixed, moving):
                # LPS, as ITK has it; ANTs gets the images as register does, scaled.
                place = np.diag([-1, -1, 1, 1]) @ image.affine
                sides = np.array(spacing(image.affine))
                images.append(
                    ants.from_numpy(
                        normalise(image.array, "percentile"),
                        origin=tuple(place[:3, 3]),
                        spacing=tuple(float(s) for s in sides),
                        direction=place[:3, :3] / sides,
                    )
                )
            result = ants.registration(
                *images, type_of_transform={"syn": "SyN", "syncc": "SyNCC"}[kind], outprefix=f"{folder}/"
            )
            there = syn.transform(result["fwdtransforms"])
            grid = Grid(fixed.array.shape, fixed.affine)
            # Folding is that of the deformation field alone, without the affine map.
            fields = [step for step in there if not isinstance(step, np.ndarray)]
            return there, (), in_voxels(tuple(fields), grid, grid)

    return found


def scored(
    fixed: tuple[Volume, Volume], moving: tuple[Volume, Volume], ids: tuple[int, ...], transform: Transform
) -> dict[str, Any]:
    labels = warped(moving[1], transform, fixed[0].array.shape, fixed[0].affine, "nearest")
    values = overlap.dice(fixed[1].array, labels, ids, moving[1].array)
    distances = surfaces.surface_scores(
        fixed[1].array, labels, ids, spacing(fixed[0].affine), moving[1].array, only=("hd95",)
    )
    return {"dice": float(np.nanmean(values)), "hd95": float(np.nanmean(distances["hd95"]))}


def inverse_error(fixed: Volume, there: Transform, back: Transform) -> float:
    """Mean distance in mm of points of the fixed brain from where they started, there and back."""
    shown = np.argwhere(content(fixed.array))
    random = np.random.default_rng(0)
    voxels = shown[random.choice(len(shown), 20_000)] + random.uniform(-0.5, 0.5, (20_000, 3))
    start = apply_affine(fixed.affine, voxels)
    return float(np.linalg.norm(carried(carried(start, there), back) - start, axis=1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--summary", type=Path, nargs="+", help="print means and intervals of files, and do no more")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--name", choices=("lpba40", "oasis_trt", "ixi_2mm"))
    parser.add_argument("--contrast", action="store_true", help="recolour the moving image")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["affine", "fast", "default"])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take only every Nth of these pairs")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="skip the first K pairs")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.summary:
        summarise([json.loads(line) for file in options.summary for line in file.read_text().splitlines()])
        return

    executables.keep()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    predictor = load_predictor("default")
    pairs, ids = chosen_pairs(options.name, options.data)
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    done = {(row["pair"], row["method"]) for row in map(json.loads, lines)}
    for number, pair in list(enumerate(pairs))[options.first :: options.every]:
        todo = [method for method in options.methods if (pair.name, method) not in done]
        if not todo:
            continue
        assert pair.fixed.labels is not None and pair.moving.labels is not None
        fixed = read_image(pair.fixed.image), read_labels(pair.fixed.labels)
        moving = read_image(pair.moving.image), read_labels(pair.moving.labels)
        if options.contrast:
            image = dataclasses.replace(moving[0], array=recoloured(moving[0].array, number))
            moving = image, moving[1]
        wall, cpu = time.perf_counter(), _cpu()
        matrix = align(fixed[0], moving[0]).matrix  # once for all methods, and counted for each of ours
        aligning = time.perf_counter() - wall, _cpu() - cpu
        for method in todo:
            row: dict[str, Any] = {"name": options.name + options.contrast * "_contrast", "pair": pair.name}
            row |= {"fixed": pair.fixed.name, "method": method, "commit": commit.stdout.strip()}
            wall, cpu = time.perf_counter(), _cpu()
            if method in OURS:
                network = None if method == "alone" else predictor
                how = refine.PRESETS["default" if method == "alone" else method]
                result = register(fixed[0], moving[0], network, refinement=how, affine=matrix)
                there, back, u = result.transform, result.inverse_transform, result.displacement
                row["seconds"] = result.metrics["seconds"]
                row["similarity"] = None if result.refinement is None else result.refinement.similarity
            elif method == "affine":
                there, back, u = (matrix,), (np.linalg.inv(matrix),), None
            else:
                there, back, u = by_ants(method)(fixed[0], moving[0])
            before = (0.0, 0.0) if method in ("syn", "syncc") else aligning
            row |= {"wall_s": time.perf_counter() - wall + before[0], "cpu_s": _cpu() - cpu + before[1]}
            row |= scored(fixed, moving, ids, there)
            if method not in ("syn", "syncc"):
                row["inverse_mm"] = inverse_error(fixed[0], there, back)
            if u is not None:
                row |= {"folding_percent": folding.folding_percent(u), "ndv_percent": folding.ndv_percent(u)}
            row["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            with options.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def _cpu() -> float:
    times = os.times()
    return times.user + times.system


def summarise(rows: list[dict[str, Any]]) -> None:
    """Means over pairs; the interval of Dice is that of a bootstrap over fixed brains, whose pairs stay together."""
    for name, method in dict.fromkeys((row["name"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["name"], row["method"]) == (name, method)]
        brains = [[row["dice"] for row in mine if row["fixed"] == b] for b in sorted({row["fixed"] for row in mine})]
        random = np.random.default_rng(0)
        draws = random.integers(0, len(brains), (5000, len(brains)))
        low, high = np.percentile([np.mean(sum((brains[b] for b in draw), [])) for draw in draws], [2.5, 97.5])
        mean = lambda key: np.mean([row[key] for row in mine if key in row] or [np.nan])  # noqa: B023
        part = lambda key: np.mean([row.get("seconds", {}).get(key, np.nan) for row in mine])  # noqa: B023
        folds = max((row["folding_percent"] for row in mine if "folding_percent" in row), default=np.nan)
        print(
            f"| {name} | {method} | {len(mine)} | {mean('dice'):.4f} [{low:.4f}, {high:.4f}] | {mean('hd95'):.2f} | "
            f"{mean('folding_percent'):.4f} ({folds:.4f}) | {mean('ndv_percent'):.4f} | {mean('inverse_mm'):.3f} | "
            f"{mean('wall_s'):.0f} | {mean('cpu_s'):.0f} | {part('refinement'):.0f} | {mean('peak_gib'):.1f} |"
        )


if __name__ == "__main__":
    main()
