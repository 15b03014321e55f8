"""Scores a network on T1 pairs of any grid, as they are and with the moving image in another contrast.

    python experiments/contrasts.py --workdir RUN (or --weights FILE) --data DIR --name ixi_2mm --pairs 12 --output FILE

Each pair goes through `registration.pipeline.register`, without an affine alignment unless asked for, that is, by way
of the grid that the weights were trained on, and is scored at the resolution of its labels. The other contrast is a
random curve through the T1 intensities by which fluid, grey and white matter get levels that neither rise nor fall from
one to the next; the seed is the pair's number. Ordered pairs, drawn (by seed 0) from all that the folder's subjects
make; of lpba40, from those of the validation split.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from dilformer_jax.data.sources import DATASETS
from dilformer_jax.data.subjects import Pair, ordered_pairs, subjects_of
from dilformer_jax.io.volumes import normalise, read_image, read_labels
from dilformer_jax.ops import overlap
from dilformer_jax.registration.pipeline import register
from dilformer_jax.registration.predictor import load_predictor
from dilformer_jax.registration.refine import PRESETS

# Where fluid, grey and white matter lie in a T1 image normalised by percentiles.
LEVELS = (0.25, 0.55, 0.85)


def recoloured(image: Float32[np.ndarray, "D H W"], seed: int) -> Float32[np.ndarray, "D H W"]:
    """The image, 0 where it is 0, with random levels for the three tissues, grey the darkest or the brightest."""
    generator = np.random.default_rng(seed)
    low, middle, high = np.array([0.2, 0.55, 0.9]) + generator.uniform(-0.1, 0.1, 3)
    ends = generator.permutation([middle, high] if generator.random() < 0.5 else [low, middle])
    grey = low if high in ends else high
    x = normalise(image, "percentile")
    levels = (ends[0], ends[0], grey, ends[1], ends[1])
    return np.where(image > 0, np.interp(x, (0, *LEVELS, 1), levels), 0).astype(np.float32)


def pairs_of(name: str, directory: Path, count: int) -> tuple[list[Pair], tuple[int, ...]]:
    dataset = DATASETS[name](directory)
    pairs = dataset.validation
    if name != "lpba40":
        pairs = ordered_pairs(subjects_of((*dataset.train, *dataset.validation)))
    chosen = np.random.default_rng(0).permutation(len(pairs))[:count]
    return [pairs[index] for index in chosen], dataset.labels


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--workdir", type=Path)
    which.add_argument("--weights", help="a bundle, or default")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--name", choices=("ixi_2mm", "lpba40"), required=True)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--smoothness", type=float, help="of a network that was trained for several")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="fast", help="how much to refine")
    parser.add_argument("--affine", choices=("none", "auto"), default="none", help="aligned affinely first, or not")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    predictor = load_predictor(options.weights, options.workdir).with_smoothness(options.smoothness)
    pairs, ids = pairs_of(options.name, options.data, options.pairs)
    rows = []
    for number, pair in enumerate(pairs):
        assert pair.fixed.labels is not None and pair.moving.labels is not None
        fixed, moving = read_image(pair.fixed.image), read_image(pair.moving.image)
        fixed_labels, moving_labels = read_labels(pair.fixed.labels), read_labels(pair.moving.labels)
        before = overlap.dice(fixed_labels.array, moving_labels.array, ids)
        row = {"name": pair.name, "before": float(np.nanmean(before))}
        other = dataclasses.replace(moving, array=recoloured(moving.array, number))
        for kind, image in (("t1", moving), ("other", other)):
            start = time.perf_counter()
            how = PRESETS[options.preset]
            found = register(fixed, image, predictor, fixed_labels, moving_labels, how, affine=options.affine)
            assert found.moved_labels is not None
            dice = overlap.dice(fixed_labels.array, found.moved_labels, ids, moving_labels.array)
            row |= {kind: float(np.nanmean(dice)), f"{kind}_folding_percent": found.metrics["folding_percent"]}
            row[f"{kind}_seconds"] = time.perf_counter() - start
        rows.append(row)
        print(json.dumps(row), flush=True)
    means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if key != "name"}
    print(json.dumps(means))
    options.output.write_text(json.dumps({"summary": means, "pairs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
