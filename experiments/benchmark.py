"""Every speed that this project claims, measured: a JSON line a case, on whatever device JAX finds.

    python experiments/benchmark.py [--only SECTION...] [--rdp CLONE] [--voxelmorph CLONE] [--transmorph CLONE] > lines
    python experiments/benchmark.py --table lines > experiments/results/benchmark.md

What is compared takes turns within one run, after compilation, and `ratio` is the median of the rounds' own ratios,
ours over theirs: other load on the machine falls on both. `ours` and `theirs` are medians of seconds (unless `unit`
says otherwise), `*_range` their extremes, `target` the largest ratio that is aimed at. PyTorch takes part where it is
installed (the `torch` extra), its official registration networks where clones of their repositories are given
(`peers.py`); what is missing is null. Volumes are of noise and weights random: neither changes the time.
"""

import argparse
import datetime
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# PyTorch needs its share of the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import cases
import jax
import jax.numpy as jnp
import network_cases
import peers
import primitive_cases
import training_cases
from cases import Case, Row, Run

# --- Timing ---


def measure(runs: dict[str, Run], rounds: int, budget: float) -> dict[str, list[float]]:
    """Seconds of each, taking turns: as many rounds as asked for, fewer once `budget` seconds are up.

    The first round only warms up, unless it alone has used up the budget.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
            # PyTorch's threads spin on for a while after their work, and would slow whoever comes next.
            time.sleep(0.02)
        if time.perf_counter() - begin > budget:
            break
    return {name: times[1:] or times for name, times in seconds.items()}


def rows(case: Case, arguments: argparse.Namespace) -> Iterator[Row]:
    """A case measured: a row for each of our ways against each of the peers'."""
    seconds = measure(case.ours | case.theirs, min(arguments.rounds, case.rounds or arguments.rounds), arguments.budget)
    for name in case.ours:
        target = case.target[name] if isinstance(case.target, dict) else case.target
        for number, peer in enumerate(case.theirs or [None]):
            mine, others = seconds[name], seconds[peer] if peer else []
            ratios = [a / b for a, b in zip(mine, others, strict=True)] if peer else []
            yield {
                "case": case.name, "of": name, "size": case.size, "dtype": case.dtype, "unit": "s",
                "ours": statistics.median(mine), "ours_range": [min(mine), max(mine)], "peer": peer,
                "theirs": statistics.median(others) if peer else None,
                "theirs_range": [min(others), max(others)] if peer else None,
                "ratio": statistics.median(ratios) if peer else None,
                "ratio_range": [min(ratios), max(ratios)] if peer else None,
                "target": None if number else target, "rounds": len(mine),
                **fractions(case.extra.get(name, {}), statistics.median(mine), case.dtype, arguments),
            }  # fmt: skip


def fractions(counted: Row, seconds: float, dtype: str, arguments: argparse.Namespace) -> Row:
    """Of what the device reaches in the same run (`limits`)."""
    if not counted or jax.default_backend() == "cpu":
        return counted
    reached = limits(arguments.quick)
    return counted | {
        "of_copy_bandwidth": counted["bytes"] / seconds / reached["copy, bytes/s"],
        "of_matrix_rate": counted["operations"] / seconds / reached[f"matrix product {dtype}, operations/s"],
    }


def machine() -> Row:
    return {
        "device": f"{jax.devices()[0].device_kind}, {jax.device_count()} of {jax.default_backend()}",
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "torch": peers.version() if peers.available() else None,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
    }


# --- What the device reaches ---


@functools.cache
def limits(quick: bool) -> dict[str, float]:
    """What this device reaches: bytes read and written a second by a copy, operations a second by matrix products."""
    big = jax.default_backend() != "cpu"
    words, size = (2**14, 64) if quick else (2**28, 16384) if big else (2**26, 2048)
    x = jnp.zeros(words, jnp.float32)
    found = {"copy, bytes/s": 8 * words / best(cases.compiled(lambda x: x + 1, x))}
    for dtype in ("float32", "bfloat16") if big else ("float32",):
        a = cases.noise(0, size, size).astype(dtype)
        found[f"matrix product {dtype}, operations/s"] = 2 * size**3 / best(cases.compiled(lambda a: a @ a, a))
    return found


