"""A comparison as Markdown, as text for a terminal and as LaTeX."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dilformer_jax.reporting import tables
from dilformer_jax.reporting.comparison import METRICS, Scored, ranks
from dilformer_jax.reporting.results import Common
from dilformer_jax.reporting.statistics import SEED, Design

Record = Mapping[str, Any]
ARROWS = {1: ("↑", r"$\uparrow$"), -1: ("↓", r"$\downarrow$"), 0: ("", "")}
ESCAPED = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
ESCAPED |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
ESCAPED |= {character: f"\\{character}" for character in "&%$#_{}"}
# After the end of a row these would be read as its arguments.
ESCAPED |= {character: f"{{{character}}}" for character in "[]*"}
TESTS = ("metric", "method", "difference", "95 % interval", "p", "p (Holm)", "rank-biserial r", "Cohen's dz", "n")


@dataclass(frozen=True, eq=False)
class Page:
    """What the tables are made of; `records` are those of `comparison.compared`, `notes` whole sentences."""

    within: Common
    rows: Sequence[Scored]
    metrics: Sequence[str]
    records: Sequence[Record]
    notes: Sequence[str]

    @property
    def title(self) -> str:
        return f"Comparison: {self.within.protocol}"

    @property
    def reference(self) -> str:
        return str(self.records[0]["reference"])


def explained(within: Common, design: Design, resamples: int, tested: int) -> list[str]:
    """Sentences that say what the numbers are: what was drawn, how, and what the tests leave out of account."""
    held = held_brains(within)
    drawn = " and ".join(str(size) for size in design.sizes)
    if not design.units:
        drawing = (
            "There are no intervals: they are made by drawing brains anew, and these pairs have one or two brains."
        )
    else:
        kinds = {1: "", 2: " (fixed and moving ones, each by themselves)"}[len(design.sizes)]
        stays = f"; {', '.join(held)}, in every pair, stays" if held else ""
        varying = len({brain for fixed, moving, _ in within.pairs for brain in (fixed, moving)}) - len(held)
        # Brains that are always in the same pairs are drawn together.
        what = "brains" if sum(design.sizes) == varying else "groups of brains that are in the same pairs"
        drawing = (
            f"95 % intervals are by bootstrap over subjects: {drawn} {what}{kinds} are drawn with replacement, "
            f"{resamples} times (seed {SEED}), and a pair counts as often as both of its brains were drawn (pigeonhole "
            f"bootstrap, Owen 2007; Davezies et al. 2021){stays}. Percentiles are expanded for few brains (Hesterberg "
            "2015; `reporting/statistics.py` has the formula)."
        )
        if design.units < 6:
            drawing += f" With {design.units} of them the intervals are too narrow."
    found = [
        "Values are means ± population standard deviations over the pairs that have a value [95 % interval of the "
        "mean]; n is given where a pair has none.",
        drawing,
    ]
    if tested:
        found.append(
            "p is of Wilcoxon's signed-rank test over pairs, two-sided; Holm's correction is over the methods, for "
            "each metric by itself. r is the matched-pairs rank-biserial correlation, dz the mean of the differences "
            "over their standard deviation."
        )
        if design.units < len(within.pairs):
            found.append(
                "The test takes pairs for independent. Pairs that share a brain are not, so p is too small: it is "
                "printed because papers print it, and the interval of the difference is what to go by."
            )
    return found


def held_brains(within: Common) -> list[str]:
    """The brains that are in every pair."""
    return sorted(set.intersection(*({fixed, moving} for fixed, moving, _ in within.pairs)))


def markdown(page: Page, picture: str | None = None) -> str:
    """The page, with the best mean of each metric in bold, and the picture of this name where there is one."""
    method_rows, columns = _methods(page, ("**", "**"))
    lines = [f"# {page.title}\n", f"{_counts(page)}\n", tables.markdown(method_rows, columns)]
    tests = _tests(page)
    if tests:
        lines += [f"## Differences to {page.reference}\n", tables.markdown(tests, TESTS)]
    lines.append("".join(f"* {note}\n" for note in page.notes))
    if picture:
        lines.append(f"![Dice of each method]({picture})\n")
    return "\n".join(lines)


def plain(page: Page) -> str:
    """The same for a terminal."""
    method_rows, columns = _methods(page, ("", ""))
    tests = _tests(page)
    parts = [f"{page.title}\n{_counts(page)}\n", tables.plain(method_rows, columns)]
    if tests:
        parts.append(f"Differences to {page.reference}\n" + tables.plain(tests, TESTS))
    return "\n".join([*parts, "".join(f"{note}\n" for note in page.notes)])


def latex(page: Page) -> str:
    """Two tabulars for a table environment, methods and then differences; booktabs is all that they need.

    The best mean of a metric is bold, the second underlined.
    """
    places = ranks(page.records, page.rows)
    width = max(len(row.name) for row in page.rows)
    lines = [
        f"% {latex_text(page.title)}. {latex_text(_counts(page))}",
        r"% Needs \usepackage{booktabs}; \begin{table} \centering \input{comparison} \caption{...} \end{table}",
        *(f"% {latex_text(note)}" for note in page.notes),
        rf"\begin{{tabular}}{{l{'c' * len(page.metrics)}rr}}",
        r"\toprule",
        " & ".join(["Method", *(_heading(metric, 1) for metric in page.metrics), "Time [s]", r"Parameters \\"]),
        r"\midrule",
    ]
    for row in page.rows:
        mine = [_record(page, metric, row) for metric in page.metrics]
        cells = [_latex_mean(record, places.get((record["metric"], row.name))) for record in mine]
        costs = [latex_text(_seconds(row)).replace("–", "--"), _parameters(row).replace(",", "{,}").replace("–", "--")]
        lines.append(f"{latex_text(row.name):<{width}} & " + " & ".join([*cells, *costs]) + r" \\")
        ends = [_latex_ends(record["low"], record["high"], record["metric"]) for record in mine]
        if any(ends):
            lines.append(f"{'':<{width}} & " + " & ".join([*ends, "", ""]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    tests = [record for record in page.records if record["n_paired"]]
    if tests:
        lines += [
            "",
            r"\medskip",
            r"\begin{tabular}{llcccrr}",
            r"\toprule",
            rf"Metric & Method & Difference to {latex_text(page.reference)} & 95\,\% interval & $p$ (Holm) & $r$ & "
            r"$d_z$ \\",
            r"\midrule",
        ]
        for record in tests:
            metric = record["metric"]
            cells = [
                _heading(metric, 1, arrow=False),
                latex_text(record["method"]),
                f"${latex_number(record['difference'], _spec(metric, '+'))}$",
                _latex_ends(record["difference_low"], record["difference_high"], metric, "+") or "--",
                "$" + p_value(record["p_holm"]) + "$",
                *(
                    f"${record[key]:.2f}$" if math.isfinite(record[key]) else "--"
                    for key in ("rank_biserial", "cohen_dz")
                ),
            ]
            lines.append(" & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def latex_text(words: str) -> str:
    """Any text as LaTeX that sets it, in one line."""
    return "".join(ESCAPED.get(character, character) for character in " ".join(words.split()))


def latex_number(value: float, spec: str) -> str:
    """A number for LaTeX's mathematics, such as 2\\cdot10^{-5}."""
    digits, exponent, power = format(value, spec).partition("e")
    return rf"{digits}\cdot10^{{{int(power)}}}" if exponent else digits


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _methods(page: Page, bold: tuple[str, str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of the table of methods and its columns; those that no method has anything for are left out."""
    places = ranks(page.records, page.rows)
    found = []
    for row in page.rows:
        cells: dict[str, Any] = {"method": row.name}
        for metric in page.metrics:
            record = _record(page, metric, row)
            cell = _mean(record, bold if places.get((metric, row.name)) == 1 else ("", ""))
            if 0 < record["n"] < len(page.within.pairs):
                cell += f", n {record['n']}"
            cells[_heading(metric, 0)] = cell
        found.append(cells | {"time [s]": _seconds(row), "device": row.device or None, "parameters": _parameters(row)})
    return found, [key for key in found[0] if any(row[key] not in (None, "–") for row in found)]


def _tests(page: Page) -> list[dict[str, Any]]:
    found = []
    for record in page.records:
        if record["n_paired"]:
            metric = record["metric"]
            cells = [
                _heading(metric, 0, arrow=False),
                record["method"],
                format(record["difference"], _spec(metric, "+")),
            ]
            cells += [_ends(record["difference_low"], record["difference_high"], metric, "+") or "–"]
            cells += [p_value(record["p"]), p_value(record["p_holm"])]
            cells += [
                f"{record[key]:.2f}" if math.isfinite(record[key]) else "–" for key in ("rank_biserial", "cohen_dz")
            ]
            found.append(dict(zip(TESTS, [*cells, record["n_paired"]], strict=True)))
    return found


def _record(page: Page, metric: str, row: Scored) -> Record:
    return next(record for record in page.records if (record["metric"], record["method"]) == (metric, row.name))


def _counts(page: Page) -> str:
    brains = {brain for fixed, moving, _ in page.within.pairs for brain in (fixed, moving)}
    return f"{len(page.within.pairs)} pairs of {len(brains)} brains, {len(page.within.labels)} structures."


def _spec(metric: str, sign: str = "") -> str:
    return sign + (METRICS[metric][3] if metric in METRICS else ".4g")


def _heading(metric: str, style: int, *, arrow: bool = True) -> str:
    """A metric's name with unit and direction: plain (0) or for LaTeX (1)."""
    name, unit, direction, _ = METRICS.get(metric, (metric, "", 0, ""))
    unit = f" [{unit}]" if unit else ""
    pointer = ARROWS[direction][style] if arrow else ""
    return f"{latex_text(name + unit) if style else name + unit} {pointer}".rstrip()


def _mean(record: Record, bold: tuple[str, str]) -> str:
    if not record["n"]:
        return "–"
    spec = _spec(record["metric"])
    ends = _ends(record["low"], record["high"], record["metric"])
    return f"{bold[0]}{record['mean']:{spec}}{bold[1]} ± {record['sd']:{spec}} {ends}".rstrip()


def _ends(low: float, high: float, metric: str, sign: str = "") -> str:
    spec = _spec(metric, sign)
    return f"[{low:{spec}}, {high:{spec}}]" if math.isfinite(low) else ""


def _latex_mean(record: Record, place: int | None) -> str:
    if not record["n"]:
        return "--"
    spec = _spec(record["metric"])
    mean = latex_number(record["mean"], spec)
    mean = {1: rf"\mathbf{{{mean}}}", 2: rf"\underline{{{mean}}}"}.get(place or 0, mean)
    return rf"${mean} \pm {latex_number(record['sd'], spec)}$"


def _latex_ends(low: float, high: float, metric: str, sign: str = "") -> str:
    spec = _spec(metric, sign)
    if not math.isfinite(low):
        return ""
    return rf"{{\scriptsize $[{latex_number(low, spec)}, {latex_number(high, spec)}]$}}"


def _seconds(row: Scored) -> str:
    if not math.isfinite(row.seconds):
        return "–"
    return "<0.001" if row.seconds < 0.001 else f"{row.seconds:.3g}"


def _parameters(row: Scored) -> str:
    return "–" if row.parameters is None else f"{row.parameters:,}"
