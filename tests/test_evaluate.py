"""The commands evaluate and export on small files, with networks whose answer is known."""

import json
from pathlib import Path

import numpy as np
import pytest
from toys import affine, image, pairs_file, write

from dilformer_jax import cli, evaluate, export
from dilformer_jax.io import bundle
from dilformer_jax.io.volumes import read_image, read_labels
from dilformer_jax.registration import evaluation, pipeline, selection
from dilformer_jax.registration.predictor import load_predictor
from dilformer_jax.training import checkpoint

PAIRS = (
    ("fixed", "moving", "labels", "moving_labels"),
    ("moving", "fixed", "moving_labels", "labels"),
    ("fixed", "moving", "labels", "labels"),
)


@pytest.mark.parametrize(
    ("asked", "folder"),
    [
        (["--workdir", "run"], "evaluation"),
        (["--workdir", "run", "--method", "identity"], "evaluation-identity"),
        (["--workdir", "run", "--protocol", "lpba40", "--data", "d"], "evaluation-lpba40"),
        (["--workdir", "run", "--protocol", "ixi", "--split", "test", "--data", "d"], "evaluation-ixi-test"),
        (["--method", "identity", "--pairs", "data/mine.csv"], "evaluation-identity-mine"),
        (["--workdir", "run", "--refine", "50"], "evaluation-refine50"),
        (["--workdir", "run", "--smoothness", "2", "--refine", "9"], "evaluation-smoothness2-refine9"),
        (["--workdir", "run", "--preset", "best", "--refine", "9"], "evaluation-best-refine9"),
        (["--method", "identity", "--refine", "9", "--similarity", "nmi"], "evaluation-identity-refine9-nmi"),
    ],
)
def test_what_is_asked_of_a_run_does_not_overwrite_what_was_asked_before(asked: list[str], folder: str):
    assert evaluate._folder(evaluate._parser().parse_args(asked)) == folder


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
    assert third["dice_absent0"] == 0.5 and first["hd95_before"] == first["hd95"]
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
        "dice_folding.png",
        "dice_per_label.png",
        "median.png",
        "report.html",
        "results.csv",
        "results.json",
        "results_pairs.csv",
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
    result = pipeline.register(*volumes, load_predictor(inputs / "weights"), *labels, affine="none")
    for name in ("dice", "dice_before", "folding_percent", "sdlogj"):
        assert with_labels[name] == pytest.approx(result.metrics[name])
    assert with_labels["dice"] != with_labels["dice_before"]
    assert 0 < with_labels["seconds"] < 1  # compilation takes longer
    found = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert found["method"] == str(inputs / "weights") and found["protocol"] == str(table)
    timing = found["timing"]
    assert timing["runs"] == 5 and 0 < timing["median_seconds"] < 1 and timing["parameters"] > 100
    assert timing["device"] in (tmp_path / "scores" / "summary.md").read_text()
    assert "dice" not in without and without["sdlogj"] > 0
    assert json.loads((tmp_path / "scores" / "run.json").read_text())["parameters_sha256"]


def test_an_output_that_cannot_be_is_said_at_once(inputs: Path, tmp_path: Path, capsys):
    table = pairs_file(inputs, tmp_path / "pairs.csv", PAIRS[0])
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "unfinished").write_text("mine")
    for output in ("file", "file/below", "folder"):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(
                ["evaluate", "--method", "identity", "--pairs", str(table), "--output", str(tmp_path / output)]
            )
        told = capsys.readouterr().err
        assert stopped.value.code == 2 and "cannot be written" in told and told.count("\n") == 1
    assert (tmp_path / "folder" / "unfinished").read_text() == (tmp_path / "file").read_text() == "mine"


def results(folder: Path) -> dict:
    """What does not depend on the clock."""
    found = json.loads((folder / "results.json").read_text())
    del found["timing"], found["summary"]["seconds"]
    return found | {"pairs": [{**row, "seconds": None} for row in found["pairs"]]}


def test_stopped_it_goes_on_and_shards_come_to_the_same(inputs: Path, tmp_path: Path, capsys, monkeypatch):
    table = pairs_file(inputs, tmp_path / "pairs.csv", *PAIRS)

    def run(name: str, *more: str) -> Path:
        evaluate.main(
            ["evaluate", "--method", "identity", "--pairs", str(table), "--output", str(tmp_path / name), *more]
        )
        return tmp_path / name

    whole = run("whole")
    capsys.readouterr()
    # Killed while the third pair is scored.
    score, names = evaluation.row, []

    def killed(case, scoring):
        names.append(case.pair.name)
        if len(names) == 3:
            raise KeyboardInterrupt
        return score(case, scoring)

    monkeypatch.setattr(evaluation, "row", killed)
    with pytest.raises(SystemExit) as stopped:
        run("killed")
    assert stopped.value.code == 130 and [path.name for path in (tmp_path / "killed").iterdir()] == ["unfinished"]
    names.clear()
    run("killed")
    assert "2 of 3 pairs were scored before" in capsys.readouterr().err and len(names) == 1
    assert results(tmp_path / "killed") == results(whole)
    assert sorted(path.name for path in whole.iterdir()) == sorted(
        path.name for path in (tmp_path / "killed").iterdir()
    )

    monkeypatch.setattr(evaluation, "row", score)
    run("shards", "--shard", "2/2")
    assert "1 of 3 pairs are scored" in capsys.readouterr().out and not (tmp_path / "shards" / "results.json").exists()
    run("shards", "--shard", "1/2")
    assert results(tmp_path / "shards") == results(whole)


