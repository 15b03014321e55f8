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
