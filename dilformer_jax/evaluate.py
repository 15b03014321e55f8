"""Scores a network, or another method, over the pairs of a protocol: overlap, surface distance, folding, time.

Stopped, it goes on with the same command where it was. Several processes share the work by --shard and one --output;
the one that finds all pairs scored writes the results.
"""

import argparse
import functools
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dilformer_jax import cli
from dilformer_jax.data import protocols
from dilformer_jax.data.folders import pairs_csv
from dilformer_jax.data.protocols import PROTOCOLS, Task
from dilformer_jax.data.sources import DATASETS
from dilformer_jax.data.subjects import SPLITS, split
from dilformer_jax.io.folders import staged
from dilformer_jax.io.volumes import BadInput
from dilformer_jax.reporting import provenance, tables

if TYPE_CHECKING:
    from dilformer_jax.registration.methods import Method
    from dilformer_jax.registration.scoring import Scoring
    from dilformer_jax.registration.selection import Selection

UNFINISHED = "unfinished"  # folder for what is scored, until all is


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` (sys.argv unless given) begins with the program's name."""
    cli.run_arguments(functools.partial(run, command=provenance.command("evaluate", argv)), _parser(), argv)


def run(options: argparse.Namespace, command: str) -> None:
    """All of it, on the command line's options."""
    # Here, not above: JAX and what uses it take seconds to import, which --help need not wait for.
    from dilformer_jax.registration import evaluation, methods, selection
    from dilformer_jax.registration.scoring import Scoring

    known = _selection(options)
    task = _task(options, known)
    worth = selection.sentence(task, None if options.method else known)
    method = methods.chosen(
        options.method,
        options.weights,
        options.workdir,
        cli.refinement(options, network=options.method is None),
        options.syn_iterations,
        options.smoothness,
    )
    scoring = Scoring(task.labels, task.groups, options.tolerance)
    evaluation.check(task.pairs, method)
    output = options.output or (options.workdir or Path()) / _folder(options)

    settings = {
        "method": [method.name, method.settings, method.sha256],
        "protocol": [task.name, task.split, scoring.definition, list(task.labels)],
        "inverse_consistency": options.inverse_consistency,
        "version": provenance.versions(),
    }
    kept = evaluation.Kept(output / UNFINISHED, task.pairs, settings)
    part, parts = options.shard
    mine = task.pairs[part - 1 :: parts]
    if not mine:
        raise BadInput(f"--shard {part}/{parts} has none of the {len(task.pairs)} pairs; give fewer parts.")
    try:
        timing = kept.timing(task.pairs[0], method)
        start, done = time.perf_counter(), sum(kept.row(pair) is not None for pair in mine)
        if done:
            _say(f"{done} of {len(mine)} pairs were scored before; going on with the others.")
        found = evaluation.scores(mine, method, scoring, kept, backward=options.inverse_consistency)
        for number, row in enumerate(found, 1):
            _say(_progress(row, done + number, len(mine), (time.perf_counter() - start) / number))
    except BadInput:
        kept.give_up()
        raise

    rows = [row for row in map(kept.row, task.pairs) if row is not None]
    if len(rows) < len(task.pairs):
        print(f"{len(rows)} of {len(task.pairs)} pairs are scored; the shard that comes last writes the results.")
        return
    _write(output, command, task, method, scoring, rows, {"timing": timing, "selection": worth})
    kept.clear()


def _write(
    output: Path,
    command: str,
    task: Task,
    method: "Method",
    scoring: "Scoring",
    rows: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
) -> None:
    import jax

    from dilformer_jax.reporting import evaluation_report

    protocol = ", ".join(part for part in (task.name, task.split) if part)
    title = f"{method.name}, {protocol}"
    definition = {
        "method": method.name,
        "protocol": task.text,
        "split": f"{task.split}: {about['selection']}" if task.split else about["selection"],
        "labels": _ranges(task.labels),
        **scoring.definition,
    }
    told = {
        "method": method.name,
        "method_settings": method.settings,
        "split": task.split,
        "aligned": task.aligned,
        "label_names": {label: task.names[label] for label in task.labels if label in task.names},
        **about,
    }
    with staged(output, evaluation_report.PICTURES) as folder:
        summary = tables.write_results(folder, protocol, definition, rows, task.labels, told)
        run = {
            "command": command,
            "versions": provenance.versions(),
            "backend": jax.default_backend(),
            "device": about["timing"]["device"],
            "parameters_sha256": method.sha256,
        }
        tables.write_json(folder / "run.json", run)
        if not evaluation_report.write(folder, title, task, method, rows, summary, definition):
            _say("No pictures: matplotlib is not installed (pip install 'dilformer-jax[plot]').")

    print(f"{title}\n\n{task.text}\n{definition['split']}\n")
    print(tables.summary_text(summary), end="")
    print(f"\n{tables.timing_text(about['timing'])}")
    vanished = sum(len(row["vanished"]) for row in rows)
    print(f"{len(rows)} pairs, {len(task.labels)} structures, {vanished} vanished in warping. Written to {output}")


def _parser() -> cli.Arguments:
    parser = cli.Arguments(
        prog="dilformer evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_method(parser)
    pairs = parser.add_mutually_exclusive_group()
    pairs.add_argument("--protocol", metavar="NAME", help=f"one of {', '.join(PROTOCOLS)}; needs --data")
    pairs.add_argument("--pairs", type=Path, metavar="CSV", help="its pairs, or those whose split is test")
    parser.add_argument("--data", type=Path, help="folder of the data set, as it was distributed or prepared")
    parser.add_argument("--split", choices=SPLITS, help="by default the test split, where its subjects are there")
    parser.add_argument(
        "--dataset", metavar="NAME", help="what --data holds, for clean (prepared), or without a protocol"
    )
    parser.add_argument(
        "--labels", type=cli.label_list, metavar="21-34,41", help="labels to score, else the data set's"
    )
    parser.add_argument("--tolerance", type=_millimetres, default=1.0, metavar="MM", help="of the surface Dice nsd (1)")
    parser.add_argument(
        "--inverse-consistency", action="store_true", help="register each pair the other way round too, and compare"
    )
    parser.add_argument(
        "--shard", type=cli.shard, default=(1, 1), metavar="K/N", help="the Kth of N parts, for as many processes"
    )
    parser.add_argument(
        "--output", type=Path, help="folder for the results (WORKDIR/evaluation, with what was asked for in its name)"
    )
    return parser


def _folder(options: argparse.Namespace) -> str:
    """Where results go that nobody has named a place for: two questions about one run do not overwrite each other."""
    pairs = options.pairs.stem if options.pairs else options.protocol
    refined = "" if options.refine is None else f"refine{options.refine}"
    smoothed = "" if options.smoothness is None else f"smoothness{options.smoothness:g}"
    asked = (options.method, pairs, options.split, smoothed, options.preset, refined, options.similarity)
    return "-".join(["evaluation", *(part for part in asked if part)])


def _millimetres(text: str) -> float:
    if not (text.replace(".", "", 1).isdecimal() and math.isfinite(float(text)) and float(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no distance above 0 mm")
    return float(text)


def _ranges(labels: Sequence[int]) -> str:
    """Label ids as they are given on the command line: the inverse of `cli.label_list`."""
    runs: list[list[int]] = []
    for label in sorted(labels):
        if runs and label == runs[-1][1] + 1:
            runs[-1][1] = label
        else:
            runs.append([label, label])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def _progress(row: Mapping[str, Any], number: int, count: int, seconds: float) -> str:
    dice = f"Dice {row['dice_before']:.4f} -> {row['dice']:.4f}, " if "dice" in row else ""
    left = seconds * (count - number)
    told = f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
    return f"[{number}/{count}] {row['name']}: {dice}{row['folding_percent']:.3g} % folded; about {told} left"


def _selection(options: argparse.Namespace) -> "Selection | None":
    """Of what the command line names: on which subjects it was trained and chosen. Raises BadInput where nothing is
    named, or more than one thing."""
    from dilformer_jax.registration import selection

    if options.weights and (options.method or options.workdir):
        raise BadInput("--weights says what to evaluate; leave out --workdir and --method.")
    if options.weights is not None:
        return selection.of_bundle(options.weights)
    if options.workdir is not None:
        return selection.of_run(options.workdir)
    if options.method is None:
        raise BadInput(f"Nothing to evaluate; give --workdir RUN, --weights FILE or --method {'|'.join(cli.METHODS)}.")
    return None


def _task(options: argparse.Namespace, known: "Selection | None") -> Task:
    """The pairs that the command line names, or the validation split of the workdir's own data."""
    from dilformer_jax.registration.predictor import read_config

    if (options.data is None) != (options.protocol is None and options.dataset is None):
        raise BadInput("--data goes with --protocol or --dataset: what is scored, and the folder of its files.")
    if options.pairs is not None and (options.dataset or options.split):
        raise BadInput(f"--{'dataset' if options.dataset else 'split'} is for --data; leave it out with --pairs.")
    if options.data is not None:
        kind = (PROTOCOLS[options.protocol].dataset if options.protocol in PROTOCOLS else None) or options.dataset
        # As the network's own training read this data set, so that its splits are the same ones.
        own = dict(known.options) if known is not None and known.dataset == kind else {}
        return protocols.task(options.protocol, options.data, options.split, options.dataset, own, options.labels or ())
    if options.pairs is not None:
        dataset, part, kind, name = pairs_csv(options.pairs), "test", "pairs_csv", str(options.pairs)
        text = f"the pairs of {options.pairs}"
    elif options.workdir is not None:
        data = read_config(options.workdir)["data"]
        kind, part = data["name"], options.split or "validation"
        dataset, name = DATASETS[kind](Path(data["directory"]), **data["options"]), kind
        text = f"the {part} pairs of the data that the network was trained with, in {data['directory']}"
    else:
        raise BadInput("No pairs to evaluate; give --protocol or --dataset with --data DIR, or --pairs pairs.csv.")
    labels = options.labels or dataset.labels
    return Task(name, text, kind, None if options.pairs else part, split(dataset, part), labels, dataset.names)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
