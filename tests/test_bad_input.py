"""What train, register and evaluate say of bad input: one sentence, exit code 2, and nothing is left behind."""

import shlex
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import training_runs as runs
from commands import dilformer, pair

from dilformer_jax.io.volumes import open_nifti, read_voxels

DEMO = runs.ROOT / "configs" / "demo.py"


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """A folder of files of which each has one fault."""
    folder = tmp_path_factory.mktemp("spoilt")
    scans = [phantoms / f"phantom_003_{kind}.nii.gz" for kind in ("t1", "seg")]
    image, labels = (read_voxels(open_nifti(path), path) for path in scans)
    affine = open_nifti(scans[0]).affine
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
