"""The package as others install it: a wheel, away from the clone."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from dilformer_jax.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built, since setuptools builds beside the source."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "dilformer_jax", source / "dilformer_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # What `export` leaves beside the weights that are copied here is not shipped.
    (source / "dilformer_jax" / "weights" / "model.npz").write_bytes(b"")
    return source


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing in it but what `pip install .` puts there, which is what a wheel has."""
    target = tmp_path_factory.mktemp("target")
    # Without the network: what the package needs is installed here already, and so is what builds it.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", target, source], check=True)
    return target


def test_every_module_is_installed(installed: Path) -> None:
    files = lambda root: {path.relative_to(root) for path in (root / "dilformer_jax").rglob("*.[pj][ys]*")}
    ours, theirs = ({path for path in files(root) if path.suffix in (".py", ".json")} for root in (ROOT, installed))
    assert ours == theirs and (installed / "dilformer_jax" / "py.typed").is_file()
    assert not (installed / "tests").exists() and not (installed / "configs").exists()


WEIGHTS = ["README.md", "model.json", "model.safetensors"]


def test_the_default_weights_are_installed(installed: Path) -> None:
    ours, theirs = (root / "dilformer_jax" / "weights" for root in (ROOT, installed))
    assert sorted(path.name for path in theirs.iterdir()) == WEIGHTS
    assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in WEIGHTS)
    code = "from dilformer_jax.io import bundle; print(bundle.load('default')[1]['sha256'], bundle.SHIPPED)"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    told = subprocess.run([sys.executable, "-c", code], cwd=installed, env=environment, capture_output=True, text=True)
    assert told.stdout.split() == [json.loads((ours / "model.json").read_text())["sha256"], str(theirs)], told.stderr


def test_a_source_distribution_has_them(source: Path, tmp_path: Path) -> None:
    code = f"import setuptools.build_meta as build; build.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = [Path(*Path(name).parts[1:]) for name in archive.getnames()]
    assert sorted(path.name for path in names if path.parent == Path("dilformer_jax/weights")) == WEIGHTS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_starts_away_from_the_clone(installed: Path, tmp_path: Path, command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    code = f"import dilformer_jax.{command} as module; print(module.__file__); module.main()"
    asked = [sys.executable, "-W", "error", "-c", code, "--help"]
    told = subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith(str(installed)) and "usage: " in told.stdout
    assert (installed / "bin" / "dilformer").is_file()
