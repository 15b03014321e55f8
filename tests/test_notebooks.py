"""The notebooks run, cell by cell, on smaller brains; the file itself is left alone."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "experiments" / "notebooks"


def cells(name: str) -> list[str]:
    found = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in found["cells"] if cell["cell_type"] == "code"]


def test_quickstart(tmp_path: Path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    sources = cells("quickstart.ipynb")
    assert sum("SHAPE = (64, 80, 64)" in source for source in sources) == 1
    # By refinement alone: the default network, at its full size, takes minutes here, and test_default_weights has it.
    assert sum("register(fixed, moving, fixed_labels" in source for source in sources) == 1
    smaller = {"(64, 80, 64)": "(32, 40, 32)", "register(fixed, moving, ": "register(fixed, moving, weights=None, "}
    space: dict = {}
    for source in sources:
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
