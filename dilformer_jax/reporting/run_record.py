"""What a training run's folder says of it: config.json, how it was asked for, and run.json, on what and by what it
ran. A run goes on only as it began."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict  # type: ignore[import-untyped]

from dilformer_jax.data.subjects import Dataset, Pair, subjects_of
from dilformer_jax.io.volumes import BadInput, replacing
from dilformer_jax.reporting import provenance

RECORD = "run.json"
# What may change between two starts of one run: where the data lie, how they are read, in how much memory and on which
# devices, not what is computed.
CHANGEABLE = ("data.directory", "data.cache", "data.workers", "space", "accumulate", "remat", "start_from")
# What a configuration means that was written before there were these keys.
BEFORE: dict[str, Any] = {
    "start_from": "",
    "average": 0.0,
    "data.gamma": 0.0,
    "loss.inverse_weight": 0.0,
    "loss.foreground": False,
    "loss.coarse_to_fine": 0.0,
    "optimiser.kind": "adam",
    "optimiser.decay": 0.0,
}


def complete(config: ConfigDict) -> None:
    """Gives the configuration the keys that it lacks, being older than they are."""
    with config.unlocked():
        for key, value in BEFORE.items():
            *sections, name = key.split(".")
            section = config[sections[0]] if sections else config
            if name not in section:
                section[name] = value


@dataclass(frozen=True)
class Teachers:
    """The subjects, with their files where these are known, that trained the parameters with which a run begins and
    chose them, None where that is not recorded; and the data sets in which they have their names."""

    trained: dict[str, str] | None = field(default_factory=dict)
    chosen: dict[str, str] | None = field(default_factory=dict)
    datasets: frozenset[str] = frozenset()


def write_config(config: ConfigDict, workdir: Path, *, resuming: bool, writing: bool) -> None:
    """config.json, which explains the workdir; a run goes on only as it began."""
    path = workdir / "config.json"
    new = json.loads(config.to_json_best_effort())
    if resuming and path.is_file():
        from dilformer_jax import models

        def whole(settings: dict[str, Any]) -> dict[str, Any]:
            """With the options that are left out, or that there were not yet, at their defaults."""
            model = settings["model"]
            options = models.defaults(model["name"]) | model["options"]
            return BEFORE | _flat(settings | {"model": model | {"options": options}})

        before = json.loads(path.read_text())
        # By what it began it is explained, whatever it is given now.
        new["start_from"] = before.get("start_from", "")
        old, now = whole(before), whole(new)
        keys = [key for key in (now | old) if not key.startswith(CHANGEABLE)]
        changed = [key for key in keys if old.get(key) != now.get(key)]
        if changed:
            key = changed[0]
            raise BadInput(
                f"{workdir} was trained with {key}={old.get(key)} and now is given {now.get(key)}; "
                "use another --workdir, or set it back."
            )
    if writing:
        workdir.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(json.dumps(new, indent=2) + "\n")


def record(
    dataset: Dataset,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    grid: dict[str, Any],
    devices: str,
    teachers: Teachers,
) -> dict[str, Any]:
    """By which program the run was last started, on which pairs, which subjects train and choose, by which `evaluate`
    says what its scores are worth, their grid, which `register` compares, and for `info` labels and licence. The
    `teachers` are those of the parameters with which it began: what they knew it knows, and what they do not say it
    does not say either."""
    names = "\n".join(pair.name for pair in pairs)
    files = lambda pairs: {other.name: str(other.image.absolute()) for other in subjects_of(pairs)}
    return {
        "command": provenance.command("train", None),
        "versions": provenance.versions(),
        "devices": devices,
        "pairs": {"number": len(pairs), "sha256": hashlib.sha256(names.encode()).hexdigest()},
        "subjects": {
            "trained": None if teachers.trained is None else teachers.trained | files(pairs),
            "chosen_by": None if teachers.chosen is None else teachers.chosen | files(held_out),
            "others": sorted(teachers.datasets),
        },
        "grid": grid,
        "labels": list(dataset.labels),
        "licence": dataset.licence,
    }


def check(workdir: Path, began: dict[str, Any], directory: str) -> None:
    """A folder that has won or lost a subject would silently continue the run on another stream of pairs."""
    path = workdir / RECORD
    old = json.loads(path.read_text())["pairs"] if path.is_file() else began["pairs"]
    if old != began["pairs"]:
        raise BadInput(
            f"{workdir} was trained on {old['number']} pairs and {directory} now gives {began['pairs']['number']}, or "
            "others; bring back the files that there were, or use another --workdir."
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
