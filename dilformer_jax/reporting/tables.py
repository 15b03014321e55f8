"""Results as tables: what `evaluate` writes, and what it prints."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dilformer_jax.io.volumes import BadInput, replacing

Row = Mapping[str, Any]
Summary = dict[str, dict[str, float | int]]
# In the order of tables; what each one is, `registration.scoring.DEFINITION` says.
METRICS = (
    *("dice_before", "dice", "dice_absent0", "dice_trilinear", "dice_groups", "dice_trilinear_groups"),
    *("target_overlap", "union_overlap", "total_target_overlap", "total_mean_overlap", "total_union_overlap"),
    *("hd95_before", "hd95", "hd95_max", "hd", "assd", "nsd", "tre_before_mm", "tre_mm"),
    *("folding_percent", "folding_mask_percent", "ndv_percent", "sdlogj", "inverse_consistency_mm", "seconds"),
)
STATISTICS = (
    "mean and population standard deviation over the pairs that have a value, and their number n; a structure absent "
    "from either input is left out, one that vanished in warping counts with Dice 0 and has no surface distance"
)
PER_LABEL = "_per_label"


def markdown(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A Markdown table of the rows' values under `columns`; a dash where a value is missing or not a number."""
    header = "| " + " | ".join(_cell(column) for column in columns) + " |"
    rule = "|" + "|".join(" --- " if _is_text(rows, column) else " ---: " for column in columns) + "|"
    lines = ["| " + " | ".join(_cell(text(row.get(column))) for column in columns) + " |" for row in rows]
    return "\n".join([header, rule, *lines]) + "\n"