def best(run: Run, repeats: int = 5) -> float:
    return min(measure({"": run}, repeats, 30.0)[""])


def hardware(arguments: argparse.Namespace) -> Iterator[Row]:
    for name, value in limits(arguments.quick).items():
        what, unit = name.split(", ")
        yield {"case": what, "size": "", "dtype": "float32", "unit": unit, "ours": value, "rounds": 5}


# --- Tables ---


def table(lines: Iterable[str]) -> str:
    """Markdown of the JSON lines, a table a section."""
    shown: list[str] = []
    section = None
    for line in lines:
        row = json.loads(line)
        if "case" not in row:
            continue
        if row["section"] != section:
            section = row["section"]
            shown += ["", f"## {section}", "", "| case | size | ours | theirs | ratio (range) | target | |"]
            shown += ["| --- | --- | --- | --- | --- | --- | --- |"]
        ratio, target = row.get("ratio"), row.get("target")
        reached = "" if ratio is None or target is None else "reached" if ratio <= target else "missed"
        spread = row.get("ratio_range") or [None, None]
        between = f" ({figure(spread[0])} to {figure(spread[1])})" if row["rounds"] > 1 and spread[0] else ""
        dtype = "" if row["dtype"] == "float32" else f", {row['dtype']}"
        ours = f"{row['of']}: " if row.get("of") else ""
        theirs = f"{row['peer']}: {quantity(row['theirs'], row['unit'])}" if row.get("theirs") else ""
        shown.append(
            f"| {row['case']} | {row['size']}{dtype} | {ours}{quantity(row['ours'], row['unit'])} | {theirs} | "
            f"{figure(ratio)}{between if ratio else ''} | {figure(target)} | {reached} |"
        )
    return "\n".join(shown).strip() + "\n"


def quantity(value: float, unit: str) -> str:
    return f"{value * 1e3:.3g} ms" if unit == "s" and value < 1 else f"{figure(value)} {unit}"


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1e4 else f"{value:.2e}"


# --- The run ---

SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[Case | Row]]] = {
    "conv": primitive_cases.convolutions,
    "warp": primitive_cases.warps,
    "lncc": primitive_cases.correlations,
    "integration": primitive_cases.integrations,
    "inference": network_cases.inferences,
    "memory": network_cases.memories,
    "step": network_cases.steps,
    "remat": training_cases.remats,
    "compiling": training_cases.compilings,
    "data": training_cases.feeds,
    "startup": training_cases.starts,
    "hardware": hardware,
    "forms": primitive_cases.forms,
}
# What says nothing about a CPU, unless asked for.
ACCELERATOR = ("hardware", "forms")


def main() -> None:
    if sys.argv[1:2] == ["--alone"]:
        return network_cases.one_inference(*sys.argv[2:8])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--rounds", type=int, default=7, help="of each case, at most (7)")
    budget = "seconds after which a case gets no new round (60)"
    parser.add_argument("--budget", type=float, default=60.0, metavar="SECONDS", help=budget)
    parser.add_argument("--quick", action="store_true", help="tiny sizes and networks: shows that it runs, not speed")
    of_networks = "of whole networks on an accelerator (160x192x160 and 160x192x224, in both types)"
    parser.add_argument("--size", type=int, nargs=3, metavar=("D", "H", "W"), help=of_networks)
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes, help="likewise")
    for name in peers.NETWORKS:
        parser.add_argument(f"--{name}", type=Path, metavar="CLONE", help="the official repository, cloned")
    parser.add_argument("--data", type=Path, metavar="DIR", help="LPBA40, if it is not where lpba40_cpu.py has it")
    parser.add_argument("--table", type=Path, nargs="+", metavar="LINES", help="the Markdown table of earlier runs")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(line for path in arguments.table for line in path.read_text().splitlines()), end="")
        return
    where = machine()
    print(json.dumps(where), flush=True)
    on_cpu = jax.default_backend() == "cpu" and not arguments.quick
    for name in arguments.only or [name for name in SECTIONS if not (on_cpu and name in ACCELERATOR)]:
        for case in SECTIONS[name](arguments):
            for row in rows(case, arguments) if isinstance(case, Case) else [case]:
                print(json.dumps({"section": name, "device": where["device"]} | row), flush=True)


if __name__ == "__main__":
    main()
