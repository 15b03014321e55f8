"""Toy networks whose answer is known, and the small files and bundles that tests of the commands share."""

import csv
from pathlib import Path

import jax.numpy as jnp
import nibabel as nib
import numpy as np
from scipy import ndimage

from dilformer_jax import models
from dilformer_jax.data.preprocessing import resolved
from dilformer_jax.io import bundle
from dilformer_jax.registration.predictor import Predictor

TINY = {"down": [2], "up": [2], "final": [2]}
SHAPE = (15, 18, 13)  # of the images that `write_inputs` makes


class Constant:
    """A network that moves everything by params['shift'], in voxels of half its input's resolution."""

    downsampling = 4

    def __init__(self):
        self.traced = []

    def apply(self, variables, fixed, moving):
        self.traced.append(fixed.shape)
        shape = [size // 2 for size in fixed.shape[1:4]]
        return (jnp.broadcast_to(variables["params"]["shift"], (1, *shape, 3)), None)


def predictor(module, shift=(0.0, 0.0, 0.0), **preprocessing) -> Predictor:
    return Predictor(module, {"shift": np.array(shift, np.float32)}, resolved(preprocessing), "toy", "0" * 64)


def image(shape=(16, 20, 18), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1, 200, shape).astype(np.float32)


def write(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    nifti = nib.Nifti1Image(array, affine)
    nifti.header.set_xyzt_units("mm")
    nifti.to_filename(path)
    return path


def affine() -> np.ndarray:
    """Oblique, left-handed, 1 x 1.5 x 2 mm."""
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = turn @ np.diag([-1.0, 1.5, 2.0]), (40, -30, 12)
    return matrix


def tiny_bundle(folder: Path, **changes) -> Path:
    """An untrained VoxelMorph with a head that moves everything by (1, -2, 0.5) voxels and a little by the images."""
    import jax

    network = models.create("voxelmorph", **TINY)
    volume = jnp.zeros((1, 8, 8, 8, 1))
    params = jax.device_get(network.init(jax.random.key(0), volume, volume)["params"])
    head = {name: array * 1e3 for name, array in bundle.flatten(params["head"]).items()}
    bias = next(name for name in head if name.endswith("bias"))
    params["head"] = bundle.unflatten({**head, bias: np.array([1, -2, 0.5], np.float32)})
    grid = {"shape": list(SHAPE), "spacing_mm": [1, 1.5, 2], "orientation": "LAS"}
    description = {
        "network": {"name": "voxelmorph", "options": TINY},
        "preprocessing": {"normalise": "max", "downsample": 1},
        "grid": grid,
        "labels": [1, 2],
        "training": {"dataset": "phantoms", "options": {}, "licence": "ours", "steps": 0, "seed": 0},
        "validation": {},
        "versions": {},
    }
    bundle.save(folder, params, {**description, **changes})
    return folder


def write_inputs(folder: Path) -> Path:
    """Two images on one grid with their labels, an untrained network, and files that something is wrong with."""
    tiny_bundle(folder / "weights")
    fixed, moving = (ndimage.gaussian_filter(image(SHAPE, seed), 1.5) for seed in (0, 1))
    labels = np.zeros(fixed.shape, np.uint8)
    labels[3:9, 4:12, 3:10], labels[9:13, 6:14, 3:10] = 3, 5
    write(folder / "fixed.nii.gz", fixed, affine()), write(folder / "moving.nii.gz", moving, affine())
    write(folder / "labels.nii.gz", labels, affine())
    write(folder / "moving_labels.nii.gz", np.roll(labels, 1, 0), affine())
    elsewhere = affine()
    elsewhere[2, 3] += 3
    write(folder / "elsewhere.nii.gz", moving, elsewhere), write(folder / "labels_elsewhere.nii.gz", labels, elsewhere)
    write(folder / "fractions.nii.gz", labels + np.float32(0.5), affine())
    write(folder / "frames.nii.gz", np.stack([moving, fixed], -1), affine())
    write(folder / "nan.nii.gz", np.where(labels == 3, np.float32(np.nan), moving), affine())
    write(folder / "small.nii.gz", image((15, 18, 2)), affine())
    (folder / "text.nii.gz").write_text("no image")
    return folder


def pairs_file(inputs: Path, path: Path, *rows: tuple[str, ...]) -> Path:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["fixed", "moving", "fixed_labels", "moving_labels"])
        table.writerows([[f"{inputs / name}.nii.gz" if name else "" for name in row] for row in rows])
    return path
