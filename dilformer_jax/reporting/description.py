"""What there is to say of a trained network, as a bundle's model.json says it, from the run that trained it."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dilformer_jax import models
from dilformer_jax.data.pipeline import common_grid
from dilformer_jax.data.preprocessing import resolved
from dilformer_jax.data.protocols import subjects
from dilformer_jax.data.subjects import Dataset
from dilformer_jax.registration import selection
from dilformer_jax.registration.predictor import read_config
from dilformer_jax.reporting import provenance
from dilformer_jax.training import checkpoint, logs


def of_run(workdir: Path, which: str = "best", dataset: Dataset | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of a run's checkpoint, 'best' or 'latest', and their description, which has `io.bundle.KEYS`.

    Without the `dataset` it is what the run recorded: what it did not, as older ones, is None.
    Raises BadInput where the workdir is none.
    """
    config, known = read_config(workdir), selection.of_run(workdir)
    params, step = checkpoint.restore_params(workdir, which)
    training = {
        "dataset": config["data"]["name"],
        "options": config["data"]["options"],
        "licence": None,
        # As the run recorded them, for the splits of a folder may be others by now; old runs did not.
        "subjects": None if known.trained is None else sorted(known.trained),
        "chosen_by": None if known.chosen is None else sorted(known.chosen),
        "pairs": None,
        "steps": step,
        "seed": config["seed"],
        "start_from": config.get("start_from", ""),
        "others": sorted(known.others),
    }
    record = _record(workdir)
    if dataset is None:
        about = {key: record.get(key) for key in ("grid", "labels")} | {"versions": record.get("versions", {})}
        training |= {"licence": record.get("licence"), "pairs": record.get("pairs", {}).get("number")}
    else:
        about = {
            "grid": common_grid(dataset.train, config["data"]["preprocessing"]),
            "labels": list(dataset.labels),
            "versions": provenance.versions(),
        }
        training |= {"licence": dataset.licence, "pairs": len(dataset.train)}
        # Where a run has a record and it does not say, what the run began with does not: that is not to be made up.
        if "subjects" not in record:
            training |= {"subjects": sorted(subjects(dataset.train)), "chosen_by": sorted(subjects(dataset.validation))}
    return params, {
        "network": {"name": config["model"]["name"], "options": _options(config["model"])},
        "preprocessing": resolved(config["data"]["preprocessing"]),
        "grid": about["grid"],
        "labels": about["labels"],
        "training": training,
        "validation": _validation(workdir, step),
        "versions": about["versions"],
    }


def _record(workdir: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((workdir / selection.RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _options(model: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of the network as JSON has it, those left at their defaults included: a later version may have
    others."""
    module = models.create(model["name"], **model["options"])
    names = [field.name for field in dataclasses.fields(module) if field.name not in ("parent", "name")]
    options = {name: getattr(module, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def _validation(workdir: Path, step: int) -> dict[str, Any]:
    """What the run logged on its validation pairs at this step; Dice of the identity beside its own."""
    records = [record for record in logs.read(workdir / "metrics.jsonl") if record["step"] == step]
    found: dict[str, Any] = next((record for record in reversed(records) if "dice" in record), {})
    return {name: value for name, value in found.items() if name != "step"}
