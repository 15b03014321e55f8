"""Compares methods that `evaluate` scored on the same pairs: one table, intervals over subjects, tests, a figure."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from dilformer_jax import cli
from dilformer_jax.io.folders import staged
from dilformer_jax.io.volumes import BadInput

PICTURE = "comparison.png"


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` (sys.argv unless given) begins with the program's name."""
    cli.run_arguments(run, _parser(), argv)


def run(options: argparse.Namespace) -> None:
    """All of it, on the command line's options."""
    # Here, not above: --help need not wait for what takes long to import.
    from dilformer_jax.reporting import comparison, comparison_tables, results, statistics, tables
    from dilformer_jax.reporting.comparison_tables import Page

    runs = [results.read(path) for path in options.runs]
    names = _names([run.method for run in runs], [run.path.absolute().parent.name for run in runs], options.names)
    within = results.common(runs, cli.label_list(options.labels) if options.labels else ())
    metrics = _metrics(options.metrics, results.metrics(runs), comparison.SHOWN)
    notes = [*within.notes, *results.check_definitions(runs, metrics)]

    measured = tuple(dict.fromkeys([*metrics, "dice", "folding_percent"]))  # the last two for the figure
    rows = comparison.scored(runs, names, measured, within)
    known = [row.name for row in rows]
    for name in known:
        if known.count(name) > 1:
            raise BadInput(f"Two methods are called {name!r}; give each run a name of its own by --names.")
    if options.reference not in (None, *known):
        raise BadInput(f"--reference {options.reference!r} is none of the methods ({'; '.join(known)}); give one.")
    against = rows[known.index(options.reference)] if options.reference else comparison.reference(rows)

    design = statistics.design(*([pair[role] for pair in within.pairs] for role in (0, 1)))
    records = comparison.compared(rows, metrics, against, design, options.resamples)
    notes += comparison_tables.explained(within, design, options.resamples, any(row["n_paired"] for row in records))
    notes += comparison.missing(rows)
    page = Page(within, rows, metrics, records, notes)
    with staged(options.output, (PICTURE,)) as folder:
        tables.write_text(folder / "comparison.md", comparison_tables.markdown(page))
        tables.write_text(folder / "comparison.tex", comparison_tables.latex(page))
        costs = {row.name: {"seconds": row.seconds, "device": row.device, "parameters": row.parameters} for row in rows}
        tables.write_text(
            folder / "comparison.csv", tables.csv_text([record | costs[record["method"]] for record in records])
        )
        found = {
            "protocol": within.protocol,
            "runs": {name: str(run.path.absolute()) for name, run in zip(names, runs, strict=True)},
            "pairs": [list(pair[:2]) for pair in within.pairs],
            "labels": within.labels,
            "label_names": within.label_names,
            "resamples": options.resamples,
            "seed": statistics.SEED,
            "level": statistics.LEVEL,
            "units_drawn": design.sizes,
            "notes": notes,
            "methods": [
                {"name": row.name, **costs[row.name], "dice_per_label": comparison.label_means(row, within)} for row in rows
            ],
            "statistics": records,
        }
        tables.write_json(folder / "comparison.json", found)
        if importlib.util.find_spec("matplotlib"):
            from dilformer_jax.reporting import figures, score_figures

            labels = [within.label_names.get(label, str(label)) for label in within.labels]
            shown = [row for row in rows if len(row.values["dice"]) and any(row.values["dice"] == row.values["dice"])]
            if shown:
                figures.save(folder / PICTURE, score_figures.comparison(shown, labels))
        else:
            print("No picture: matplotlib is not installed (pip install 'dilformer-jax[plot]').", file=sys.stderr)
    print(comparison_tables.plain(page))
    print(f"Written to {options.output}")
