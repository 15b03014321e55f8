"""From files to registered files, with networks whose answer is known; the trained network's own test is end to end."""

import csv
import importlib.util
import json
import re
from pathlib import Path

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from dilformer_jax import evaluate, export, models, register
from dilformer_jax.data.preprocessing import prepared, resolved
from dilformer_jax.io.geometry import spacing
from dilformer_jax.io.volumes import BadInput, read_image, read_labels
from dilformer_jax.models import bundle
from dilformer_jax.registration import pipeline, refine
from dilformer_jax.registration.pipeline import Predictor
from dilformer_jax.registration.refine import Refinement
from dilformer_jax.training import checkpoint

ROOT = Path(__file__).resolve().parents[1]
BIG = 2**24 + 1  # the first whole number that float32 has not
TINY = {"down": [2], "up": [2], "final": [2]}


class Constant:
    """A network that moves everything by params['shift'], in voxels of half its input's resolution."""

    downsampling = 4

    def __init__(self):
        self.traced = []

    def apply(self, variables, fixed, moving):
        self.traced.append(fixed.shape)
        shape = [size // 2 for size in fixed.shape[1:4]]
        return (jnp.broadcast_to(variables["params"]["shift"], (1, *shape, 3)), None)


class Ramp(Constant):
    """u = params['shift'] * (i + 1/2) along axis 0, i being the voxel at half resolution."""

    def apply(self, variables, fixed, moving):
        shape = [size // 2 for size in fixed.shape[1:4]]
        return (
            jnp.broadcast_to((jnp.arange(shape[0]) + 0.5)[:, None, None, None], (1, *shape, 3))
            * variables["params"]["shift"],
        )


class Seen(Constant):
    """Gives back what it was given: the fixed image, the moving image and 1."""

    downsampling = 2

    def apply(self, variables, fixed, moving):
        return (jnp.concatenate([fixed, moving, jnp.ones_like(fixed)], axis=-1),)


def predictor(module, shift=(0.0, 0.0, 0.0), **preprocessing) -> Predictor:
    return Predictor(module, {"shift": np.array(shift, np.float32)}, resolved(preprocessing), "toy", "0" * 64)


def image(shape=(16, 20, 18), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1, 200, shape).astype(np.float32)


def test_displacement_is_in_voxels_of_the_files_whatever_the_downsampling():
    network = predictor(Constant(), (1.0, -0.5, 0.25), downsample=2)
    u = network.displacement(image((17, 22, 19)), image((17, 22, 19), 1))
    assert u.shape == (17, 22, 19, 3) and u.dtype == np.float32
    np.testing.assert_allclose(u, np.broadcast_to([4.0, -2.0, 1.0], u.shape), rtol=1e-6)
    assert network.module.traced == [(1, 12, 12, 12, 1)]  # 17, 22, 19 -> 24, 24, 24, halved
    network.displacement(image((17, 22, 19), 2), image((17, 22, 19), 3))
    assert len(network.module.traced) == 1, "compiled twice for one shape"
    network.displacement(image((16, 22, 19)), image((16, 22, 19)))
    assert network.module.traced[1:] == [(1, 8, 12, 12, 1)]


def test_displacement_keeps_its_place_on_the_way_up():
    # Half-pixel: voxel i at half resolution lies at 2i + 1/2, so i + 1/2 is (x + 1/2) / 2; a vector counts double.
    u = predictor(Ramp(), (0.3, 0.0, -0.1)).displacement(image((18, 8, 9)), image((18, 8, 9), 1))
    x = np.arange(1, 17)[:, None, None, None]
    np.testing.assert_allclose(u[1:17], np.broadcast_to((x + 0.5) * [0.3, 0, -0.1], (16, 8, 9, 3)), atol=1e-5)


def test_network_sees_normalised_images_continued_at_their_ends():
    fixed, moving = image((7, 8, 9)), image((7, 8, 9), 1) * 3
    u = predictor(Seen()).displacement(fixed, moving)
    np.testing.assert_allclose(u[..., 0], fixed / fixed.max(), rtol=1e-6)
    np.testing.assert_allclose(u[..., 1], moving / moving.max(), rtol=1e-6)
    averaged = prepared(fixed, resolved({"normalise": "none", "downsample": 2}), "f", multiple=2)
    assert averaged.shape == (4, 4, 6, 1)
    padded = fixed[np.ix_([0, 1, 2, 3, 4, 5, 6, 6], range(8), [*range(9), 8, 8, 8])]
    naive = [
        [[padded[2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2].mean() for k in range(6)] for j in range(4)]
        for i in range(4)
    ]
    np.testing.assert_allclose(averaged[..., 0], naive, rtol=1e-6)
    with pytest.raises(BadInput, match=r"f.nii is 7x8x9 after cropping, which downsample=2 does not divide"):
        prepared(fixed, resolved({"downsample": 2}), "f.nii")


def test_cropping_is_undone_in_both_images():
    fixed, moving = (np.zeros((20, 24, 16), np.float32) for _ in range(2))
    fixed[6:14, 4:12, 5:11], moving[3:11, 9:17, 5:11] = image((8, 8, 6)), image((8, 8, 6))
    # The boxes are cut around the brains, so that a network which sees no difference moves by the boxes' distance.
    still = predictor(Constant(), crop_to=(8, 8, 8)).displacement(fixed, moving)
    np.testing.assert_array_equal(still, np.broadcast_to([-3, 5, 0], still.shape))
    moved = pipeline.warp_image(moving, still)
    np.testing.assert_array_equal(moved[6:14, 4:12, 5:11], fixed[6:14, 4:12, 5:11])
    ramp = predictor(Ramp(), (0.2, 0.0, 0.0), crop_to=(8, 8, 8)).displacement(fixed, moving)
    inner = np.arange(7, 13)[:, None, None]
    np.testing.assert_allclose(ramp[7:13, ..., 0], np.broadcast_to((inner - 6 + 0.5) * 0.2 - 3, (6, 24, 16)), atol=1e-5)
    np.testing.assert_array_equal(ramp[:6], np.broadcast_to(ramp[6], (6, 24, 16, 3)))  # continued by the border value
    np.testing.assert_array_equal(ramp[14:], np.broadcast_to(ramp[13], (6, 24, 16, 3)))


def test_too_small_for_the_network():
    small = predictor(Constant(), downsample=2)
    with pytest.raises(BadInput, match=r"a.nii is 9x8x30, too small for toy, which needs 9 voxels or more"):
        small.displacement(image((9, 8, 30)), image((9, 8, 30)), ("a.nii", "b.nii"))
    assert small.displacement(image((9, 9, 9)), image((9, 9, 9), 1)).shape == (9, 9, 9, 3)
    with pytest.raises(ValueError, match="both lie on one grid"):
        small.displacement(image((9, 9, 9)), image((9, 9, 10)))
    with pytest.raises(BadInput, match=r"b.nii: intensities from 0 to -1"):
        small.displacement(image((9, 9, 9)), np.full((9, 9, 9), -1, np.float32), ("a.nii", "b.nii"))


def affine_field(shape, matrix, offset) -> np.ndarray:
    voxels = np.moveaxis(np.indices(shape), 0, -1)
    return (voxels @ np.transpose(matrix) + offset).astype(np.float32)


def test_inverse_of_an_affine_map_is_its_inverse_matrix():
    matrix = np.array([[0.1, -0.05, 0.0], [0.02, -0.1, 0.08], [0.0, 0.06, 0.12]])
    offset = np.array([-0.6, 0.9, -1.1])
    shape = (16, 18, 20)
    u = affine_field(shape, matrix, offset)
    v = np.asarray(pipeline._inverse(u))
    back = np.linalg.inv(np.eye(3) + matrix)
    expected = affine_field(shape, back - np.eye(3), -back @ offset)
    x = np.moveaxis(np.indices(shape), 0, -1) + expected
    inside = ((x >= 0) & (x <= np.array(shape) - 1)).all(-1)
    assert 0.5 < inside.mean() < 0.99  # the test sees voxels on both sides
    np.testing.assert_allclose(v[inside], expected[inside], atol=5e-3)
    residual, found = (np.asarray(a) for a in pipeline._residual(u, v))
    assert (found == inside).mean() > 0.999
    assert np.abs(residual[found]).max() < 5e-3


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


def test_register_moves_image_and_labels_and_measures(tmp_path: Path):
    moving = ndimage.gaussian_filter(image((20, 24, 22)), 1)
    moving_labels = np.zeros(moving.shape, np.int32)
    moving_labels[4:10, 6:12, 5:13], moving_labels[12:16, 14:20, 9:15], moving_labels[17:19, 3:5, 3:5] = 7, BIG, 9
    shift = np.array([2, -4, 2])  # moved(x) = moving(x + shift)
    fixed, fixed_labels = np.roll(moving, -shift, (0, 1, 2)), np.roll(moving_labels, -shift, (0, 1, 2))
    fixed_labels[fixed_labels == 9] = 0  # in one of the two only: not scored
    paths = {name: tmp_path / f"{name}.nii.gz" for name in ("fixed", "moving", "fixed_labels", "moving_labels")}
    for name, array in (
        ("fixed", fixed),
        ("moving", moving),
        ("fixed_labels", fixed_labels),
        ("moving_labels", moving_labels),
    ):
        write(paths[name], array, affine())
    volumes = [read_image(paths["fixed"]), read_image(paths["moving"])]
    labels = [read_labels(paths["fixed_labels"]), read_labels(paths["moving_labels"])]

    result = pipeline.register(*volumes, predictor(Constant(), shift / 2), *labels)
    inner = (slice(0, 18), slice(4, 24), slice(0, 20))
    np.testing.assert_allclose(result.moved[inner], fixed[inner], rtol=1e-5)
    assert result.moved_labels.dtype == np.int32
    np.testing.assert_array_equal(
        result.moved_labels[inner],
        np.where(fixed_labels == 0, 0, fixed_labels)[inner]
        + 9 * (np.roll(moving_labels, -shift, (0, 1, 2)) == 9)[inner],
    )
    assert (result.moved_labels[18:] == 0).all() and (result.moved_labels[:, :4] == 0).all()  # outside the volume
    np.testing.assert_allclose(result.inverse, np.broadcast_to(-shift, result.inverse.shape), atol=1e-5)
    found = result.metrics
    length = np.sqrt((2 * 1.0) ** 2 + (4 * 1.5) ** 2 + (2 * 2.0) ** 2)
    assert found["displacement_mean_mm"] == pytest.approx(length, rel=1e-5)
    assert found["displacement_p95_mm"] == pytest.approx(length, rel=1e-5)
    assert found["folding_percent"] == 0 and found["sdlogj"] == pytest.approx(0, abs=1e-6)
    assert found["inverse_max_mm"] < 1e-4
    assert found["dice"] == 1 and found["dice_per_label"] == {7: 1.0, BIG: 1.0}
    before = [
        2
        * ((fixed_labels == i) & (moving_labels == i)).sum()
        / ((fixed_labels == i).sum() + (moving_labels == i).sum())
        for i in (7, BIG)
    ]
    assert found["dice_before"] == pytest.approx(np.mean(before)) and 0 < np.mean(before) < 0.5
    assert found["correlation_before"] == pytest.approx(np.corrcoef(fixed.ravel(), moving.ravel())[0, 1], abs=1e-5)
    assert found["correlation"] == pytest.approx(np.corrcoef(fixed.ravel(), result.moved.ravel())[0, 1], abs=1e-5)
    assert set(found["seconds"]) == {"displacement", "warps", "inverse"} and min(found["seconds"].values()) > 0

    other = affine()
    other[0, 3] += 1
    write(tmp_path / "other.nii.gz", moving, other)
    with pytest.raises(BadInput, match="lie on different grids, their corners up to 1 mm apart"):
        pipeline.register(volumes[0], read_image(tmp_path / "other.nii.gz"), predictor(Constant()))


def test_inverse_error_is_told_where_there_is_no_inverse(tmp_path: Path):
    class Folding(Constant):
        def apply(self, variables, fixed, moving):
            voxels = jnp.stack(jnp.meshgrid(*(jnp.arange(n) for n in fixed.shape[1:4]), indexing="ij"), -1)
            return (3 * jnp.sin(1.3 * voxels)[None],)

    (
        write(tmp_path / "a.nii", image((12, 12, 12)), affine()),
        write(tmp_path / "b.nii", image((12, 12, 12), 1), affine()),
    )
    found = pipeline.register(
        read_image(tmp_path / "a.nii"), read_image(tmp_path / "b.nii"), predictor(Folding())
    ).metrics
    assert found["folding_percent"] > 20
    assert found["inverse_max_mm"] > found["inverse_p99_mm"] > found["inverse_mean_mm"] > 0.3


def tiny_bundle(folder: Path, **changes) -> Path:
    """An untrained VoxelMorph with a head that moves everything by (1, -2, 0.5) voxels and a little by the images."""
    import jax

    network = models.create("voxelmorph", **TINY)
    volume = jnp.zeros((1, 8, 8, 8, 1))
    params = jax.device_get(network.init(jax.random.key(0), volume, volume)["params"])
    head = {name: array * 1e3 for name, array in bundle.flatten(params["head"]).items()}
    bias = next(name for name in head if name.endswith("bias"))
    params["head"] = bundle.unflatten({**head, bias: np.array([1, -2, 0.5], np.float32)})
    grid = {"shape": [16, 16, 16], "spacing_mm": [1, 1.5, 2], "orientation": "LAS"}
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


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_bundle(folder / "weights")
    fixed, moving = (ndimage.gaussian_filter(image((15, 18, 13), seed), 1.5) for seed in (0, 1))
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


def run_register(
    inputs: Path, output: Path, *more: str, fixed="fixed", moving="moving", weights: str | None = "weights"
) -> None:
    files = ["--fixed", inputs / f"{fixed}.nii.gz", "--moving", inputs / f"{moving}.nii.gz"]
    if weights is not None:
        files += ["--weights", inputs / weights]
    register.main(["register", *map(str, files), "--output", str(output), *more])


def test_register_writes_what_itk_reads(inputs: Path, tmp_path: Path, capsys):
    output = tmp_path / "new" / "output"
    labels = ("--fixed-labels", str(inputs / "labels.nii.gz"), "--moving-labels", str(inputs / "moving_labels.nii.gz"))
    run_register(inputs, output, "--report", *labels)
    told = capsys.readouterr().out
    names = ["field.nii.gz", "inverse_field.nii.gz", "moved.nii.gz", "moved_labels.nii.gz", "report.html", "run.json"]
    assert sorted(path.name for path in output.iterdir()) == names
    assert "ANTs and ITK" in told and "Dice, 2 structures" in told and "Warning" not in told

    fixed, moving = (sitk.ReadImage(str(inputs / f"{name}.nii.gz")) for name in ("fixed", "moving"))
    for grid, image, field, expected in (
        (fixed, moving, "field", sitk.GetArrayFromImage(sitk.ReadImage(str(output / "moved.nii.gz")))),
        (moving, fixed, "inverse_field", None),
    ):
        vectors = sitk.Cast(sitk.ReadImage(str(output / f"{field}.nii.gz")), sitk.sitkVectorFloat64)
        there = sitk.DisplacementFieldTransform(vectors)
        resampled = sitk.GetArrayFromImage(sitk.Resample(image, grid, there, sitk.sitkLinear, -1.0))
        inside = resampled >= 0  # ITK gives -1 outside the volume, where moved has the border value
        assert inside.mean() > 0.3
        if expected is not None:
            difference = np.abs(resampled - expected)[inside]
            assert (
                np.percentile(difference, 99) < 1e-2
                and np.abs(resampled - sitk.GetArrayFromImage(moving))[inside].max() > 5
            )
    # There and back again, through both files, in mm.
    fields = [
        sitk.Cast(sitk.ReadImage(str(output / f"{name}field.nii.gz")), sitk.sitkVectorFloat64)
        for name in ("inverse_", "")
    ]
    back, there = (sitk.DisplacementFieldTransform(field) for field in fields)
    start = moving.TransformContinuousIndexToPhysicalPoint((6.3, 10.2, 5.1))
    middle = back.TransformPoint(start)
    assert np.linalg.norm(np.subtract(middle, start)) > 1
    assert np.linalg.norm(np.subtract(there.TransformPoint(middle), start)) < 0.05

    record = json.loads((output / "run.json").read_text())
    assert record["outputs"] == names and record["parameters_sha256"] == bundle.describe(inputs / "weights")["sha256"]
    assert len(record["inputs_sha256"]) == 4 and record["backend"] == "cpu"
    assert record["command"].startswith("python -m dilformer_jax.register --fixed ")
    seconds = record["metrics"]["seconds"]
    assert seconds["cold"] > seconds["warm"] == seconds["displacement"] > 0
    moved = read_labels(output / "moved_labels.nii.gz").array
    for label in (3, 5):
        truth = read_labels(inputs / "labels.nii.gz").array
        dice = 2 * ((moved == label) & (truth == label)).sum() / ((moved == label).sum() + (truth == label).sum())
        assert record["metrics"]["dice_per_label"][str(label)] == pytest.approx(dice)

    # Again into the same folder: its own files are replaced, others stay.
    (output / "notes.txt").write_text("mine")
    (output / "moved.nii.gz").write_text("old")
    run_register(inputs, output)
    assert read_image(output / "moved.nii.gz").array.shape == (15, 18, 13)
    assert (output / "notes.txt").read_text() == "mine" and not list(output.glob(".*"))


@pytest.mark.parametrize(
    ("changes", "more", "sentence"),
    [
        ({"fixed": "missing"}, (), "missing.nii.gz does not exist"),
        ({"fixed": "text"}, (), "text.nii.gz is not compressed by gzip"),
        ({"moving": "frames"}, (), "frames.nii.gz is 4-D (15x18x13x2)"),
        ({"moving": "nan"}, (), "NaN or infinite voxels"),
        ({"moving": "elsewhere"}, (), "lie on different grids"),
        ({"fixed": "small", "moving": "small"}, (), "small.nii.gz is 15x18x2, too small for"),
        ({"weights": "nothing"}, (), "nothing does not exist"),
        ({}, ("--moving-labels", "fractions.nii.gz"), "with fractions and is no label map"),
        ({}, ("--fixed-labels", "labels_elsewhere.nii.gz"), "lie on different grids"),
        ({}, ("--workdir", "x"), "not allowed with argument --weights"),
        ({}, ("--refine", "-1"), "--refine is -1; give 0 or more steps, 50 for example"),
        ({}, ("--refine", "many"), "argument --refine: invalid int value: 'many'"),
        ({}, ("--diffeomorphic",), "--diffeomorphic says how to refine; give --refine N with it"),
        ({"weights": None}, ("--refine", "0"), "--refine is 0; give 1 or more steps"),
        (
            {"weights": None, "fixed": "small", "moving": "small"},
            (),
            "small.nii.gz is 15x18x2, too small to be refined",
        ),
        ({}, ("--repor", "--movin"), "dilformer register"),
    ],
)
def test_bad_input_leaves_nothing_behind(inputs: Path, tmp_path: Path, capsys, monkeypatch, changes, more, sentence):
    monkeypatch.chdir(inputs)
    with pytest.raises(SystemExit) as stopped:
        run_register(inputs, tmp_path / "output", *more, **changes)
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in told and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_refinement_alone_registers_without_a_network(inputs: Path, tmp_path: Path, capsys):
    run_register(inputs, tmp_path / "alone", "--refine", "3", weights=None)
    record = json.loads((tmp_path / "alone" / "run.json").read_text())
    assert record["network"] is record["parameters_sha256"] is None
    assert record["refinement"]["steps"] == 3 and not record["refinement"]["diffeomorphic"]
    assert record["metrics"]["correlation"] > record["metrics"]["correlation_before"] + 0.01
    fixed, moving = (read_image(inputs / f"{name}.nii.gz").array for name in ("fixed", "moving"))
    u = refine.refine(fixed, moving, Refinement(3), spacing=spacing(affine()))
    moved = read_image(tmp_path / "alone" / "moved.nii.gz").array
    np.testing.assert_allclose(moved, pipeline.warp_image(moving, u), atol=1e-4)


def test_a_network_is_refined(inputs: Path, tmp_path: Path, capsys):
    """By `register` and by `evaluate` alike."""
    run_register(inputs, tmp_path / "plain")
    run_register(inputs, tmp_path / "refined", "--refine", "4", "--diffeomorphic")
    plain, refined = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("plain", "refined"))
    assert plain["refinement"] is None and refined["network"] == plain["network"]
    assert refined["refinement"]["diffeomorphic"]
    assert refined["metrics"]["correlation"] > plain["metrics"]["correlation"] + 0.02
    table = pairs_file(inputs, tmp_path / "pairs.csv", PAIRS[0])
    asked = ["--weights", str(inputs / "weights"), "--refine", "4", "--diffeomorphic", "--pairs", str(table)]
    evaluate.main(["evaluate", *asked, "--output", str(tmp_path / "scores")])
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert results["pairs"][0]["folding_percent"] == pytest.approx(refined["metrics"]["folding_percent"])
    assert results["pairs"][0]["sdlogj"] == pytest.approx(refined["metrics"]["sdlogj"], rel=1e-4)
    assert results["definition"]["method"].endswith("weights, 4 steps of refinement of a velocity")


def test_report_without_matplotlib_is_refused_first(inputs: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run_register(inputs, tmp_path / "output", "--report", fixed="missing")
    assert "pip install 'dilformer-jax[plot]'" in capsys.readouterr().err


def test_a_grid_unlike_that_of_training_is_told(inputs: Path, tmp_path: Path, capsys):
    tiny_bundle(tmp_path / "w", grid={"shape": [16] * 3, "spacing_mm": [1, 1, 1], "orientation": "RAS"})
    run_register(inputs, tmp_path / "output", weights=str(tmp_path / "w"))
    told = capsys.readouterr().out
    assert "has orientation LAS where the network was trained with RAS" in told
    assert "has spacing in mm [1.0, 1.5, 2.0] where the network was trained with [1.0, 1.0, 1.0]" in told


def test_the_example_of_the_readme_runs(inputs: Path, tmp_path: Path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for name, source in (("S35_t1.nii.gz", "fixed.nii.gz"), ("S36_t1.nii.gz", "moving.nii.gz"), ("weights", "weights")):
        (tmp_path / name).symlink_to(inputs / source)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(code, found)
    assert np.ptp(found["result"].moved) > 0.1 and found["moved"].shape == (15, 18, 13)
    np.testing.assert_allclose(found["moved"], found["result"].moved, atol=1e-6)


@pytest.mark.parametrize(
    ("asked", "folder"),
    [
        (["--workdir", "run"], "evaluation"),
        (["--workdir", "run", "--method", "identity"], "evaluation-identity"),
        (["--workdir", "run", "--protocol", "lpba40-test", "--data", "d"], "evaluation-lpba40-test"),
        (["--method", "identity", "--pairs", "data/mine.csv"], "evaluation-identity-mine"),
        (["--workdir", "run", "--refine", "50"], "evaluation-refine50"),
        (["--method", "identity", "--refine", "9", "--diffeomorphic"], "evaluation-identity-refine9-diffeomorphic"),
    ],
)
def test_what_is_asked_of_a_run_does_not_overwrite_what_was_asked_before(asked: list[str], folder: str):
    assert evaluate._folder(evaluate._parser().parse_args(asked)) == folder


def test_load_predictor(inputs: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="either weights or a workdir"):
        pipeline.load_predictor()
    with pytest.raises(BadInput, match=r"config.json cannot be read"):
        pipeline.load_predictor(workdir=tmp_path)
    tiny_bundle(tmp_path / "w", network={"name": "voxelmorph", "options": {"lost": 1}})
    with pytest.raises(BadInput, match=r"that this version cannot make \(The network voxelmorph has no option 'lost'"):
        pipeline.load_predictor(weights=tmp_path / "w")
    assert pipeline.load_predictor(weights=inputs / "weights").module == models.create("voxelmorph", **TINY)


def test_a_workdir_and_its_bundle_are_the_same_network(inputs: Path, tmp_path: Path, monkeypatch):
    params, description = bundle.load(inputs / "weights")
    data = {"name": "phantoms", "options": {"shape": [40, 40, 40]}, "preprocessing": description["preprocessing"]}
    (tmp_path / "config.json").write_text(json.dumps({"model": description["network"], "data": data}))
    monkeypatch.setattr(checkpoint, "restore_params", lambda folder, which: (params, {"best": 3}[which]))
    run, shipped = pipeline.load_predictor(workdir=tmp_path), pipeline.load_predictor(inputs / "weights")
    assert run.module == shipped.module and run.sha256 == shipped.sha256 and run.preprocessing == shipped.preprocessing
    np.testing.assert_array_equal(*(p.displacement(image((9, 8, 7)), image((9, 8, 7), 1)) for p in (run, shipped)))
    assert pipeline.read_config(tmp_path)["data"]["options"] == {"shape": (40, 40, 40)}
    assert run.grid is None and shipped.grid == description["grid"]
    (tmp_path / "run.json").write_text(json.dumps({"grid": description["grid"]}))
    assert pipeline.load_predictor(workdir=tmp_path).grid == description["grid"]


def pairs_file(inputs: Path, path: Path, *rows: tuple[str, ...]) -> Path:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["fixed", "moving", "fixed_labels", "moving_labels"])
        table.writerows([[f"{inputs / name}.nii.gz" if name else "" for name in row] for row in rows])
    return path


PAIRS = (
    ("fixed", "moving", "labels", "moving_labels"),
    ("moving", "fixed", "moving_labels", "labels"),
    ("fixed", "moving", "labels", "labels"),
)


def test_evaluating_the_identity(inputs: Path, tmp_path: Path, capsys):
    table = pairs_file(inputs, tmp_path / "pairs.csv", *PAIRS)
    output = tmp_path / "scores"
    evaluate.main(
        ["evaluate", "--method", "identity", "--pairs", str(table), "--output", str(output), "--labels", "3,5,900-901"]
    )
    told = capsys.readouterr()
    results = json.loads((output / "results.json").read_text())
    fixed, moving = (read_labels(inputs / f"{name}.nii.gz").array for name in ("labels", "moving_labels"))
    dice = {i: 2 * ((fixed == i) & (moving == i)).sum() / ((fixed == i).sum() + (moving == i).sum()) for i in (3, 5)}
    assert 0.5 < dice[3] < 0.9
    first, second, third = results["pairs"]
    for row in (first, second):
        assert row["dice"] == row["dice_before"] == pytest.approx(np.mean(list(dice.values())))
        assert row["dice_per_label"] == {
            "3": pytest.approx(dice[3]),
            "5": pytest.approx(dice[5]),
            "900": None,
            "901": None,
        }
        assert row["hd95"] == pytest.approx(1.0)  # one voxel along axis 0, which is 1 mm
    assert third["dice"] == 1 and third["hd95"] == 0 and third["absent"] == [900, 901]
    assert (first["name"], second["fixed"]) == ("moving_to_fixed", "moving")
    assert results["summary"]["dice"] == {
        "mean": pytest.approx((2 * np.mean(list(dice.values())) + 1) / 3),
        "sd": pytest.approx(np.std([first["dice"], first["dice"], 1])),
        "n": 3,
    }
    assert results["summary"]["folding_percent"]["mean"] == 0
    assert results["definition"]["labels"] == "3,5,900-901"
    names = [
        "best.png",
        "dice_per_label.png",
        "median.png",
        "report.html",
        "results.csv",
        "results.json",
        "run.json",
        "summary.md",
        "worst.png",
    ]
    assert sorted(path.name for path in output.iterdir()) == names
    assert "[3/3] moving_to_fixed: Dice 1.0000 -> 1.0000" in told.err and "identity" in told.out


def test_evaluating_a_network_times_and_warps_as_register_does(inputs: Path, tmp_path: Path, capsys):
    table = pairs_file(inputs, tmp_path / "pairs.csv", PAIRS[0], ("moving", "fixed", "", ""))
    evaluate.main(
        ["evaluate", "--weights", str(inputs / "weights"), "--pairs", str(table), "--output", str(tmp_path / "scores")]
    )
    with_labels, without = json.loads((tmp_path / "scores" / "results.json").read_text())["pairs"]
    volumes = [read_image(inputs / f"{name}.nii.gz") for name in ("fixed", "moving")]
    labels = [read_labels(inputs / f"{name}.nii.gz") for name in ("labels", "moving_labels")]
    result = pipeline.register(*volumes, pipeline.load_predictor(inputs / "weights"), *labels)
    for name in ("dice", "dice_before", "folding_percent", "sdlogj"):
        assert with_labels[name] == pytest.approx(result.metrics[name])
    assert with_labels["dice"] != with_labels["dice_before"]
    assert 0 < with_labels["seconds"] < 1  # compilation takes longer
    assert "dice" not in without and without["sdlogj"] > 0
    assert json.loads((tmp_path / "scores" / "run.json").read_text())["parameters_sha256"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "No pairs to evaluate"),
        (("--pairs", "good.csv"), "Nothing to evaluate"),
        (("--method", "identity", "--protocol", "lpba40-validation"), "--protocol and --data go together"),
        (("--method", "identity", "--data", "."), "--protocol and --data go together"),
        (("--method", "identity", "--protocol", "lpba41-test", "--data", "."), "--protocol lpba41-test is not known"),
        (("--method", "identity", "--protocol", "lpba40-test", "--data", "."), "but none of S01_t1.nii.gz"),
        (("--method", "identity", "--pairs", "good.csv", "--labels", "21-x"), "'21-x' is no list of labels"),
        (("--method", "identity", "--pairs", "good.csv", "--labels", "9-7"), "is no list of labels"),
        (("--method", "identity", "--pairs", "good.csv", "--weights", "weights"), "--weights says what to evaluate"),
        (("--method", "identity", "--pairs", "lost.csv"), "lost.csv does not exist"),
        (("--method", "identity", "--pairs", "mixed.csv"), "lie on different grids"),
        (("--weights", "weights", "--pairs", "small.csv"), "small.nii.gz is 15x18x2, too small for"),
        (("--workdir", "nowhere"), "config.json cannot be read"),
    ],
)
def test_what_cannot_be_evaluated(inputs: Path, tmp_path: Path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(inputs)
    pairs_file(inputs, inputs / "good.csv", PAIRS[0])
    pairs_file(inputs, inputs / "mixed.csv", PAIRS[0], ("fixed", "elsewhere", "", ""))
    pairs_file(inputs, inputs / "small.csv", ("small", "small", "", ""))
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["evaluate", *arguments, "--output", str(tmp_path / "output")])
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in told and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_label_lists_there_and_back():
    assert evaluate._label_list("21-24, 41,22") == (21, 22, 23, 24, 41)
    assert evaluate._ranges((41, 21, 22, 23, 61, 62)) == "21-23,41,61-62"


