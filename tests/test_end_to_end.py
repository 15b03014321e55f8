"""One tiny trained run, and every command on it: evaluate, register, export, and what they say of bad input."""

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import training_runs as runs
from scipy import ndimage  # type: ignore[import-untyped]

from dilformer_jax import __main__
from dilformer_jax.io import bundle
from dilformer_jax.io.geometry import reframed
from dilformer_jax.io.itk import read_field
from dilformer_jax.io.volumes import open_nifti, read_image, read_labels, read_voxels
from dilformer_jax.ops import folding, overlap
from dilformer_jax.training import checkpoint, logs

DEMO = runs.ROOT / "configs" / "demo.py"


def dilformer(*arguments: object) -> None:
    """The `dilformer` command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dilformer", *map(str, arguments)])
        __main__.main()


def pair(phantoms: Path, *, labels: bool = True) -> list[object]:
    """The arguments of `register` for two phantoms that the network has not seen."""
    arguments: list[object] = []
    for role, name in (("fixed", "phantom_002"), ("moving", "phantom_003")):
        arguments += [f"--{role}", phantoms / f"{name}_t1.nii.gz"]
        arguments += [f"--{role}-labels", phantoms / f"{name}_seg.nii.gz"] if labels else []
    return arguments


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


# ---- Bad input ----


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """A folder of files of which each has one fault."""
    folder = tmp_path_factory.mktemp("spoilt")
    image, affine = voxels(phantoms / "phantom_003_t1.nii.gz"), open_nifti(phantoms / "phantom_003_t1.nii.gz").affine
    labels = voxels(phantoms / "phantom_003_seg.nii.gz")
    save = lambda name, array, affine: nib.save(nib.Nifti1Image(array, affine), folder / f"{name}.nii.gz")
    save("frames", np.stack([image, image], axis=-1), affine)
    holes = image.copy()
    holes[10, 11, 12] = np.nan
    save("nan", holes, affine)
    moved = affine.copy()
    moved[0, 3] += 5
    save("elsewhere", image, moved)
    save("larger", np.pad(image, 4), affine)
    save("fractions", labels + np.float32(0.25), affine)
    (folder / "text.nii.gz").write_text("a text, whatever its name says\n")
    (folder / "empty").mkdir()
    return folder


def refused(capsys: pytest.CaptureFixture, output: Path, *arguments: object) -> str:
    """The one sentence with which a command ends that has written nothing."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        dilformer(*arguments)
    told = capsys.readouterr().err
    sentence(stop.value.code, told)
    assert sorted(output.parent.rglob("*")) == before
    return told


def sentence(code: object, told: str) -> None:
    assert code == 2
    assert "Traceback" not in told and told.count("\n") == 1 and told.endswith(".\n"), told


REGISTERING = [
    ({"fixed": "missing"}, "missing.nii.gz does not exist"),
    ({"moving": "missing"}, "missing.nii.gz does not exist"),
    ({"fixed": "text"}, "text.nii.gz is not compressed by gzip as its name says (31 bytes)"),
    ({"moving": "frames"}, "frames.nii.gz has 2 frames; use --frame N"),
    ({"moving": "elsewhere"}, "elsewhere.nii.gz"),
    ({"moving": "larger"}, "larger.nii.gz has 40x40x40"),
    ({"fixed": "nan"}, "nan.nii.gz has 1 NaN or infinite voxels"),
    ({"fixed-labels": "fractions"}, "fractions.nii.gz has 32768 voxels with fractions"),
    ({"moving-labels": "larger"}, "larger.nii.gz has"),
]


def spoilt_pair(phantoms: Path, spoilt: Path, changes: dict[str, str]) -> list[object]:
    arguments = pair(phantoms)
    for role, name in changes.items():
        arguments[arguments.index(f"--{role}") + 1] = spoilt / f"{name}.nii.gz"
    return arguments


@pytest.mark.parametrize(("changes", "said"), REGISTERING, ids=str)
def test_register_refuses_in_a_sentence(
    workdir: Path,
    phantoms: Path,
    spoilt: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    said: str,
) -> None:
    output = tmp_path / "out"
    arguments = spoilt_pair(phantoms, spoilt, changes)
    assert said in refused(capsys, output, "register", *arguments, "--workdir", workdir, "--output", output)


def write_table(path: Path, phantoms: Path, spoilt: Path, fault: str) -> Path:
    """Pairs of which the second has the fault; its images are in the first place in a row that is sound."""
    good = [phantoms / f"phantom_{number}_{kind}.nii.gz" for kind in ("t1", "seg") for number in ("000", "001")]
    bad = [good[0], spoilt / f"{fault}.nii.gz", *good[2:]]
    if fault == "fractions":
        bad = [*good[:3], spoilt / "fractions.nii.gz"]
    rows = ["fixed,moving,fixed_labels,moving_labels", *(",".join(map(str, row)) for row in (good, bad))]
    path.write_text("\n".join(rows) + "\n")
    return path


