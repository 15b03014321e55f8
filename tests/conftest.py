"""Shared fixtures: simulated devices, the real brains where they are, training runs that are made once."""

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import training_runs as runs

# Before JAX starts: four simulated devices, so that the sharded step is tested everywhere, and a compiler that does not
# optimise what runs once.
os.environ.setdefault("XLA_FLAGS", runs.compiler(devices=4))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dilformer-tests-")
# Each of pytest-xdist's workers has a folder of its own: JAX writes an entry while another may read it already.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] += "/" + os.environ["PYTEST_XDIST_WORKER"]

import pytest
from absl import flags

# Grain's worker processes read absl flags, which nobody parses under pytest.
flags.FLAGS.mark_as_parsed()

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"the real brains are not at {DATA}")
    return DATA


@pytest.fixture
def unchecked() -> Iterator[None]:
    """The functions as users have them, without the test run's shape checks in front of their own."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations are traced in the form that accelerators have, the sooner, where nothing is computed."""
    from dilformer_jax.ops import platforms

    monkeypatch.setattr(platforms, "by_platform", lambda *operands, default, **_: default(*operands))


# The files that take longest, which pytest-xdist's workers begin with, so that none is left with one at the end.
LONGEST = (
    *("train", "notebooks", "step", "models", "configs", "multihost"),
    *("affine", "end_to_end", "default_weights", "slabs", "refine", "benchmark"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


# --- Runs of the training command that several test files look at, each made once ---
# By whichever of pytest-xdist's workers asks first, while others wait. Imported where they are made: pytest has then
# begun to check the shapes of what is imported.


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """once(name, make) is the folder of this name, which make(folder) has filled."""
    base = tmp_path_factory.getbasetemp()
    common = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def filled(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = common / name, common / f"{name}.done"
        with (common / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return filled


@pytest.fixture(scope="session")
def phantoms(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The phantoms of `demo.py:tiny`."""
    from dilformer_jax.data import generated

    return once(
        "phantoms", lambda folder: generated.phantoms(folder, train=2, validation=2, shape=(32, 32, 32), seed=0)
    )


@pytest.fixture(scope="session")
def workdir(once: Callable[[str, Callable[[Path], object]], Path], phantoms: Path) -> Path:
    """The workdir of a run of `training_runs.WHOLE` that nothing disturbed."""
    return once("whole", lambda folder: runs.finish(runs.start(runs.training(folder, phantoms, *runs.WHOLE))))


@pytest.fixture(scope="session")
def devices(once: Callable[[str, Callable[[Path], object]], Path], phantoms: Path) -> dict[int, Path]:
    """Workdirs of `training_runs.FIVE`, by the number of devices; of four, two share each volume."""

    def train(folder: Path) -> None:
        # Side by side: most of their time is a compiler's, which uses one core.
        starts = (
            runs.start(
                runs.training(folder / str(count), phantoms, *runs.FIVE, f"--config.space={2 if count > 1 else 1}"),
                env=runs.environment(count),
            )
            for count in (1, 4)
        )
        runs.finish(*starts)

    folder = once("devices", train)
    return {count: folder / str(count) for count in (1, 4)}


@pytest.fixture(scope="session")
def inputs(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """What `toys.write_inputs` writes."""
    import toys

    return once("inputs", toys.write_inputs)
