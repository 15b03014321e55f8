"""The command info: what it says of a bundle, of the weights that ship and of a training run, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toys import TINY, tiny_bundle

from dilformer_jax import info, models
from dilformer_jax.data import structures
from dilformer_jax.io import bundle
from dilformer_jax.io.folders import digest

FIGURES = {"dice": 0.712345, "dice_identity": 0.5, "folding_percent": 0.00123, "dice_per_label": {"4": 0.1}}
TRAINING = {
    "dataset": "label_maps",
    "options": {},
    "licence": "ours",
    "subjects": [f"s{number}" for number in range(7)],
    "chosen_by": ["seg_9"],
    "pairs": 42,
    "steps": 12345,
    "seed": 3,
}


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, str]:
    info.main(["info", *map(str, arguments)])
    return {line[:15].strip(): line[15:] for line in capsys.readouterr().out.splitlines()}


def test_it_says_what_a_bundle_says(tmp_path: Path, capsys):
    tiny_bundle(
        tmp_path / "w", labels=[4, 43, 16, 99, 11, 50], training=TRAINING, validation=FIGURES, versions={"jax": "0.1"}
    )
    count = sum(array.size for array in bundle.flatten(bundle.load(tmp_path / "w")[0]).values())
    file = tmp_path / "w" / "model.safetensors"
    expected = {
        "network": "voxelmorph, with down 2, up 2, final 2, otherwise as by default",
        "parameters": str(count),
        "preprocessing": "normalise max, downsample 1",
        "grid": "15x18x13 voxels of 1x1.5x2 mm, LAS",
        "labels": "6 structures: left lateral ventricle, right lateral ventricle, brainstem, 99 and 2 more",
        "trained on": "7 subjects (s0, s1, s2, s3 and 3 more) of label_maps, 42 pairs, 12,345 steps, seed 3",
        "chosen by": "1 subject (seg_9)",
        "licence": "ours",
        "validation": "dice 0.7123, dice_identity 0.5000, folding_percent 0.00123",
        "versions": "jax 0.1",
        "SHA-256": digest(file),
        "file": f"{file}, {file.stat().st_size / 1e6:.3g} MB, the one described",
    }
    assert told(capsys, tmp_path / "w") == told(capsys, file) == expected
    info.main(["info", str(tmp_path / "w"), "--json"])
    assert json.loads(capsys.readouterr().out) == bundle.describe(tmp_path / "w")


def test_what_was_not_recorded_is_not_made_up(tmp_path: Path, capsys):
    training = {"dataset": "folder", "options": {}, "licence": None, "steps": 0, "seed": 0}
    network = {"name": "dilformer2", "options": {"width": 8, "window": [5, 6, 5]}}
    tiny_bundle(
        tmp_path / "w", training=training, grid=None, labels=[7, 8], network=network, preprocessing={"crop": None}
    )
    found = told(capsys, tmp_path / "w")
    assert found["network"] == "dilformer2, which this version does not know: width 8, window 5x6x5"
    assert found["preprocessing"] == "crop none" and found["grid"] == found["licence"] == "not recorded"
    assert found["trained on"].startswith("subjects that are not recorded of folder, ? pairs, 0 steps")
    assert found["chosen by"] == "subjects that are not recorded"
    assert found["labels"] == "2 structures: 7, 8" and found["validation"] == found["versions"] == "none"


@pytest.mark.parametrize("name", models.MODELS)
def test_the_defaults_are_those_of_the_networks(name: str):
    assert set(info.NETWORKS) == set(models.MODELS) and info.NETWORKS[name] == models.MODELS[name].__name__
    assert info.defaults(name) == models.defaults(name) and "dtype" in info.defaults(name)


def test_structures_have_their_data_set_s_names():
    assert (
        info._labels([2, 3], "oasis", {"segmentation": "seg4"}) == "2 structures: subcortical grey matter, white matter"
    )
    assert info._labels([1], "oasis", {}) == f"1 structures: {structures.OASIS[1]}"
    assert info._labels([21], "lpba40", {}) == "1 structures: left superior frontal gyrus"
    assert info._labels([1, 2, 3, 4, 5], "folder", {}) == "5 structures: 1, 2, 3, 4, 5"  # a name, not 'and 1 more'
    assert info._labels([], "folder", {}) == "none"


def test_the_weights_that_ship(capsys):
    found, description = told(capsys, "default"), bundle.describe("default")
    assert found["SHA-256"] == description["sha256"] and found["file"].endswith("MB, the one described")
    assert found["licence"].startswith("Apache-2.0") and " of label_maps, " in found["trained on"]
    assert found["parameters"] == f"{description['parameters']:,}"
    # What it says is true of them.
    params, _ = bundle.load("default")
    assert sum(array.size for array in bundle.flatten(params).values()) == description["parameters"]


def test_a_training_run(workdir: Path, phantoms: Path, tmp_path: Path, capsys):
    from dilformer_jax import export

    export.main(["export", "--workdir", str(workdir), "--output", str(tmp_path / "w")])
    capsys.readouterr()
    run, exported = told(capsys, workdir), told(capsys, tmp_path / "w")
    assert run.pop("file") == f"{workdir}, best checkpoint" and exported.pop("file").startswith(str(tmp_path))
    assert run == exported
    assert "levels 1" in run["network"] and "left frontal cortex" in run["labels"]
    assert run["licence"] == "made by dilformer_jax: Apache-2.0."
    assert run["trained on"].startswith("2 subjects (phantom_000, phantom_001) of phantoms, 2 pairs")


def test_a_file_that_is_not_the_one_described(tmp_path: Path, capsys):
    file = tiny_bundle(tmp_path / "w") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\7")
    for damage, line in (("its SHA-256 differs", "is NOT the one described"), ("does not exist", "does not exist")):
        with pytest.raises(SystemExit) as stopped:
            info.main(["info", str(tmp_path / "w")])
        said = capsys.readouterr()
        assert stopped.value.code == 1 and line in said.out.splitlines()[-1]
        assert damage in said.err and said.err.count("\n") == 1
        file.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("nowhere", "nowhere does not exist; give a bundle's folder"),
        ("", ". has no model.json"),
        ("empty", "empty has no model.json; give the folder that `export` wrote"),
        ("image.nii.gz", "is a .gz; give a bundle's folder"),
        ("words.json", "words.json is no JSON"),
        ("list.json", "list.json is no description of a bundle"),
        ("odd.json", "odd.json has a description that cannot be read (TypeError"),
        ("run", "run holds no checkpoints"),
        ("nowhere --jsn", "knows no --jsn (the closest is --json)"),
    ],
)
def test_bad_input_ends_in_one_sentence(tmp_path: Path, monkeypatch, capsys, given: str, sentence: str):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir(), Path("run").mkdir()
    Path("image.nii.gz").write_text("x"), Path("words.json").write_text("words"), Path("list.json").write_text("[1]")
    Path("odd.json").write_text(json.dumps(dict.fromkeys((*bundle.KEYS, "sha256"), 1)))
    settings = {"model": {"name": "voxelmorph", "options": TINY}, "data": {"name": "folder", "options": {}}, "seed": 0}
    Path("run/config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit) as stopped:
        info.main(["info", *given.split(" ")])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and sentence in said.err and said.err.count("\n") == 1 and not said.out


def test_it_needs_no_jax(tmp_path: Path):
    code = "import sys; sys.modules.update(jax=None, flax=None, orbax=None)\n"
    code += "from dilformer_jax import info; info.main(['info', 'default'])"
    path = os.pathsep.join([str(Path(info.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    asked = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(asked, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("network        dilformer"), done.stderr