FAULTS = [
    ("missing", "missing.nii.gz does not exist"),
    ("text", "text.nii.gz is not compressed by gzip"),
    ("frames", "frames.nii.gz has 2 frames"),
    ("elsewhere", "elsewhere.nii.gz"),
    ("larger", "larger.nii.gz"),
    ("nan", "nan.nii.gz has 1 NaN or infinite voxels"),
    ("fractions", "fractions.nii.gz has 32768 voxels with fractions"),
]


@pytest.mark.parametrize(("fault", "said"), FAULTS)
def test_evaluate_refuses_in_a_sentence(
    phantoms: Path, spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, said: str
) -> None:
    table, output = write_table(tmp_path / "pairs.csv", phantoms, spoilt, fault), tmp_path / "out"
    arguments = ["evaluate", "--method", "identity", "--pairs", table, "--output", output]
    with pytest.raises(SystemExit) as stop:
        dilformer(*arguments)
    told = capsys.readouterr().err
    # Above the sentence there may be a line for each pair that was well.
    *progress, last = told.splitlines(keepends=True)
    sentence(stop.value.code, last)
    assert said in last and all(line.startswith("[1/2]") for line in progress)
    assert list(tmp_path.iterdir()) == [table]


SMALL = (
    "--config",
    f"{runs.ROOT / 'configs' / 'voxelmorph_lpba40_cpu.py'}:tiny",
    "--config.data.name=pairs_csv",
    "--config.data.preprocessing.downsample=1",
)


# This configuration cuts all images to one size, so that a larger one is no fault.
@pytest.mark.parametrize(
    ("fault", "said", "workers"),
    [*((fault, said, 0) for fault, said in FAULTS if fault != "larger"), ("nan", "nan.nii.gz has 1 NaN", 1)],
)
def test_train_refuses_in_a_sentence(
    phantoms: Path,
    spoilt: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    said: str,
    workers: int,
) -> None:
    """Also where a file is opened only in a thread or a process that makes batches."""
    table, output = write_table(tmp_path / "pairs.csv", phantoms, spoilt, fault), tmp_path / "run"
    # One pair to validate on, the sound one, so that the other is first met in a batch.
    settings = [f"--config.data.directory={table}", "--config.validation_pairs=1", f"--config.data.workers={workers}"]
    with pytest.raises(SystemExit) as stop:
        dilformer("train", *SMALL, "--workdir", output, *settings)
    told = capsys.readouterr().err
    sentence(stop.value.code, told)
    assert said in told


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--config.modle.name=x", "has no key 'modle.name' (the closest is model.name)"),
        ("--config.model.options.widht=8", "has no key 'model.options.widht'"),
        ("--config.total_steps=many", "--config.total_steps=many is not a whole number"),
    ],
)
def test_unknown_keys_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, said: str) -> None:
    output = tmp_path / "run"
    told = refused(capsys, output, "train", "--config", f"{DEMO}:tiny", "--workdir", output, override)
    assert said in told


@pytest.mark.parametrize("kind", ["lpba40", "ixi_2mm", "ixi", "folder"])
def test_an_empty_folder_is_named(spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    output = tmp_path / "run"
    data = [f"--config.data.name={kind}", f"--config.data.directory={spoilt / 'empty'}"]
    lpba40 = f"{runs.ROOT / 'configs' / 'lpba40.py'}:tiny"
    told = refused(capsys, output, "train", "--config", lpba40, "--workdir", output, *data)
    assert f"{spoilt / 'empty'} has 0 files" in told
    protocol = ["--dataset", kind, "--data", spoilt / "empty", "--output", output]
    assert f"{spoilt / 'empty'} has 0 files" in refused(capsys, output, "evaluate", "--method", "identity", *protocol)


@pytest.mark.parametrize(
    "start",
    [
        [sys.executable, "-W", "error", "-m", "dilformer_jax.register"],
        [str(Path(sys.executable).with_name("dilformer")), "register"],
    ],
    ids=["python -m", "dilformer"],
)
def test_the_programs_themselves_refuse_in_a_sentence(
    workdir: Path, phantoms: Path, spoilt: Path, tmp_path: Path, start: list[str]
) -> None:
    changes, said = ({"moving": "frames"}, "frames.nii.gz has 2 frames; use --frame N")
    arguments = [*start, *spoilt_pair(phantoms, spoilt, changes), "--workdir", workdir, "--output", tmp_path / "out"]
    done = subprocess.run([str(a) for a in arguments], text=True, capture_output=True, env=runs.environment())
    sentence(done.returncode, done.stderr)
    assert said in done.stderr and done.stdout == "" and not list(tmp_path.iterdir()), shlex.join(map(str, arguments))


def test_training_itself_refuses_in_a_sentence(tmp_path: Path) -> None:
    arguments = runs.training(tmp_path / "run", tmp_path / "phantoms", "--config.modle.x=1")
    done = subprocess.run(arguments, text=True, capture_output=True, env=runs.environment())
    sentence(done.returncode, done.stderr)
    assert "has no key 'modle.x'" in done.stderr and not list(tmp_path.iterdir())