def test_exchanged_images_and_tolerance(inputs: Path, tmp_path: Path):
    table = pairs_file(inputs, tmp_path / "pairs.csv", PAIRS[0])
    arguments = ["--weights", str(inputs / "weights"), "--pairs", str(table), "--output", str(tmp_path / "scores")]
    evaluate.main(["evaluate", *arguments, "--inverse-consistency", "--tolerance", "2.5"])
    (row,) = json.loads((tmp_path / "scores" / "results.json").read_text())["pairs"]
    # The network moves both ways by (1, -2, 0.5) voxels of 1, 1.5 and 2 mm, and a little by the images.
    assert row["inverse_consistency_mm"] == pytest.approx(np.linalg.norm([2, 4 * 1.5, 1 * 2]), rel=0.2)
    definition = json.loads((tmp_path / "scores" / "results.json").read_text())["definition"]
    assert definition["nsd"].endswith("tolerance 2.5 mm")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "Nothing to evaluate"),
        (("--method", "identity"), "No pairs to evaluate"),
        (("--pairs", "good.csv"), "Nothing to evaluate"),
        (("--method", "identity", "--protocol", "lpba40"), "--data goes with --protocol or --dataset"),
        (("--method", "identity", "--data", "."), "--data goes with --protocol or --dataset"),
        (
            ("--method", "identity", "--protocol", "lpba41", "--data", "."),
            "--protocol lpba41 is not known",
        ),
        (("--method", "identity", "--protocol", "lpba40-test", "--data", "."), "give --protocol lpba40 --split test"),
        (("--method", "identity", "--protocol", "lpba40", "--data", "."), "S01_t1.nii.gz"),
        (("--method", "identity", "--pairs", "good.csv", "--split", "test"), "--split is for --data"),
        (("--method", "identity", "--pairs", "good.csv", "--dataset", "ixi"), "--data goes with"),
        (("--method", "affine", "--pairs", "good.csv", "--refine", "5"), "not from --method affine"),
        (("--method", "identity", "--pairs", "good.csv", "--shard", "3/2"), "'3/2' is no part of a whole"),
        (("--method", "identity", "--pairs", "good.csv", "--labels", "21-x"), "'21-x' is no list of labels"),
        (("--method", "identity", "--pairs", "good.csv", "--labels", "9-7"), "is no list of labels"),
        (("--method", "identity", "--pairs", "good.csv", "--labels", "3,1-99999999"), "names more than 100,000 labels"),
        (("--method", "identity", "--pairs", "good.csv", "--weights", "weights"), "--weights says what to evaluate"),
        (("--method", "identity", "--pairs", "lost.csv"), "lost.csv does not exist"),
        (("--method", "identity", "--pairs", "mixed.csv"), "lie on different grids"),
        (("--weights", "weights", "--pairs", "small.csv"), "small.nii.gz is 15x18x2, too small for"),
        (("--method", "identity", "--pairs", "small.csv"), "small.nii.gz is 15x18x2, too thin to be scored"),
        (("--method", "affine", "--pairs", "small.csv"), "small.nii.gz is 15x18x2, too small to align"),
        (("--method", "identity", "--pairs", "good.csv", "--tolerance", "-1"), "'-1' is no distance above 0 mm"),
        (("--method", "identity", "--pairs", "good.csv", "--shard", "2/2"), "--shard 2/2 has none of the 1 pairs"),
        (("--method", "identity", "--pairs", "nan.csv"), "nan.nii.gz has"),
        (("--workdir", "nowhere"), "config.json cannot be read"),
        (
            ("--weights", "weights", "--pairs", "good.csv", "--smoothness", "2"),
            "trained for no smoothness but its own, 1",
        ),
    ],
)
def test_what_cannot_be_evaluated(inputs: Path, tmp_path: Path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(inputs)
    pairs_file(inputs, inputs / "good.csv", PAIRS[0])
    pairs_file(inputs, inputs / "mixed.csv", PAIRS[0], ("fixed", "elsewhere", "", ""))
    pairs_file(inputs, inputs / "small.csv", ("small", "small", "", ""))
    pairs_file(inputs, inputs / "nan.csv", ("nan", "fixed", "", ""))
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["evaluate", *arguments, "--output", str(tmp_path / "output")])
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in told and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_label_lists_there_and_back():
    assert cli.label_list("21-24, 41,22") == (21, 22, 23, 24, 41)
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
        "subjects": ["a", "b", "c", "d"], "chosen_by": ["e", "f"], "pairs": 12, "steps": 10, "seed": 5,
        "start_from": "", "others": [],
    }  # fmt: skip
    assert "model.safetensors" in told and "dice 0.6" in told and "step 10 (best)" in told
    export.main(["export", "--workdir", str(workdir), "--output", str(tmp_path / "last"), "--checkpoint", "latest"])
    assert bundle.load(tmp_path / "last")[1]["validation"] == {"dice": 0.55}

    # What the run recorded goes before what its folder says by now.
    recorded = {"trained": {"a": "/a.nii", "f": "/f.nii"}, "chosen_by": {"b": "/b.nii"}}
    (workdir / "run.json").write_text(json.dumps({"subjects": recorded}))
    export.main(["export", "--workdir", str(workdir), "--output", str(tmp_path / "recorded")])
    training = bundle.describe(tmp_path / "recorded")["training"]
    assert (training["subjects"], training["chosen_by"]) == (["a", "f"], ["b"])
    # What it began with did not say who had trained it: the folder is not to answer for that.
    (workdir / "run.json").write_text(json.dumps({"subjects": {"trained": None, "chosen_by": {"b": ""}}}))
    export.main(["export", "--workdir", str(workdir), "--output", str(tmp_path / "unknown")])
    training = bundle.describe(tmp_path / "unknown")["training"]
    assert (training["subjects"], training["chosen_by"]) == (None, ["b"])
    assert selection.of_bundle(tmp_path / "unknown").trained is None

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
