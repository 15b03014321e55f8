"""One tiny trained run, and every command on it: evaluate, register, export."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import training_runs as runs
from commands import dilformer, pair
from scipy import ndimage  # type: ignore[import-untyped]

from dilformer_jax.io import bundle
from dilformer_jax.io.geometry import reframed
from dilformer_jax.io.itk import read_field
from dilformer_jax.io.volumes import open_nifti, read_image, read_labels, read_voxels
from dilformer_jax.ops import folding, overlap
from dilformer_jax.training import checkpoint, logs

DEMO = runs.ROOT / "configs" / "demo.py"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, workdir: Path) -> Path:
    folder = tmp_path_factory.mktemp("export") / "weights"
    dilformer("export", "--workdir", workdir, "--output", folder)
    return folder


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory, workdir: Path, phantoms: Path) -> Path:
    folder = tmp_path_factory.mktemp("register") / "from-workdir"
    report = ["--report"] if importlib.util.find_spec("matplotlib") else []
    dilformer("register", *pair(phantoms), "--workdir", workdir, "--output", folder, *report)
    return folder


def voxels(path: Path) -> np.ndarray:
    """All that a NIfTI file holds, of whatever dimension."""
    return read_voxels(open_nifti(path), path)


@pytest.mark.parametrize("folder_is", ["bundle", "safetensors file"])
def test_exported_weights_register_as_the_run_does(
    registered: Path, weights: Path, phantoms: Path, tmp_path: Path, folder_is: str
) -> None:
    given = weights if folder_is == "bundle" else weights / "model.safetensors"
    dilformer("register", *pair(phantoms, labels=False), "--weights", given, "--output", tmp_path / "out")
    for name in ("field", "inverse_field", "moved"):
        ours, theirs = (voxels(path / f"{name}.nii.gz") for path in (tmp_path / "out", registered))
        assert ours.tobytes() == theirs.tobytes() and np.ptp(ours) > 0
    records = [json.loads((path / "run.json").read_text()) for path in (tmp_path / "out", registered)]
    assert len({record["settings"]["parameters_sha256"] for record in records}) == 1


def test_the_moved_image_is_the_moving_one_at_x_plus_u(registered: Path, phantoms: Path) -> None:
    """By SciPy, from the files alone; the label map by rounding to the nearest voxel."""
    fixed, moving = (read_image(phantoms / f"phantom_{name}_t1.nii.gz") for name in ("002", "003"))
    field = read_field(registered / "field.nii.gz")
    u = reframed(field.displacement, field.affine, np.linalg.inv(moving.affine), np.eye(4))
    assert np.linalg.norm(u, axis=-1).max() > 0.5
    points = np.indices(u.shape[:3]) + np.moveaxis(u.astype(np.float64), -1, 0)
    expected = ndimage.map_coordinates(moving.array, points, order=1, mode="nearest")
    moved = read_image(registered / "moved.nii.gz")
    np.testing.assert_allclose(moved.array, expected, atol=2e-5)
    assert np.abs(moved.array - moving.array).max() > 0.1
    np.testing.assert_array_equal(moved.affine, fixed.affine)

    labels = read_labels(phantoms / "phantom_003_seg.nii.gz").array
    nearest = ndimage.map_coordinates(labels, points, order=0, mode="constant", cval=0)
    differing = read_labels(registered / "moved_labels.nii.gz").array != nearest
    assert differing.mean() < 1e-3  # halfway between two voxels

    record = json.loads((registered / "run.json").read_text())
    assert record["metrics"]["folding_percent"] == pytest.approx(folding.folding_percent(u), abs=0.01)
    assert set(record["outputs"]) == {path.name for path in registered.iterdir()}
    if importlib.util.find_spec("matplotlib"):
        assert "data:image/png;base64," in (registered / "report.html").read_text()


def test_evaluate_scores_the_run_as_its_training_did(
    workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The validation pairs of the run's own data, at the checkpoint that was best on the first of them."""
    dilformer("evaluate", "--workdir", workdir, "--output", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {row["name"]: row for row in results["pairs"]}
    assert set(rows) == {"phantom_002_to_phantom_003", "phantom_003_to_phantom_002"}
    _, best = checkpoint.restore_params(workdir, "best")
    lines = [line for line in logs.read(workdir / "metrics.jsonl") if "dice" in line and line["step"] > 0]
    assert max(lines, key=lambda line: line["dice"])["step"] == best
    (line,) = [line for line in lines if line["step"] == best]
    first = rows["phantom_002_to_phantom_003"]
    for ours, theirs in (("dice", "dice"), ("dice_before", "dice_identity"), ("folding_percent", "folding_percent")):
        assert first[ours] == pytest.approx(line[theirs], abs=5e-5)
    # A run this short may gain nothing, but it does move.
    assert first["dice"] != first["dice_before"] and line["displacement_p95"] > 0.1
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"results.json", "results.csv", "summary.md", "run.json", "report.html"} <= written
    if importlib.util.find_spec("matplotlib"):
        assert {"best.png", "dice_per_label.png"} <= written
    assert f"{np.mean([row['dice'] for row in rows.values()]):.4f}"[:5] in capsys.readouterr().out


