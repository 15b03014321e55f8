"""The notebooks run, cell by cell, on smaller brains; the files themselves are left alone."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import training_runs as runs
from notebook_cells import sources

NOTEBOOKS = runs.ROOT / "experiments" / "notebooks"
LONGER = ("your_own_data", "colab", "export_and_compare")  # than a test would like: these have a tiny form


def test_quickstart(tmp_path: Path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    code = sources(NOTEBOOKS / "quickstart.ipynb")
    assert sum("SHAPE = (64, 80, 64)" in source for source in code) == 1
    # By refinement alone: the default network, at its full size, takes minutes here, and test_default_weights has it.
    assert sum("register(fixed, moving, fixed_labels" in source for source in code) == 1
    smaller = {"(64, 80, 64)": "(32, 40, 32)", "register(fixed, moving, ": "register(fixed, moving, weights=None, "}
    space: dict = {}
    for source in code:
        for whole, less in smaller.items():
            source = source.replace(whole, less)
        exec(compile(source, "quickstart.ipynb", "exec"), space)
    found = space["result"].metrics
    assert found["dice_before"] < 0.3 < found["dice_affine"] < found["dice"]
    assert space["result"]._repr_png_()
    assert {"moved.nii.gz", "field.nii.gz", "field_fsl.nii.gz", "report.html"} <= {
        p.name for p in (tmp_path / "registered").iterdir()
    }
    told = capsys.readouterr().out
    assert "comes back to within" in told and f"{found['dice']:.3f}" in told


def executed(name: str, place: Path) -> str:
    """What the cells of a notebook print in its tiny form, run in `place` by a process in which a warning is an error.

    Of one device, and with a compiler that optimises a little: these steps are many enough for that. All notebooks have
    the same network and images, so that the first compiles for the others.
    """
    pytest.importorskip("matplotlib")
    more = {"DILFORMER_NOTEBOOKS": "tiny", "PYTHONPATH": str(runs.ROOT), "MPLBACKEND": "agg"}
    script, notebook = Path(__file__).with_name("notebook_cells.py"), NOTEBOOKS / f"{name}.ipynb"
    command = [sys.executable, "-W", "error", script, notebook]
    process = subprocess.run(command, cwd=place, env=runs.environment(level=1, **more), text=True, capture_output=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def mean(results: Path, metric: str = "dice") -> float:
    return json.loads((results / "results.json").read_text())["summary"][metric]["mean"]


def test_your_own_data(tmp_path: Path):
    told = executed("your_own_data", tmp_path)
    about = json.loads((tmp_path / "brains" / "dataset.json").read_text())
    assert len(about["subjects"]) == 8 and about["splits"]["test"]["subjects"] == sorted(about["subjects"])[-2:]
    assert "labelled: 30 training pairs, 2 for choosing, 21 labels" in told
    assert "unlabelled: 30 training pairs, 2 for choosing, 0 labels" in told
    assert "a training step at 32x40x32 needs" in told
    # Stopped after a checkpoint and before the end; gone on from there, not from the beginning.
    starts = [int(step) for step in re.findall(r"from step (\d+) of 60", told)]
    assert "exit code 130" in told and len(starts) == 2 and starts[0] == 0 < starts[1] < 60
    steps = [json.loads(line)["step"] for line in (tmp_path / "runs/study/metrics.jsonl").read_text().splitlines()]
    assert [step for step in dict.fromkeys(steps)] == list(range(0, 61, 10))
    # On patients that neither trained nor chose.
    identity, network = tmp_path / "results" / "identity", tmp_path / "results" / "network"
    assert "none of the 2 subjects trained the network or chose its checkpoint" in told
    assert mean(identity) == pytest.approx(mean(network, "dice_before")) and mean(network) > mean(identity) + 0.005
    assert {"moved.nii.gz", "field.nii.gz", "report.html"} <= {p.name for p in (tmp_path / "registered").iterdir()}
    trained = json.loads((tmp_path / "weights" / "model.json").read_text())["training"]
    assert trained["dataset"] == "prepared" and len(trained["subjects"]) == 4


def test_colab(tmp_path: Path):
    told = executed("colab", tmp_path)
    # The cells that need Colab say that they are not there.
    assert told.count("not on Colab") == 2 and "on Colab: False" in told
    home = tmp_path / "home"
    assert "from step 0 of 60" in told and "from step 60 of 60" in told
    assert json.loads((home / "runs" / "first" / "config.json").read_text())["batch_size"] == 1
    assert mean(home / "results") > mean(home / "results", "dice_before") + 0.005
    assert "moved: (32, 40, 32)" in told and (home / "registered" / "report.html").is_file()
    assert (home / "weights" / "model.safetensors").is_file()


def test_export_and_compare(tmp_path: Path):
    told = executed("export_and_compare", tmp_path)
    rows: list[dict[str, Any]] = json.loads((tmp_path / "comparison" / "comparison.json").read_text())["methods"]
    names = ["identity", "Dilformer", "VoxelMorph"]
    assert {row["name"] for row in rows} >= set(names)
    table = (tmp_path / "comparison" / "comparison.md").read_text()
    assert all(f"| {name} " in table or f"**{name}" in table for name in names)
    assert (tmp_path / "comparison" / "comparison.png").stat().st_size > 10_000
    scores = {name: mean(tmp_path / "results" / name) for name in names}
    assert scores["identity"] + 0.01 < scores["Dilformer"]
    # The blocks' parameters add up to those of the table.
    (count,) = re.findall(r"^all +([\d,]+)$", told, re.MULTILINE)
    assert int(count.replace(",", "")) == next(row["parameters"] for row in rows if row["name"] == "Dilformer")
    (field, registered) = re.findall(r"Dice by the field alone ([\d.]+), as registered ([\d.]+)", told)[0]
    assert float(field) == pytest.approx(float(registered), abs=2e-3) and float(field) > 0.4


@pytest.mark.parametrize("name", LONGER)
def test_what_a_notebook_shows_was_run_from_top_to_bottom(name: str):
    path = NOTEBOOKS / f"{name}.ipynb"
    code = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 600_000
    assert not re.search(r"/tmp/|/root/|/home/", path.read_text(encoding="utf-8"))
