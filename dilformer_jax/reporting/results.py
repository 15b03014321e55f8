"""Results that `evaluate` wrote, read back, and what several of them have in common."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dilformer_jax.io.volumes import BadInput
from dilformer_jax.reporting.tables import PER_LABEL

FILE = "results.json"
# Measures that are means over structures; all others are of the displacement or of the clock.
OF_LABELS = (
    *("dice", "dice_trilinear", "dice_absent0", "target_overlap", "union_overlap"),
    *("hd95", "hd95_max", "hd", "assd", "nsd"),
)
# Fixed brain, moving brain, and which one it is of the pairs that have both.
Key = tuple[str, str, int]
SAME = 1e-4  # of Dice before registration, which is the same number in every run if the images and labels are


@dataclass(frozen=True, eq=False)
class Run:
    """One results.json: `pairs` has each pair's measures as numbers (NaN for none), `<metric>_per_label` by label."""

    path: Path
    method: str
    protocol: str
    definition: Mapping[str, Any]
    labels: tuple[int, ...]
    label_names: Mapping[int, str]
    timing: Mapping[str, Any]
    aligned: bool
    pairs: Mapping[Key, Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Common:
    """What several runs have in common, and sentences on what was left out for it."""

    protocol: str
    pairs: tuple[Key, ...]
    labels: tuple[int, ...]
    label_names: Mapping[int, str]
    notes: tuple[str, ...]


def read(path: Path) -> Run:
    """The results in a file, in the folder that `evaluate` wrote, or in the one evaluation of a training run.

    Raises BadInput where there is none, where a training run has several, and where the file is not such a file.
    """
    file = _file(path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{file} cannot be read ({error.strerror}); check its name and permissions.") from error
    except ValueError as error:  # also of what is no UTF-8
        raise BadInput(f"{file} is not JSON ({error}); write it again with `dilformer evaluate`.") from error
    if not isinstance(found, dict) or not isinstance(found.get("pairs"), list) or not found["pairs"]:
        raise BadInput(f"{file} has no list of pairs; give results that `dilformer evaluate` wrote.")
    try:
        return _run(file, found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(
            f"{file} is not as `dilformer evaluate` writes it ({type(error).__name__}: {error}); evaluate again."
        ) from error


def metrics(runs: Sequence[Run]) -> tuple[str, ...]:
    """The measures that any pair of any run has a number for."""
    found: dict[str, None] = {}
    for run in runs:
        for row in run.pairs.values():
            found |= dict.fromkeys(key for key, value in row.items() if isinstance(value, float) and value == value)
    return tuple(found)


def common(runs: Sequence[Run], labels: Sequence[int] = ()) -> Common:
    """The pairs and structures (of `labels`, where given) that all runs scored.

    Raises BadInput for runs of different protocols, for none in common, and where the pairs were not alike before
    registration, which then are pairs of other images or labels.
    """
    first, notes = runs[0], []
    for run in runs:
        if _protocol(run) != _protocol(first):
            raise BadInput(
                f"{run.path} has results of the protocol {run.protocol!r}, {first.path} of {first.protocol!r}; compare "
                "runs of one protocol."
            )
    pairs = tuple(key for key in first.pairs if all(key in run.pairs for run in runs))
    if not pairs:
        raise BadInput(
            f"{' and '.join(str(run.path) for run in runs)} have no pair in common; evaluate the same pairs."
        )
    numbers = [len(run.pairs) for run in runs]
    if set(numbers) != {len(pairs)}:
        notes.append(
            f"The runs scored {', '.join(map(str, numbers))} pairs; compared are the {len(pairs)} that all have."
        )
    shared = tuple(label for label in first.labels if all(label in run.labels for run in runs))
    if not shared and any(run.labels for run in runs):
        raise BadInput(f"{' and '.join(str(run.path) for run in runs)} scored no structure in common; give --labels.")
    missing = [label for label in labels if label not in shared]
    if missing:
        raise BadInput(f"--labels {missing[0]} was not scored by every run; choose of {', '.join(map(str, shared))}.")
    wanted = tuple(label for label in shared if label in labels) if labels else shared
    if any(set(run.labels) != set(wanted) for run in runs):
        counts = ", ".join(str(len(run.labels)) for run in runs)
        notes.append(
            f"The runs scored {counts} structures; means are over {len(wanted)} "
            f"{'that were asked for' if labels else 'that all have'}."
        )
    names = {label: name for run in reversed(runs) for label, name in run.label_names.items() if label in wanted}
    found = Common(first.protocol, pairs, wanted, names, tuple(notes))
    _check_before(runs, found)
    return found


def check_definitions(runs: Sequence[Run], metrics: Sequence[str]) -> tuple[str, ...]:
    """Sentences on what a run leaves undefined. Raises BadInput where two runs define a metric differently."""
    notes = []
    for metric in metrics:
        for key in dict.fromkeys(key for run in runs for key in run.definition if _concerns(key, metric)):
            defining = [run for run in runs if key in run.definition]
            for run in defining[1:]:
                if run.definition[key] != defining[0].definition[key]:
                    about = "" if key == metric else f" (its {key!r})"
                    raise BadInput(
                        f"{metric}{about} in {run.path} is defined otherwise than in {defining[0].path} "
                        f"({run.definition[key]!r}, {defining[0].definition[key]!r}), and numbers of two definitions "
                        "cannot be compared; evaluate again, or leave it out by --metrics."
                    )
        having = [run for run in runs if any(metric in row for row in run.pairs.values())]
        unsaid = [str(run.path) for run in having if metric not in run.definition]
        if 0 < len(unsaid) < len(having):
            notes.append(f"{', '.join(unsaid)} does not say how {metric} is defined.")
    if len({str(run.definition.get("seconds")) for run in runs if "seconds" in run.definition}) > 1:
        notes.append("The runs define seconds differently: the times are not to be compared.")
    return tuple(notes)


def values(run: Run, metric: str, within: Common) -> Float[np.ndarray, " pairs"]:
    """A measure of each pair: as the run has it, or, of fewer structures than it scored, the mean over these."""
    rows = [run.pairs[key] for key in within.pairs]
    base = metric.removesuffix("_before")
    found = np.array([row.get(metric, math.nan) for row in rows], float)
    if base not in OF_LABELS or (set(within.labels) == set(run.labels) and np.isfinite(found).any()):
        return found
    table = per_label(run, metric.replace("dice_absent0", "dice"), within)
    known = np.isfinite(table)
    if base == "dice_absent0":
        known |= known.any(axis=1, keepdims=True)  # what is absent counts, but not in a pair without label maps
    totals, counts = np.where(np.isfinite(table), table, 0).sum(axis=1), known.sum(axis=1)
    return np.divide(totals, counts, out=np.full(len(rows), np.nan), where=counts > 0)


def per_label(run: Run, metric: str, within: Common) -> Float[np.ndarray, "pairs labels"]:
    """A measure of each pair and structure, NaN where there is none."""
    rows = [run.pairs[key].get(metric + PER_LABEL, {}) for key in within.pairs]
    table = [[row.get(label, math.nan) for label in within.labels] for row in rows]
    return np.array(table, float).reshape(len(rows), len(within.labels))


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise BadInput(f"{path} does not exist; give a folder that `dilformer evaluate` wrote, or its {FILE}.")
    if (path / FILE).is_file():
        return path / FILE
    found = sorted(path.glob(f"evaluation*/{FILE}"))
    if not found:
        raise BadInput(f"{path} has no {FILE} and no evaluation with one; run `dilformer evaluate` first.")
    if len(found) > 1:
        names = ", ".join(file.parent.name for file in found)
        raise BadInput(f"{path} has several evaluations ({names}); give the folder of one of them.")
    return found[0]


def _run(file: Path, found: Mapping[str, Any]) -> Run:
    definition = found.get("definition") or {}
    if isinstance(definition, str):
        definition = dict.fromkeys(OF_LABELS, definition)
    method = found.get("method") or definition.get("method") or file.absolute().parent.name
    pairs: dict[Key, dict[str, Any]] = {}
    for row in found["pairs"]:
        fixed, moving = str(row["fixed"]), str(row["moving"])
        number = next(k for k in range(len(found["pairs"])) if (fixed, moving, k) not in pairs)
        pairs[fixed, moving, number] = {key: item for name in row for key, item in _measure(name, row[name])}
    timing = dict(found.get("timing") or {})
    if timing.get("median_seconds") is not None:
        timing["median_seconds"] = float(timing["median_seconds"])
    if "device" not in timing and file.with_name("run.json").is_file():
        record = json.loads(file.with_name("run.json").read_text(encoding="utf-8"))
        timing["device"] = record.get("device")
    return Run(
        path=file,
        method=str(method),
        # Older results have the method before the protocol.
        protocol=str(found["protocol"]).removeprefix(f"{method}, "),
        definition=definition,
        labels=tuple(int(label) for label in found.get("labels") or ()),
        label_names={int(label): str(name) for label, name in (found.get("label_names") or {}).items()},
        timing=timing,
        aligned=bool(found.get("aligned")),
        pairs=pairs,
    )


def _measure(name: str, value: Any) -> list[tuple[str, Any]]:
    """A row's item, if it is a measure, with numbers for what JSON has as null."""
    number = lambda item: math.nan if item is None else float(item)
    if name.endswith(PER_LABEL):
        return [(name, {int(label): number(item) for label, item in value.items()})]
    if value is None or isinstance(value, int | float):
        return [(name, number(value))]
    return []


def _protocol(run: Run) -> str:
    """A table of pairs is the same one from wherever it was named."""
    return Path(run.protocol).name if run.protocol.endswith(".csv") else run.protocol


def _concerns(key: str, metric: str) -> bool:
    """Whether a key of a run's definition says what the metric is: its own, its parameters', what means leave out."""
    if metric in OF_LABELS and key in ("absent", "vanished"):
        return True
    return key == metric or (key.startswith(f"{metric}_") and key not in OF_LABELS and not key.endswith("_before"))


def _check_before(runs: Sequence[Run], within: Common) -> None:
    before = [values(run, "dice_before", within) for run in runs]
    for run, mine in zip(runs[1:], before[1:], strict=True):
        apart = np.flatnonzero(np.abs(mine - before[0]) > SAME)  # not where one is NaN
        if len(apart):
            k = apart[0]
            fixed, moving, _ = within.pairs[k]
            raise BadInput(
                f"{run.path} has Dice {mine[k]:.4f} before registration of {moving} to {fixed}, {runs[0].path} "
                f"{before[0][k]:.4f}: these are not the same images and labels; evaluate the same data."
            )