def test_export_describes_the_run(tmp_path: Path, capsys, monkeypatch):
    data, workdir = tmp_path / "data", tmp_path / "run"
    data.mkdir(), workdir.mkdir()
    for name in "abcdef":
        write(data / f"{name}_t1.nii.gz", image((16, 18, 14), ord(name)), affine())
        labels = np.zeros((16, 18, 14), np.uint8)
        labels[4:8], labels[8:12] = 4, 11
        write(data / f"{name}_seg.nii.gz", labels, affine())
    config = {
        "seed": 5,
        "model": {"name": "voxelmorph", "options": {"down": [2], "up": [2]}},
        "data": {
            "name": "folder",
            "directory": str(data),
            "options": {"validation": 0.3},
            "preprocessing": {"downsample": 2},
        },
    }
    (workdir / "config.json").write_text(json.dumps(config))
    lines = [{"step": 10, "loss": 0.5}, {"step": 10, "dice": 0.6, "dice_identity": 0.5}, {"step": 20, "dice": 0.55}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    params = {"head": {"kernel": np.arange(6, dtype=np.float32)}}
    steps = {"best": 10, "latest": 20}
    monkeypatch.setattr(checkpoint, "restore_params", lambda folder, which: (params, steps[which]))

    export.main(["export", "--workdir", str(workdir), "--output", str(tmp_path / "weights")])
    told = capsys.readouterr().out
    loaded, description = bundle.load(tmp_path / "weights")
    np.testing.assert_array_equal(loaded["head"]["kernel"], params["head"]["kernel"])
    assert description["network"] == {
        "name": "voxelmorph",
        "options": {"down": [2], "up": [2], "final": [32, 16, 16], "dtype": "float32"},
    }
    assert description["preprocessing"] == {"normalise": "max", "downsample": 2, "crop_to": None}
    assert description["grid"] == {
        "shape": [16, 18, 14],
        "spacing_mm": [1, 1.5, 2],
        "orientation": "LAS",
        "network_shape": [8, 9, 7],
    }
    assert description["labels"] == [4, 11] and description["validation"] == {"dice": 0.6, "dice_identity": 0.5}
    assert description["training"] == {
        "dataset": "folder", "options": {"validation": 0.3}, "licence": f"that of the files in {data}",
        "subjects": ["a", "b", "c", "d"], "pairs": 12, "steps": 10, "seed": 5,
    }  # fmt: skip
    assert "model.safetensors" in told and "dice 0.6" in told and "step 10 (best)" in told
    export.main(["export", "--workdir", str(workdir), "--output", str(tmp_path / "last"), "--checkpoint", "latest"])
    assert bundle.load(tmp_path / "last")[1]["validation"] == {"dice": 0.55}

    data.rename(tmp_path / "moved")
    with pytest.raises(SystemExit):
        export.main(["export", "--workdir", str(workdir), "--output", str(tmp_path / "lost")])
    assert "does not exist; say by --data where it is" in capsys.readouterr().err and not (tmp_path / "lost").exists()
    export.main(
        ["export", "--workdir", str(workdir), "--output", str(tmp_path / "found"), "--data", str(tmp_path / "moved")]
    )
    assert (tmp_path / "found" / "model.safetensors").read_bytes() == (
        tmp_path / "weights" / "model.safetensors"
    ).read_bytes()
