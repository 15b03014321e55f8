"""Shared fixtures: simulated devices, the real brains where they are, one compilation cache for the whole run."""

import os
import tempfile
from pathlib import Path

# Before JAX starts: four simulated devices, so that the sharded step is tested everywhere, and a compiler that does not
# optimise what runs once.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="dilformer-tests-"))

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


# --- Runs of the training command that several test files look at, each made once ---
# Imported where they are made: pytest has then begun to check the shapes of what is imported.


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantoms of `demo.py:tiny`."""
    from dilformer_jax.data import sources

    folder = tmp_path_factory.mktemp("phantoms")
    sources.phantoms(folder, train=2, validation=2, shape=(32, 32, 32), seed=0)
    return folder


@pytest.fixture(scope="session")
def workdir(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """The workdir of a run of `training_runs.WHOLE` that nothing disturbed."""
    import training_runs as runs

    folder = tmp_path_factory.mktemp("whole") / "run"
    runs.finish(runs.start(runs.training(folder, phantoms, *runs.WHOLE)))
    return folder


@pytest.fixture(scope="session")
def devices(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> dict[int, Path]:
    """Workdirs of `training_runs.FIVE`, by the number of devices; of four, two share each volume."""
    import training_runs as runs

    found = {count: tmp_path_factory.mktemp("devices") / str(count) for count in (1, 4)}
    # Side by side: most of their time is a compiler's, which uses one core.
    starts = (
        runs.start(
            runs.training(path, phantoms, *runs.FIVE, f"--config.space={2 if count > 1 else 1}"),
            env=runs.environment(count),
        )
        for count, path in found.items()
    )
    runs.finish(*starts)
    return found
