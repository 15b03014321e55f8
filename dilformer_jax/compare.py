"""Compares methods that `evaluate` scored on the same pairs: one table, intervals over subjects, tests, a figure."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dilformer_jax import cli
from dilformer_jax.io.folders import staged
from dilformer_jax.io.volumes import BadInput

if TYPE_CHECKING:
    from dilformer_jax.reporting.comparison import Scored
    from dilformer_jax.reporting.results import Common

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
    within = results.common(runs, options.labels)
    metrics = _metrics(options.metrics, results.metrics(runs), comparison.SHOWN)
    notes = [*within.notes, *results.check_definitions(runs, metrics)]

    rows = comparison.scored(runs, names, metrics, within)
    known = [row.name for row in rows]
    for name in known:
        if known.count(name) > 1:
            raise BadInput(f"Two methods are called {name!r}; give each run a name of its own by --names.")
    if options.reference not in (None, *known):
        raise BadInput(f"--reference {options.reference!r} is none of the methods ({'; '.join(known)}); give one.")
    against = rows[known.index(options.reference)] if options.reference else comparison.reference(rows, metrics)

    fixed, moving, _ = zip(*within.pairs, strict=True)
    design = statistics.design(fixed, moving)
    records = comparison.compared(rows, metrics, against, design, options.resamples)
    notes += comparison_tables.explained(within, design, options.resamples, any(row["n_paired"] for row in records))
    notes += comparison.missing(rows, within)
    page = Page(within, rows, metrics, records, notes)
    with staged(options.output, (PICTURE,)) as folder:
        picture = _picture(folder / PICTURE, rows, within)
        tables.write_text(folder / "comparison.md", comparison_tables.markdown(page, PICTURE if picture else None))
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
            "methods": [{"name": row.name, **costs[row.name]} for row in rows],
            "dice_per_label": {row.name: comparison.label_means(row, within) for row in rows if "dice" in metrics},
            "statistics": records,
        }
        tables.write_json(folder / "comparison.json", found)
    print(comparison_tables.plain(page))
    print(f"Written to {options.output}")


def _picture(path: Path, rows: "Sequence[Scored]", within: "Common") -> bool:
    """Draws the figure, where Dice is compared and Matplotlib is there to draw it; says whether it did."""
    shown = [row for row in rows if np.isfinite(row.values.get("dice", np.nan)).any()]
    if not shown:
        return False
    if not importlib.util.find_spec("matplotlib"):
        print("No picture: matplotlib is not installed (pip install 'dilformer-jax[plot]').", file=sys.stderr)
        return False
    from dilformer_jax.reporting import figures, score_figures

    structures = [within.label_names.get(label, str(label)) for label in within.labels]
    figures.save(path, score_figures.comparison(shown, structures))
    return True


def _parser() -> cli.Arguments:
    parser = cli.Arguments(prog="dilformer compare", description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a folder that `evaluate` wrote, its results.json, or a training run that has one evaluation",
    )
    parser.add_argument("--names", type=_listed, default=(), metavar="A,B,...", help="what to call the runs, in order")
    parser.add_argument(
        "--metrics", type=_listed, default=(), metavar="dice,hd95,...", help="measures to compare, keys of results.json"
    )
    parser.add_argument(
        "--reference", metavar="NAME", help="method that tests are against (that of the best mean Dice)"
    )
    parser.add_argument("--labels", type=cli.label_list, default=(), metavar="21-34,41", help="structures, else all")
    parser.add_argument("--resamples", type=_resamples, default=10_000, metavar="N", help="of the bootstrap (10000)")
    parser.add_argument("--output", type=Path, default=Path("comparison"), help="folder for the tables (comparison)")
    return parser


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _resamples(text: str) -> int:
    if not text.isdecimal() or int(text) < 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of resamples; 100 or more are needed")
    return int(text)


def _names(methods: Sequence[str], folders: Sequence[str], given: Sequence[str]) -> list[str]:
    """A name for each run: as given, else the method's, with the folder where several runs are of one method."""
    if given and len(given) != len(methods):
        raise BadInput(f"--names has {len(given)} names ({', '.join(given)}), but there are {len(methods)} runs.")
    named = [f"{m} ({folder})" if methods.count(m) > 1 else m for m, folder in zip(methods, folders, strict=True)]
    return list(given or named)


def _metrics(asked: Sequence[str], known: Sequence[str], usual: Sequence[str]) -> tuple[str, ...]:
    """The measures to compare: those asked for, else the usual ones that any run has."""
    for metric in asked:
        if metric not in known:
            raise BadInput(
                f"--metrics {metric} is in none of the runs, which have {', '.join(known) or 'no measures'}."
            )
    found = tuple(asked) or tuple(metric for metric in usual if metric in known)
    if not found:
        raise BadInput(f"The runs have none of {', '.join(usual)}; give --metrics, of {', '.join(known)}.")
    return tuple(dict.fromkeys(found))


if __name__ == "__main__":
    main()
