"""Batches of pairs: what is done is kept, what fails stays alone, and shards share the work."""

import csv
import json
from pathlib import Path

import pytest
from toys import pairs_file

from dilformer_jax import register
from dilformer_jax.data.subjects import Pair, Subject
from dilformer_jax.io.folders import digest
from dilformer_jax.io.volumes import BadInput, read_image
from dilformer_jax.registration import batch


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    subjects = []
    for name in "abcde":
        path = tmp_path / f"{name}.nii.gz"
        path.write_text(name)
        subjects.append(Subject(name, path, None))
    return [Pair(subjects[0], other) for other in subjects[1:]]


def run(pairs: list[Pair], output: Path, settings=None, shard=(1, 1)) -> tuple[dict[str, str], list[str]]:
    called = []

    def job(pair: Pair, folder: Path) -> None:
        called.append(pair.moving.name)
        if pair.moving.name == "c":
            raise BadInput("c.nii.gz is bad;\n mend it.")
        if pair.moving.name == "d":
            raise ZeroDivisionError("ours")
        folder.mkdir(parents=True, exist_ok=True)
        files = {str(s.image.absolute()): digest(s.image) for s in (pair.fixed, pair.moving)}
        (folder / "run.json").write_text(json.dumps({"settings": settings or {}, "inputs_sha256": files}))

    found = {o.pair.moving.name: (o.kind, o.sentence) for o in batch.run(pairs, output, job, settings or {}, shard)}
    return found, called


def test_a_failure_does_not_stop_the_others(pairs, tmp_path):
    found, called = run(pairs, tmp_path / "out")
    assert called == ["b", "c", "d", "e"] and found["b"] == found["e"] == ("done", "")
    assert found["c"] == ("refused", "c.nii.gz is bad; mend it.") and found["d"] == (
        "failed",
        "ZeroDivisionError: ours",
    )
    told = tmp_path / "out" / "failures" / "d_to_a.txt"
    assert "Traceback" in told.read_text() and (tmp_path / "out" / "failures" / "c_to_a.txt").exists()


def test_what_is_done_is_kept_unless_files_or_settings_changed(pairs, tmp_path):
    run(pairs, tmp_path / "out")
    found, called = run(pairs, tmp_path / "out")
    assert called == ["c", "d"] and found["b"][0] == found["e"][0] == "kept"
    pairs[0].moving.image.write_text("other")
    assert run(pairs, tmp_path / "out")[1] == ["b", "c", "d"]
    assert run(pairs, tmp_path / "out", {"refine": (1, 2)})[1] == ["b", "c", "d", "e"]
    assert run(pairs, tmp_path / "out", {"refine": (1, 2)})[1] == ["c", "d"]


def test_shards_are_all_of_it_and_have_nothing_in_common(pairs, tmp_path):
    parts = [run(pairs, tmp_path / "out", shard=(k, 3))[1] for k in (1, 2, 3)]
    assert parts == [["b", "e"], ["c"], ["d"]]


def test_the_command_over_a_table(inputs: Path, tmp_path: Path, capsys):
    table = pairs_file(
        inputs, tmp_path / "pairs.csv", ("fixed", "moving", "labels", "moving_labels"), ("fixed", "nan", "", "")
    )
    with table.open("a", newline="") as file:
        csv.writer(file).writerow([str(inputs / "moving.nii.gz"), str(inputs / "fixed.nii.gz"), "", ""])
    output = tmp_path / "out"
    command = [
        "register",
        "--pairs",
        str(table),
        "--output",
        str(output),
        "--weights",
        str(inputs / "weights"),
        "--affine",
        "none",
    ]
    with pytest.raises(SystemExit) as stopped:
        register.main(command)
    told = capsys.readouterr()
    assert stopped.value.code == 2 and "2 done, 1 refused" in told.out and "nan.nii.gz has" in told.err
    folders = sorted(path.name for path in output.iterdir() if path.is_dir())
    assert folders == ["failures", "fixed_to_moving", "moving_to_fixed"]
    assert read_image(output / "moving_to_fixed" / "moved.nii.gz").array.shape == (15, 18, 13)
    page = (output / "index.html").read_text()
    assert "nan.nii.gz has" in page and "moving_to_fixed" in page
    times = {name: (output / name / "run.json").stat().st_mtime_ns for name in folders[1:]}
    with pytest.raises(SystemExit):
        register.main(command)
    assert "2 kept, 1 refused" in capsys.readouterr().out
    assert times == {name: (output / name / "run.json").stat().st_mtime_ns for name in folders[1:]}
