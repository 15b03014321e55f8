"""The weights that ship: what they are, who takes them by default and who does not, what a broken installation says.

They are registered with as they are, but on a coarser grid than they declare, since at 1 mm a pair takes minutes here.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from toys import pairs_file, write

import dilformer_jax
from dilformer_jax import api, cli, evaluate, learn2reg, register
from dilformer_jax.data.phantoms import phantom
from dilformer_jax.io import bundle
from dilformer_jax.io.volumes import BadInput
from dilformer_jax.registration import methods, predictor
from dilformer_jax.registration.refine import PRESETS, Refinement

SHIPPED = Path(dilformer_jax.__file__).parent / "weights"
GRID = {"shape": [64, 80, 64], "spacing_mm": [2.5, 2.5, 2.5], "orientation": "LPS"}


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights that ship, with another grid."""
    folder = tmp_path_factory.mktemp("coarse")
    shutil.copy(SHIPPED / "model.safetensors", folder)
    description = json.loads((SHIPPED / "model.json").read_text(encoding="utf-8"))
    (folder / "model.json").write_text(json.dumps(description | {"grid": GRID}))
    return folder


@pytest.fixture(scope="module")
def brains(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two phantoms with their labels, of brains' size, as options of `register`."""
    folder, options = tmp_path_factory.mktemp("brains"), []
    for seed, role in enumerate(("fixed", "moving"), 1):
        for name, array in zip(("", "-labels"), phantom(seed, (64, 80, 64)), strict=True):
            path = write(folder / f"{role}{name}.nii.gz", array, np.diag([2.5, 2.5, 2.5, 1.0]))
            options += [f"--{role}{name}", str(path)]
    return options


@pytest.fixture(scope="module")
def registered(brains: list[str], coarse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the command, which is told of no weights, and by the network alone."""
    folder = tmp_path_factory.mktemp("registered") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "SHIPPED", coarse)
        register.main(["register", *brains, "--output", str(folder), "--affine", "none", "--refine", "0"])
    return folder


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], main, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["dilformer", *map(str, arguments)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1, said
    return said


def test_they_are_free_whole_and_of_no_one() -> None:
    assert bundle.SHIPPED == SHIPPED and {"README.md", "model.json", "model.safetensors"} <= {
        path.name for path in SHIPPED.iterdir()
    }
    params, description = bundle.load("default")
    assert description == bundle.describe(SHIPPED) and len(bundle.flatten(params)) > 10
    # Asked for what their description says, which is no 1, unless another is asked for.
    known = predictor.load_predictor("default")
    assert known.smoothness == description["smoothness"] != 1 and known.with_smoothness(1.0).smoothness == 1
    training = description["training"]
    assert training["licence"].startswith("Apache-2.0") and training["dataset"] == "label_maps"
    assert training["subjects"] and training["chosen_by"] and not {*training["subjects"]} & {*training["chosen_by"]}
    assert str(Path.home()) not in json.dumps(description) and "/" not in "".join(training["subjects"])


def test_a_folder_of_that_name_has_another_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(SHIPPED, tmp_path / "default")
    (tmp_path / "default" / "model.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    assert bundle.describe("default") == bundle.describe(SHIPPED)
    for other in ("./default", Path("default")):
        with pytest.raises(BadInput, match=r"default/model\.json is no description"):
            bundle.describe(other)


def test_the_command_registers_by_them_unless_told_otherwise(registered: Path) -> None:
    found = record(registered)
    assert found["settings"]["network"] == "default"
    assert found["settings"]["parameters_sha256"] == bundle.describe("default")["sha256"]
    assert found["settings"]["smoothness"] == bundle.describe("default")["smoothness"]
    assert found["grid"]["shape"] == GRID["shape"] and "weights" not in found["command"]
    assert found["metrics"]["dice"] > found["metrics"]["dice_before"] + 0.03
    assert found["metrics"]["displacement_mean_mm"] > 0.3  # not the identity
    assert found["settings"]["refinement"] is None


def test_without_a_network_is_another_result(brains: list[str], registered: Path, tmp_path: Path, capsys) -> None:
    register.main(
        ["register", *brains, "--output", str(tmp_path), "--affine", "none", "--weights", "none", "--refine", "2"]
    )
    assert "No network: refinement by LNCC, 2 steps at the finest level." in capsys.readouterr().out
    found = record(tmp_path)
    assert found["settings"]["network"] is found["settings"]["parameters_sha256"] is None
    assert found["grid"]["shape"] != GRID["shape"]
    moved = [nib.load(folder / "moved.nii.gz").get_fdata() for folder in (registered, tmp_path)]
    assert np.abs(moved[0] - moved[1]).mean() > 0.005 * np.ptp(moved[0])


def test_the_report_and_what_is_printed_name_them(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Of a toy in their place; and without labels there are no structures to be drawn."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bundle, "SHIPPED", inputs / "weights")
    images = [f"--{role}={inputs / f'{role}.nii.gz'}" for role in ("fixed", "moving")]
    refined = "--refine=2", "--similarity=lncc"
    register.main(["register", *images, "--output", str(tmp_path), "--affine=none", *refined, "--report"])
    how = "refinement by LNCC, 2 steps at the finest level."
    named = f"Network: default (SHA-256 {bundle.describe('default')['sha256']}), then {how}"
    page = (tmp_path / "report.html").read_text("utf-8")
    assert named in capsys.readouterr().out and named in page and "Structures on the images" not in page
    result = dilformer_jax.register(*(inputs / f"{role}.nii.gz" for role in ("fixed", "moving")), affine="none")
    assert record(result.save(tmp_path / "saved"))["settings"]["network"] == "default"


@pytest.mark.parametrize("preset", ["fast", "default"])
def test_which_preset_follows(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, preset: str
) -> None:
    """One constant says it, of the default network alone; --preset and --refine go before it."""
    monkeypatch.setattr(bundle, "SHIPPED", inputs / "weights")
    monkeypatch.setattr(predictor, "AFTER_DEFAULT", preset)

    def how(*more: object) -> api.How:
        options = register._parser().parse_args(["--output", "o", *map(str, more)])
        return register._how(options, "")

    by_default = PRESETS[preset]
    for options, network, refinement in (
        ((), "default", by_default),
        (("--weights", "default"), "default", by_default),
        (("--refine", "0"), "default", None),
        (("--preset", "fast"), "default", None),
        (("--preset", "best"), "default", PRESETS["best"]),
        (("--refine", "7"), "default", Refinement(7)),
        (("--refine", "7", "--similarity", "mind"), "default", Refinement(7, "mind")),
        (("--weights", inputs / "weights"), str(inputs / "weights"), None),
        (("--weights", "none"), None, Refinement()),
        (("--weights", "none", "--refine", "7"), None, Refinement(7)),
    ):
        assert (how(*options).settings["network"], how(*options).refinement) == (network, refinement), options
    assert api.network("default", None)[1] == preset and api.network(inputs / "weights", None)[1] == "fast"
    if preset == "default":
        assert how("--similarity", "nmi").refinement == Refinement(similarity="nmi")
    else:
        images = ("--fixed", inputs / "fixed.nii.gz", "--moving", inputs / "moving.nii.gz", "--output", tmp_path / "o")
        said = refused(capsys, register.main, *images, "--similarity", "mind")
        assert "--similarity says how to refine; give --preset default with it" in said


def test_python_takes_them_or_none(inputs: Path) -> None:
    images = inputs / "fixed.nii.gz", inputs / "moving.nii.gz"
    for none in (None, "none"):
        assert api.network(none, None) == (None, "default")
    found = dilformer_jax.register(*images, weights=None, refine=1, affine="none")
    assert found.how.predictor is None and found.how.refinement == Refinement(1)
    behind = dilformer_jax.register(*images, weights=inputs / "weights", refine=1, affine="none")
    assert behind.how.refinement == Refinement(1)
    for keywords, sentence in (
        ({"weights": None, "refine": 0}, "Nothing would register this pair"),
        ({"weights": inputs / "weights", "refine": -1}, "refine is -1; give 0 or more steps"),
        (
            {"weights": inputs / "weights", "similarity": "mind"},
            "similarity says how to refine; give preset default with it",
        ),
        ({"weights": None, "preset": "slow"}, "preset is 'slow'; give one of fast, default, best"),
        ({"weights": None, "windows": 5}, "A refinement has no windows; it has similarity, window"),
        ({"weights": None, "window": 4}, "an odd number of voxels, got 4"),
        ({"weights": None, "workdir": inputs}, "weights None or of workdir .*; give one of them"),
        ({"weights": "none", "workdir": inputs}, "weights none or of workdir .*; give one of them"),
    ):
        with pytest.raises(BadInput, match=sentence):
            dilformer_jax.register(*images, **keywords)


def test_evaluation_takes_them_by_name(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    table = pairs_file(inputs, tmp_path / "pairs.csv", ("fixed", "moving", "labels", "moving_labels"))
    pairs = ("--pairs", table, "--output", tmp_path / "scores")
    assert "Nothing to evaluate; give --workdir RUN" in refused(capsys, evaluate.main, *pairs)
    for main, more in ((evaluate.main, pairs), (learn2reg.main, ("--dataset", "x.json"))):
        said = refused(capsys, main, "--weights", "none", *more)
        assert "none is no network; leave it out and give --method identity" in said
    said = refused(capsys, evaluate.main, "--weights", "default", *pairs)
    if bundle.describe("default")["network"]["options"]["levels"] >= 4:
        assert re.search(r"13, too small for default, .* or do without a network", said)
    monkeypatch.setattr(bundle, "SHIPPED", inputs / "weights")
    evaluate.main(["evaluate", *map(str, ("--weights", "default", *pairs))])
    assert json.loads((tmp_path / "scores" / "results.json").read_text())["method"] == "default"
    assert record(tmp_path / "scores")["parameters_sha256"] == bundle.describe("default")["sha256"]


@pytest.mark.parametrize("how", [["--method", "identity"], ["--weights", "default"]], ids=" ".join)
def test_scores_are_of_what_registering_would_find(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, how: list[str]
) -> None:
    """Refined alike behind a network and without one."""
    refinements = []

    def chosen(name, weights, workdir, refinement, *_):
        refinements.append(refinement)
        raise BadInput("that is all.")

    monkeypatch.setattr(methods, "chosen", chosen)
    with pytest.raises(BadInput, match="that is all"):
        learn2reg._method(learn2reg._parser().parse_args(["--dataset", "x.json", *how, "--refine", "3"]))
    table = pairs_file(inputs, tmp_path / "pairs.csv", ("fixed", "moving", "labels", "moving_labels"))
    assert "that is all" in refused(capsys, evaluate.main, *how, "--refine", "3", "--pairs", table)
    assert refinements == [Refinement(3)] * 2


def test_only_one_network_is_named(inputs: Path, tmp_path: Path, capsys) -> None:
    images = ("--fixed", inputs / "fixed.nii.gz", "--moving", inputs / "moving.nii.gz", "--output", tmp_path / "o")
    for weights in ("none", "default"):
        said = refused(capsys, register.main, *images, "--weights", weights, "--workdir", tmp_path)
        assert "not allowed with argument" in said and not (tmp_path / "o").exists()


@pytest.mark.parametrize("damage", ["nothing", "no parameters", "other parameters", "no JSON"])
def test_a_broken_installation(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, damage: str
) -> None:
    broken = tmp_path / "weights"
    monkeypatch.setattr(bundle, "SHIPPED", broken)
    if damage != "nothing":
        shutil.copytree(SHIPPED, broken)
        file = broken / "model.safetensors"
        {"no parameters": file.unlink, "other parameters": lambda: file.write_bytes(b"x"),
         "no JSON": lambda: (broken / "model.json").write_text("x")}[damage]()  # fmt: skip
    images = ("--fixed", inputs / "fixed.nii.gz", "--moving", inputs / "moving.nii.gz", "--output", tmp_path / "o")
    said = refused(capsys, register.main, *images)
    wrong = {"nothing": "model.json does not exist", "no parameters": "model.safetensors does not exist",
             "other parameters": "its sha256 differs", "no JSON": "model.json is no JSON"}[damage]  # fmt: skip
    assert said.startswith("The default weights cannot be used (") and wrong in said
    assert "install dilformer-jax again, or do without a network (--weights none" in said
    assert not (tmp_path / "o").exists()


def test_help_says_so(capsys) -> None:
    for parser in (register._parser(), evaluate._parser(), learn2reg._parser()):
        assert isinstance(parser, cli.Arguments) and isinstance(parser, argparse.ArgumentParser)
        assert "--weights default|" in " ".join(parser.format_help().split())