def test_evaluating_the_identity_is_the_overlap_of_the_files(phantoms: Path, tmp_path: Path) -> None:
    dilformer("evaluate", "--method", "identity", "--dataset", "folder", "--data", phantoms, "--output", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    maps = {name: read_labels(phantoms / f"{name}_seg.nii.gz").array for name in ("phantom_002", "phantom_003")}
    assert len(results["pairs"]) == 2
    for row in results["pairs"]:
        fixed, moving = maps[row["fixed"]], maps[row["moving"]]
        dice = overlap.dice(fixed, moving, results["labels"])
        assert row["dice"] == row["dice_before"] == pytest.approx(np.nanmean(dice), abs=1e-12)
        naive = [
            2 * ((fixed == label) & (moving == label)).sum() / ((fixed == label).sum() + (moving == label).sum())
            for label in results["labels"]
        ]
        np.testing.assert_allclose(list(row["dice_per_label"].values()), naive, atol=1e-12)
        assert row["folding_percent"] == 0 and 0.3 < row["dice"] < 0.7
    assert results["labels"] == list(range(1, 22))


READING = """
import sys
for name in ("jax", "jaxlib", "flax", "orbax", "dilformer_jax"):
    sys.modules[name] = None  # importing it fails
import json
import numpy as np
import safetensors.numpy
folder, expected = sys.argv[1:]
expected = dict(np.load(expected))
for arrays in (dict(np.load(folder + "/model.npz")), safetensors.numpy.load_file(folder + "/model.safetensors")):
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert (array.dtype, array.shape, array.tobytes()) == (
            expected[name].dtype, expected[name].shape, expected[name].tobytes()), name
description = json.load(open(folder + "/model.json"))
assert description["parameters"] == sum(array.size for array in expected.values()) > 1000
print(description["network"]["name"], description["network"]["options"]["width"], description["training"]["licence"])
"""


def test_exported_weights_are_read_without_jax(weights: Path, workdir: Path, tmp_path: Path) -> None:
    params, step = checkpoint.restore_params(workdir, "best")
    np.savez(tmp_path / "expected.npz", **bundle.flatten(params))  # type: ignore[arg-type]
    arguments = [sys.executable, "-c", READING, str(weights), str(tmp_path / "expected.npz")]
    done = subprocess.run(arguments, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "dilformer 4 made by dilformer_jax: Apache-2.0.\n"), done.stderr
    description = json.loads((weights / "model.json").read_text())
    assert description["training"]["steps"] == step
    assert description["training"]["subjects"] == ["phantom_000", "phantom_001"]
    assert description["grid"]["shape"] == [32, 32, 32] and description["labels"] == list(range(1, 22))
    assert "dice" in description["validation"]
