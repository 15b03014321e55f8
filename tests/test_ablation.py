"""The ablation: its configurations, and what it makes of runs."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import training_runs as runs

from dilformer_jax import models
from dilformer_jax.data import pipeline
from dilformer_jax.ops import losses
from dilformer_jax.registration.predictor import keywords
from dilformer_jax.training import state

sys.path.insert(0, str(runs.ROOT / "experiments"))
import ablation

VARIANTS = [(study, name) for study, variants in ablation.STUDIES.items() for name in variants]


@pytest.mark.parametrize("scale", ablation.SCALES)
@pytest.mark.parametrize(("study", "name"), VARIANTS)
def test_a_variant_differs_from_the_base_in_what_it_says(study: str, name: str, scale: str) -> None:
    base, config = (
        ablation.configured(ablation.STUDIES[study][which], scale, 600, 3, Path("LPBA40"))
        for which in (ablation.BASE, name)
    )
    module = models.create(config.model.name, **keywords(config.model.options.to_dict()))
    shape = [n // config.data.preprocessing.downsample for n in (160, 192, 160)]
    assert not any(n % module.downsampling for n in shape)
    assert min(shape) // 2 ** (len(config.loss.weights) - 1) >= config.loss.windows[-1]
    assert len(config.loss.weights) == len(config.loss.windows)
    state.optimiser(total_steps=600, **config.optimiser.to_dict())
    assert set(config.loss) <= set(inspect.signature(losses.multi_resolution).parameters)
    assert {"flips", "affine", "gamma"} <= set(inspect.signature(pipeline.batches).parameters)
    assert (config.seed, config.total_steps, config.data.directory) == (3, 600, "LPBA40")
    differs = name != ablation.BASE and not all(key.startswith("test.") for key in ablation.STUDIES[study][name])
    assert (config.to_dict() != base.to_dict()) == differs


def test_a_table_says_what_is_shown_and_what_is_not(tmp_path: Path) -> None:
    """The base and two variants; of one seed apart by 0.02 always, of the other by noise of the same size."""
    noise = {"base": (0, 0, 0), "no MSR": (0.001, -0.001, 0.0), "no SRF": (-0.001, 0.0, 0.001)}
    effect = {"base": 0.0, "no MSR": -0.02, "no SRF": 0.0005}
    folder = tmp_path / "half-600"
    folder.mkdir()
    for name, apart in noise.items():
        for seed, more in enumerate(apart):
            pairs = [{"name": "p", "dice": 0.6 + 0.1 * n + effect[name] + more, "folding": 0.01 * n} for n in range(2)]
            run = {"name": name, "seed": seed, "pairs": pairs, "parameters": 1234, "steps": 600}
            found = run | {"devices": "a machine", "versions": {"commit": "c0ffee"}}
            (folder / f"{ablation.filed(name)}-{seed}.json").write_text(json.dumps(found))
    lines = ablation.table(tmp_path, "parts", "half", 600).splitlines()
    assert lines[0] == "half resolution, 600 steps, a machine, commit c0ffee"
    error = np.sqrt((4 * 0.001**2) / 4) / np.sqrt(3)
    assert lines[4:] == [
        "| base | 3 | 0.6500 | | | | 0.0050 | 1,234 |",
        f"| no MSR | 3 | 0.6300 | -0.0200 | {error:.4f} | worse | 0.0050 | 1,234 |",
        f"| no SRF | 3 | 0.6505 | +0.0005 | {error:.4f} | none shown | 0.0050 | 1,234 |",
    ]
    # A seed that the base has not, and a single one: no difference, no error, nothing shown.
    for name, seed in (("no SRF", 7), ("no MSR", 1)):
        kept = folder / f"{ablation.filed(name)}-{seed}.json"
        if not kept.exists():
            source = json.loads((folder / f"{ablation.filed(name)}-0.json").read_text())
            kept.write_text(json.dumps(source | {"seed": seed}))
        for path in folder.glob(f"{ablation.filed(name)}-*.json"):
            if path != kept:
                path.unlink()
    lines = ablation.table(tmp_path, "parts", "half", 600).splitlines()
    assert lines[5:] == [
        "| no MSR | 1 | 0.6290 | -0.0210 | nan | none shown | 0.0050 | 1,234 |",
        "| no SRF | 1 | 0.6495 | | | | 0.0050 | 1,234 |",
    ]
    assert "No run of the base" in ablation.table(tmp_path, "parts", "quarter", 600)


def test_an_unknown_variant_is_named(tmp_path: Path) -> None:
    arguments = [sys.executable, str(runs.ROOT / "experiments" / "ablation.py"), "--data", str(tmp_path)]
    done = subprocess.run([*arguments, "--output", str(tmp_path), "--only", "no Msr"], capture_output=True, text=True)
    assert done.returncode == 2 and "--study parts has no 'no Msr'; it has base, no MSR" in done.stderr
