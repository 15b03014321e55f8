"""The package as others install it: a wheel, away from the clone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dilformer_jax.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing in it but what `pip install .` puts there."""
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "target"))
    # Of a copy, since setuptools builds beside the source.
    shutil.copytree(ROOT / "dilformer_jax", source / "dilformer_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # Without the network: what the package needs is installed here already, and so is what builds it.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", target, source], check=True)
    return target


def test_every_module_is_installed(installed: Path) -> None:
    files = lambda root: {path.relative_to(root) for path in (root / "dilformer_jax").rglob("*.[pj][ys]*")}
    ours, theirs = ({path for path in files(root) if path.suffix in (".py", ".json")} for root in (ROOT, installed))
    assert ours == theirs and (installed / "dilformer_jax" / "py.typed").is_file()
    assert not (installed / "tests").exists() and not (installed / "configs").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_starts_away_from_the_clone(installed: Path, tmp_path: Path, command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    code = f"import dilformer_jax.{command} as module; print(module.__file__); module.main()"
    asked = [sys.executable, "-W", "error", "-c", code, "--help"]
    told = subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith(str(installed)) and "usage: " in told.stdout
    assert (installed / "bin" / "dilformer").is_file()
