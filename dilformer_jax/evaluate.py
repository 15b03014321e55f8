"""Scores a network, or doing nothing, over the pairs of a protocol: overlap, surface distance, folding, time."""

import argparse
import functools
import importlib.util
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dilformer_jax import cli
from dilformer_jax.data import sources
from dilformer_jax.data.sources import Pair
from dilformer_jax.io.folders import staged
from dilformer_jax.io.geometry import orientation, spacing
from dilformer_jax.io.volumes import BadInput, normalise
from dilformer_jax.reporting import html, provenance, tables

if TYPE_CHECKING:
    from dilformer_jax.registration.evaluation import Method

# What depends on the number of pairs and on their labels.
PICTURES = ("first.png", "best.png", "median.png", "worst.png", "dice_per_label.png", "dice_folding.png")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` (sys.argv unless given) begins with the program's name."""
    cli.run_arguments(functools.partial(run, command=provenance.command("evaluate", argv)), _parser(), argv)


def run(options: argparse.Namespace, command: str) -> None:
    """All of it, on the command line's options."""
    # Here, not above: JAX and what uses it take seconds to import, which --help need not wait for.
    import jax

    from dilformer_jax.registration import evaluation

    protocol, pairs, labels = _protocol(options)
    method = _method(options)
    evaluation.check(pairs, method)
    output = options.output or (options.workdir or Path()) / _folder(options)
    title = f"{method.name}, {protocol}"

    with staged(output, PICTURES) as folder:
        rows: list[dict[str, Any]] = []
        start = time.perf_counter()
        for row in evaluation.scores(pairs, labels, method):
            rows.append(row)
            dice = f"Dice {row['dice_before']:.4f} -> {row['dice']:.4f}, " if "dice" in row else ""
            _say(
                f"[{len(rows)}/{len(pairs)}] {row['name']}: {dice}{row['folding_percent']:.3g} % folded, "
                f"{row['seconds']:.3g} s; {time.perf_counter() - start:.0f} s so far"
            )

        settings = {"method": method.name, "labels": _ranges(labels), **evaluation.DEFINITION}
        summary = tables.write_results(folder, title, settings, rows, labels)
        run = {
            "command": command,
            "versions": provenance.versions(),
            "backend": jax.default_backend(),
            "device": jax.devices()[0].device_kind,
            "parameters_sha256": method.sha256,
        }
        tables.write_json(folder / "run.json", run)

        sections = [html.Section("Summary", tables.STATISTICS, [{"metric": k, **v} for k, v in summary.items()])]
        if importlib.util.find_spec("matplotlib"):
            sections += _pictures(folder, pairs, labels, method, rows)
        else:
            _say("No pictures: matplotlib is not installed (pip install 'dilformer-jax[plot]').")
        columns = ["name", *(metric for metric in tables.METRICS if any(metric in row for row in rows))]
        sections += [
            html.Section("Pairs", table=[{column: row.get(column) for column in columns} for row in rows]),
            html.Section("Definitions", "\n\n".join(f"{name}: {text}" for name, text in settings.items())),
        ]
        html.report(folder / "report.html", title, sections)

    print(title)
    print(tables.summary_text(summary), end="")
    vanished = sum(len(row["vanished"]) for row in rows)
    print(f"{len(rows)} pairs, {len(labels)} structures, {vanished} vanished in warping. Written to {output}")


def _parser() -> cli.Arguments:
    parser = cli.Arguments(prog="dilformer evaluate", description=__doc__)
    parser.add_argument("--workdir", type=Path, help="a training run, taken at its best checkpoint")
    parser.add_argument("--weights", type=Path, help="a bundle that `export` wrote")
    parser.add_argument("--method", choices=("identity",), help="doing nothing; with --refine, refinement alone")
    cli.add_refinement(parser, "none")
    pairs = parser.add_mutually_exclusive_group()
    pairs.add_argument("--protocol", metavar="DATASET-SPLIT", help="e.g. lpba40-validation; needs --data")
    pairs.add_argument("--pairs", type=Path, metavar="CSV", help="its pairs, or those whose split is test")
    parser.add_argument("--data", type=Path, help="folder of the data set")
    parser.add_argument(
        "--labels", type=cli.label_list, metavar="21-34,41", help="labels to score, else the data set's"
    )
    parser.add_argument(
        "--output", type=Path, help="folder for the results (WORKDIR/evaluation, with what was asked for in its name)"
    )
    return parser


def _folder(options: argparse.Namespace) -> str:
    """Where results go that nobody has named a place for: two questions about one run do not overwrite each other."""
    pairs = options.pairs.stem if options.pairs else options.protocol
    refined = "" if options.refine is None else f"refine{options.refine}" + "-diffeomorphic" * options.diffeomorphic
    return "-".join(part for part in ("evaluation", options.method, pairs, refined) if part)


def _ranges(labels: Sequence[int]) -> str:
    """Label ids as they are given on the command line: the inverse of `cli.label_list`."""
    runs: list[list[int]] = []
    for label in sorted(labels):
        if runs and label == runs[-1][1] + 1:
            runs[-1][1] = label
        else:
            runs.append([label, label])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def _method(options: argparse.Namespace) -> "Method":
    """What the command line names to be scored; given a workdir and a method, that method on the run's pairs."""
    from dilformer_jax.registration.evaluation import method_of
    from dilformer_jax.registration.predictor import load_predictor

    refinement = cli.refinement(options)
    if options.method == "identity":
        return method_of(None, refinement)
    if options.weights is None and options.workdir is None:
        raise BadInput("Nothing to evaluate; give --workdir RUN, --weights FILE or --method identity.")
    return method_of(load_predictor(options.weights, options.workdir), refinement)


def _protocol(options: argparse.Namespace) -> tuple[str, tuple[Pair, ...], tuple[int, ...]]:
    """Name, pairs and labels: those that the command line names, or the validation split of the workdir's own data."""
    from dilformer_jax.registration.predictor import read_config

    if options.weights and (options.method or options.workdir):
        raise BadInput("--weights says what to evaluate; leave out --workdir and --method.")
    if (options.data is None) != (options.protocol is None):
        raise BadInput("--protocol and --data go together: a data set's split, and the folder of its files.")
    config = None if options.workdir is None else read_config(options.workdir)
    if options.pairs is not None:
        dataset, part = sources.pairs_csv(options.pairs), "test"
        return str(options.pairs), sources.split(dataset, part), options.labels or dataset.labels
    if options.protocol is not None:
        kind, _, part = options.protocol.rpartition("-")
        if kind not in sources.DATASETS or part not in sources.SPLITS:
            raise BadInput(
                f"--protocol {options.protocol} is not known; it is a data set ({', '.join(sources.DATASETS)}), a dash "
                f"and a split ({', '.join(sources.SPLITS)})."
            )
        directory = options.data
    elif config is not None:
        kind, part, directory = config["data"]["name"], "validation", Path(config["data"]["directory"])
    else:
        raise BadInput("No pairs to evaluate; give --protocol NAME with --data DIR, or --pairs pairs.csv.")
    dataset = sources.DATASETS[kind](directory, **_dataset_options(kind, config, options.weights))
    return f"{kind}-{part}", sources.split(dataset, part), options.labels or dataset.labels


def _dataset_options(kind: str, config: Mapping[str, Any] | None, weights: Path | None) -> dict[str, Any]:
    """With what options the network's own training read this data set, so that its splits are the same ones."""
    from dilformer_jax.models import bundle
    from dilformer_jax.registration.predictor import keywords

    if config is not None and config["data"]["name"] == kind:
        return config["data"]["options"]
    if weights is not None:
        training = bundle.describe(weights)["training"]
        if training["dataset"] == kind:
            return keywords(training["options"])
    return {}


def _pictures(
    folder: Path, pairs: Sequence[Pair], labels: Sequence[int], method: "Method", rows: Sequence[Mapping[str, Any]]
) -> list[html.Section]:
    """The worst, the median and the best pair, and Dice by structure, as files and as sections of the report."""
    from dilformer_jax.registration import evaluation
    from dilformer_jax.registration.pipeline import warp_image, warp_labels
    from dilformer_jax.reporting import figures, score_figures

    scored = sorted(
        (k for k, row in enumerate(rows) if np.isfinite(row.get("dice", np.nan))), key=lambda k: rows[k]["dice"]
    )
    chosen = {"first": 0}
    if scored:
        chosen = {"best": scored[-1], "median": scored[len(scored) // 2], "worst": scored[0]}
    sections = []
    for rank, k in chosen.items():
        if k in list(chosen.values())[: list(chosen).index(rank)]:
            continue  # of one or two pairs, one is several of these
        case = evaluation.registered(pairs[k], method)
        moving_labels, u = case.moving_labels, case.displacement
        fixed, moving = (normalise(volume.array, "minmax") for volume in (case.fixed, case.moving))
        figure = figures.registration(
            fixed,
            moving,
            warp_image(moving, u),
            u,
            fixed_labels=_kept(case.fixed_labels, labels),
            moved_labels=None if moving_labels is None else _kept(warp_labels(moving_labels, u), labels),
            spacing=spacing(case.fixed.affine),
            orientation="" if case.fixed.path.suffix == ".pkl" else orientation(case.fixed.affine),
        )
        figures.save(folder / f"{rank}.png", figure)
        score = f"Dice {rows[k]['dice_before']:.4f} -> {rows[k]['dice']:.4f}" if scored else ""
        sections.append(html.Section(f"The {rank} pair: {case.pair.name}", score, figure=figures.png(figure)))
    if scored:
        before, after = (
            np.array([[rows[k][f"{metric}_per_label"][label] for label in labels] for k in scored])
            for metric in ("dice_before", "dice")
        )
        if len(scored) == 1:
            before, after = before[0], after[0]
        figure = score_figures.dice_per_label([str(label) for label in labels], before, after)
        figures.save(folder / "dice_per_label.png", figure)
        sections.append(html.Section("Dice of each structure", figure=figures.png(figure)))
        figure = score_figures.scatter(rows)
        figures.save(folder / "dice_folding.png", figure)
        sections.append(html.Section("Dice against folding, a dot for each pair", figure=figures.png(figure)))
    return sections


def _kept(labels: np.ndarray | None, wanted: Sequence[int]) -> np.ndarray | None:
    """The label map with nothing but the labels that are scored."""
    return None if labels is None else np.where(np.isin(labels, wanted), labels, 0)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
