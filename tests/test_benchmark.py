"""The benchmark runs end to end, with PyTorch and without, and its lines make a table."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
# Runs the benchmark where nothing finds PyTorch, as where it is not installed.
WITHOUT_TORCH = """
import importlib.abc, runpy, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            raise ModuleNotFoundError("hidden")
sys.meta_path.insert(0, Hidden())
sys.path.insert(0, sys.argv[1])
del sys.argv[0]
sys.argv[0] += "/benchmark.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
KEYS = {"section", "case", "size", "dtype", "device", "ours", "peer", "theirs", "ratio", "target", "rounds"}


def lines(*command: str) -> list[dict[str, Any]]:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_benchmark_without_torch_measures_this_package_alone(tmp_path: Path) -> None:
    sections = "conv", "warp", "lncc", "integration", "inference", "startup"
    found = lines("-c", WITHOUT_TORCH, str(EXPERIMENTS), "--quick", "--rounds", "1", "--only", *sections)
    assert found[0]["torch"] is None
    rows = found[1:]
    assert {row["section"] for row in rows} == set(sections)
    assert all(set(row) >= KEYS and row["ours"] > 0 for row in rows)
    assert {row["peer"] for row in rows if row["theirs"] is not None} == {"XLA, ones", "4 steps", "allowed"}
    path = tmp_path / "lines"
    path.write_text("\n".join(map(json.dumps, found)))
    done = subprocess.run(
        [sys.executable, str(EXPERIMENTS / "benchmark.py"), "--table", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith("## ") for line in done.stdout.splitlines()) == len(sections)
    assert sum(row["case"] in done.stdout for row in rows) == len(rows)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_benchmark_sets_this_package_against_torch() -> None:
    rows = lines(str(EXPERIMENTS / "benchmark.py"), "--quick", "--rounds", "1", "--only", "conv", "forms")[1:]
    assert {row["section"] for row in rows} == {"conv", "forms"}
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
    assert all(row["peer"] == "PyTorch" for row in rows if row["section"] != "forms")
