"""What a run writes down while it trains: metrics and timing as JSON lines, and a progress bar."""

import json
import math
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from dilformer_jax.io.volumes import BadInput, replacing

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"


class MetricLog:
    """metrics.jsonl and timing.jsonl in a run's folder.

    metrics.jsonl says what was computed and nothing of when, so that a run that was killed and resumed leaves the same
    bytes as one that was not: write a step's metrics before its checkpoint, and cut to the step that was restored.
    With `writing` False (every process but the first) nothing touches the disk.
    """

    def __init__(self, workdir: Path | str, *, writing: bool = True) -> None:
        self.workdir = Path(workdir)
        self.writing = writing
        if writing:
            try:
                self.workdir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BadInput(f"{workdir} cannot be made a folder ({error.strerror}); choose another.") from error

    def cut(self, step: int) -> None:
        """Drops the metrics beyond `step` (-1: all of them) and mends last lines that were half written."""
        if self.writing:
            _rewrite(self.workdir / METRICS, step)
            _rewrite(self.workdir / TIMING, None)

    def write(self, step: int, **values: Any) -> None:
        """Adds a line of metrics: numbers, arrays, texts, and lists or dictionaries of these; NaN becomes null."""
        self._append(METRICS, step, values)

    def timing(self, step: int, **values: Any) -> None:
        """Adds a line of timing: what differs between two runs that compute the same."""
        self._append(TIMING, step, values)

    def _append(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        if not self.writing:
            return
        line = json.dumps({"step": int(step), **_strict(values)}, allow_nan=False, ensure_ascii=False) + "\n"
        path = self.workdir / name
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise BadInput(
                f"{path} cannot be written ({error.strerror}); make room for it, then start again."
            ) from error


def read(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file, less a last one that was half written. Raises BadInput where it is none."""
    lines = _whole_lines(Path(path))
    return [_record(Path(path), number, line) for number, line in enumerate(lines, 1)]


class Progress:
    """A progress bar of a run's steps; where the output is no terminal, a plain line for every report instead."""

    def __init__(
        self,
        total: int,
        *,
        step: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        showing: bool = True,
    ) -> None:
        self.total = total
        self._clock = clock
        self._showing = showing
        self._console = console or Console()
        self._last = (step, clock())
        self._first: tuple[int, float] | None = None
        self._speed = 0.0
        self._values: dict[str, float] = {}
        self._bar = RichProgress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[report]}"),
            console=self._console,
            disable=not (showing and self._console.is_terminal),
            expand=True,
        )
        self._task = self._bar.add_task("training", total=total, completed=step, report="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, step: int, *, loss: float | None = None, dice: float | None = None) -> None:
        """Reports that `step` steps are done; a value that is not given stays as last reported.

        The speed is that since the previous report, the time left that of the mean speed since the first report, which
        leaves out compilation and counts validation in.
        """
        now = self._clock()
        if step > self._last[0]:  # else a validation took the time since
            self._speed = _rate(self._last, (step, now))
        mean = _rate(self._first, (step, now)) if self._first else self._speed
        self._last = (step, now)
        self._first = self._first or self._last
        new = {"loss": loss, "Dice": dice}
        self._values |= {name: float(value) for name, value in new.items() if value is not None}
        left = timedelta(seconds=round((self.total - step) / mean)) if mean > 0 else "?"
        shown = [f"{self._speed:.3g} steps/s", f"ETA {left}"]
        shown += [f"{name} {value:.4f}" for name, value in self._values.items()]
        report = "  ".join(shown)
        if not self._bar.disable:
            self._bar.update(self._task, completed=step, report=report)
        else:
            self.print(f"step {step}/{self.total}  {report}")

    def print(self, text: str) -> None:
        """A line above the bar."""
        if self._showing:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _rate(start: tuple[int, float], end: tuple[int, float]) -> float:
    steps, seconds = end[0] - start[0], end[1] - start[1]
    return steps / seconds if seconds > 0 else 0.0


def _strict(value: Any) -> Any:
    """As JSON can say it; a float32 by its own shortest digits, which read back to the same float32."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not isinstance(value, np.floating):
        return value if math.isfinite(value) else None
    array = np.asarray(value)
    if array.ndim:
        return [_strict(item) for item in array]
    if array.dtype.kind == "f":
        return _strict(float(str(array[()])))
    if array.dtype.kind in "biu":
        return array.item()
    raise TypeError(f"a log takes numbers, texts, lists and dictionaries of these, not {type(value).__name__}")


def _rewrite(path: Path, step: int | None) -> None:
    if not path.exists():
        return
    lines = _whole_lines(path)
    if step is not None:
        lines = [line for number, line in enumerate(lines, 1) if _record(path, number, line)["step"] <= step]
    content = "".join(line + "\n" for line in lines).encode()
    if content != path.read_bytes():
        with replacing(path) as partial:
            partial.write_bytes(content)


def _whole_lines(path: Path) -> list[str]:
    """The lines, less a last one without its line break, unless nothing but the line break is missing."""
    try:
        content = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); give the folder of a training run.") from error
    *lines, last = content.split("\n")
    try:
        json.loads(last)
    except ValueError:
        return lines
    return [*lines, last]


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{path} has a damaged line {number} ({error}); remove that line.") from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise BadInput(f"{path} has a line {number} without a step; remove that line.")
    return record