def plain(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The same table for a terminal: columns of even width, numbers to the right."""
    cells = [list(columns)] + [[text(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[k]) for line in cells) for k in range(len(columns))]
    left = [_is_text(rows, column) for column in columns]
    lines = []
    for line in cells:
        aligned = [c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(line, widths, left, strict=True)]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]]) + "\n"


def text(value: object) -> str:
    """A value as a table shows it: four significant digits, a dash for none."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        number = float(value)
        if not math.isfinite(number):
            return "–" if math.isnan(number) else str(number)
        return f"{number:.4f}" if 0.01 <= abs(number) < 1 else f"{number:.4g}"
    return "–" if value is None else str(value)


def summarise(pairs: Sequence[Row]) -> Summary:
    """{metric: {"mean", "sd", "n"}} over the pairs, of the metrics that any pair has; sd is the population's."""
    summary: Summary = {}
    for metric in METRICS:
        if any(metric in pair for pair in pairs):
            values = np.array([_number(pair.get(metric)) for pair in pairs])
            summary[metric] = _statistics(values)
    return summary


def summary_text(summary: Summary) -> str:
    """The summary as the terminal shows it."""
    return plain(_summary_rows(summary), ["metric", "mean", "sd", "n"])


def csv_rows(pairs: Sequence[Row], labels: Sequence[int]) -> list[dict[str, object]]:
    """A row for each pair and label: pair, fixed, moving, label, state, and every `<metric>_per_label` of the pairs.

    `state` is "absent", "vanished" or "present"; "unlabelled" where the pair has no label maps.
    """
    columns = _per_label_columns(pairs)
    rows = []
    for pair in pairs:
        for label in labels:
            rest = "present" if any(column + PER_LABEL in pair for column in columns) else "unlabelled"
            state = next((state for state in ("absent", "vanished") if label in pair.get(state, ())), rest)
            values = {column: _number(pair.get(column + PER_LABEL, {}).get(label)) for column in columns}
            about = {"pair": pair["name"], "fixed": pair.get("fixed"), "moving": pair.get("moving")}
            rows.append({**about, "label": label, "state": state, **values})
    return rows


def csv_text(rows: Sequence[Row]) -> str:
    """The rows as CSV under the first one's keys; an empty cell where a value is not a finite number."""
    page = io.StringIO()
    writer = csv.DictWriter(page, fieldnames=list(rows[0]) if rows else ["pair"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()})
    return page.getvalue()


def write_results(
    output: Path,
    protocol: str,
    definition: Row | str,
    pairs: Sequence[Row],
    labels: Sequence[int],
    about: Row | None = None,
) -> Summary:
    """Write results.json, results.csv (a row for each pair and label), results_pairs.csv (a row for each pair) and
    summary.md into the folder `output`, and return the summary.

    A pair has `name`, `fixed`, `moving`, those of `METRICS` that were measured (`dice` and the like being the mean over
    its labels), `<metric>_per_label` as {label: value or NaN}, and the lists `absent` and `vanished` of its labels.
    `about` is put beside them into
    results.json. JSON has null where a value is not a finite number, CSV an empty cell. Each file is replaced in one
    piece. Raises ValueError when there are no pairs, and BadInput where `output` cannot be written.
    """
    if not pairs:
        raise ValueError("there are no pairs to write results of")
    summary = summarise(pairs)
    counts = {
        "pairs": len(pairs),
        "labels": len(labels),
        "absent": sum(len(pair.get("absent", ())) for pair in pairs),
        "vanished": sum(len(pair.get("vanished", ())) for pair in pairs),
    }
    rows = csv_rows(pairs, labels)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{output} cannot be made a folder ({error.strerror}); choose another place.") from error
    results = {
        "protocol": protocol,
        **(about or {}),
        "definition": definition,
        "statistics": STATISTICS,
        "counts": counts,
        "labels": list(labels),
        "summary": summary,
        "pairs": list(pairs),
    }
    write_json(output / "results.json", results)
    write_text(output / "results.csv", csv_text(rows))
    known = [metric for metric in METRICS if any(metric in pair for pair in pairs)]
    about_pair = lambda pair: {"pair": pair["name"], "fixed": pair.get("fixed"), "moving": pair.get("moving")}
    each = [about_pair(pair) | {metric: _number(pair.get(metric)) for metric in known} for pair in pairs]
    write_text(output / "results_pairs.csv", csv_text(each))
    write_text(output / "summary.md", _summary_page(results, rows))
    return summary


def write_json(path: Path, value: object) -> None:
    """Strict JSON, replaced in one piece; what JSON has no word for (NaN, infinity) becomes null."""
    write_text(path, json.dumps(_strict(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Text in UTF-8, replaced in one piece: an interruption leaves the old file or the new one."""
    with replacing(path) as partial:
        partial.write_text(content, encoding="utf-8")


def timing_text(timing: Row) -> str:
    """How long a pair takes, as `registration.evaluation.timing` measured it, in a sentence."""
    return (
        f"Time of a pair: {text(timing['median_seconds'])} s, median of {timing['runs']} runs while no other pair "
        f"is looked at, on {timing['device']}; {text(timing['compile_seconds'])} s to compile."
    )


def _summary_page(results: Row, rows: Sequence[Row]) -> str:
    definition, counts, names = results["definition"], results["counts"], results.get("label_names", {})
    if isinstance(definition, str):
        definitions = definition + "\n"
    else:
        definitions = "".join(f"* {name}: {text(value)}\n" for name, value in definition.items())
    columns = [metric for metric in METRICS if any(metric in row for row in rows)]
    structures = []
    for label in results["labels"]:
        mine = [row for row in rows if row["label"] == label]
        means = {metric: _statistics(np.array([_number(row[metric]) for row in mine]))["mean"] for metric in columns}
        states = {state: sum(row["state"] == state for row in mine) for state in ("absent", "vanished")}
        named = {"structure": names[label]} if label in names else {}
        structures.append({"label": label, **named, **means, **states})
    return "\n".join(
        [
            f"# {', '.join(results[key] for key in ('method', 'protocol') if key in results)}\n",
            f"{counts['pairs']} pairs, {counts['labels']} structures; {counts['absent']} times a structure was absent "
            f"from an input, {counts['vanished']} times one vanished in warping.\n",
            markdown(_summary_rows(results["summary"]), ["metric", "mean", "sd", "n"]),
            *([timing_text(results["timing"]) + "\n"] if "timing" in results else []),
            f"Statistics: {STATISTICS}.\n",
            definitions,
            "## Each structure: mean over the pairs\n",
            markdown(structures, ["label", *(["structure"] if names else []), *columns, "absent", "vanished"]),
        ]
    )


def _summary_rows(summary: Summary) -> list[dict[str, object]]:
    return [{"metric": metric, **values} for metric, values in summary.items()]


def _statistics(values: np.ndarray) -> dict[str, float | int]:
    values = values[np.isfinite(values)]
    if not len(values):
        return {"mean": math.nan, "sd": math.nan, "n": 0}
    return {"mean": float(values.mean()), "sd": float(values.std()), "n": len(values)}


def _per_label_columns(pairs: Iterable[Row]) -> list[str]:
    found = {key.removesuffix(PER_LABEL) for pair in pairs for key in pair if key.endswith(PER_LABEL)}
    return [*(metric for metric in METRICS if metric in found), *sorted(found.difference(METRICS))]


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float | np.number) else math.nan


def _strict(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _strict(value.tolist())
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, np.generic):
        return _strict(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _is_text(rows: Sequence[Row], column: str) -> bool:
    return any(isinstance(row.get(column), str) for row in rows)


def _cell(content: str) -> str:
    return content.replace("|", "\\|").replace("\n", " ")
