import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from dilformer_jax.io.volumes import BadInput
from dilformer_jax.training import logs


def test_lines_are_strict_json_with_shortest_exact_numbers(tmp_path):
    log = logs.MetricLog(tmp_path / "deep" / "run")
    third = np.float32(1) / np.float32(3)
    log.write(
        5,
        loss=third,
        lr=0.1,
        tenth=jnp.float32(0.1),
        dice=math.nan,
        top=np.float32(np.inf),
        count=np.int32(7),
        flag=True,
        labels=np.array([0.5, np.nan], np.float32),
        pair="S11_to_S12",
    )
    line = (tmp_path / "deep" / "run" / "metrics.jsonl").read_text()
    assert line == (
        '{"step": 5, "loss": 0.33333334, "lr": 0.1, "tenth": 0.1, "dice": null, "top": null, "count": 7, "flag": true, '
        '"labels": [0.5, null], "pair": "S11_to_S12"}\n'
    )
    assert np.float32(json.loads(line)["loss"]) == third


def test_every_float32_reads_back_to_itself(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**32, 3000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    logs.MetricLog(tmp_path).write(1, values=values)
    (record,) = logs.read(tmp_path / "metrics.jsonl")
    np.testing.assert_array_equal(np.array(record["values"], np.float32).view(np.uint32), values.view(np.uint32))


def test_a_killed_and_resumed_log_equals_an_uninterrupted_one(tmp_path):
    def losses(first, last, log):
        for step in range(first, last + 1):
            log.write(step, loss=np.float32(step) / 7)
            log.timing(step, seconds=step)

    whole = logs.MetricLog(tmp_path / "whole")
    losses(1, 9, whole)
    killed = logs.MetricLog(tmp_path / "killed")
    losses(1, 6, killed)
    for name in ("metrics.jsonl", "timing.jsonl"):
        with (tmp_path / "killed" / name).open("a") as file:
            file.write('{"step": 7, "lo')
    resumed = logs.MetricLog(tmp_path / "killed")
    resumed.cut(4)
    losses(5, 9, resumed)
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert [line["step"] for line in logs.read(tmp_path / "killed/timing.jsonl")] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("tail", ['{"step": 2, "loss": 0.', '{"step": 2, "loss": 0.25', "{", '{"a": "\N{DEGREE SIGN}'])
def test_a_half_written_line_is_dropped(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n' + tail.encode()[: -1 if tail.endswith("\N{DEGREE SIGN}") else None])
    assert logs.read(path) == [{"step": 1, "loss": 0.5}]
    logs.MetricLog(tmp_path).cut(10)
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n'


def test_a_line_that_lacks_only_its_break_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}')
    log = logs.MetricLog(tmp_path)
    log.cut(2)
    log.write(3, loss=0.125)
    assert [line["loss"] for line in logs.read(path)] == [0.5, 0.25, 0.125]


def test_cut_before_the_first_step_empties_and_leaves_no_other_file(tmp_path):
    log = logs.MetricLog(tmp_path)
    log.cut(0)
    log.write(0, dice=0.5)
    log.write(1, loss=1.0)
    log.cut(0)
    assert [line["step"] for line in logs.read(tmp_path / "metrics.jsonl")] == [0]
    log.cut(-1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_damage_inside_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(BadInput, match=r"metrics.jsonl has a damaged line 2"):
        logs.read(path)
    with pytest.raises(BadInput, match=r"other.jsonl cannot be read"):
        logs.read(tmp_path / "other.jsonl")
    with pytest.raises(BadInput, match=r"cannot be made a folder"):
        logs.MetricLog(path)


def test_other_processes_write_nothing(tmp_path):
    log = logs.MetricLog(tmp_path / "run", writing=False)
    log.cut(0)
    log.write(1, loss=0.5)
    log.timing(1, seconds=2)
    assert not (tmp_path / "run").exists()


def test_progress_in_plain_lines():
    times = iter([0.0, 40.0, 50.0, 70.0])
    page = io.StringIO()
    progress = logs.Progress(100, step=10, console=Console(file=page, width=60), clock=lambda: next(times))
    with progress:
        progress.update(20, loss=0.75)
        # The first report's speed is of compilation: afterwards 10 steps in 10 s, then 10 in 20 s.
        progress.update(30, loss=0.5, dice=0.61234)
        progress.print("[saved] step 30")
        progress.update(40, loss=0.25)
    assert page.getvalue().splitlines() == [
        "step 20/100  0.25 steps/s  ETA 0:05:20  loss 0.7500",
        "step 30/100  1 steps/s  ETA 0:01:10  loss 0.5000  Dice 0.6123",
        "[saved] step 30",
        "step 40/100  0.5 steps/s  ETA 0:01:30  loss 0.2500  Dice 0.6123",
    ]


def test_progress_on_a_terminal_shows_the_bar():
    times = iter([0.0, 5.0, 10.0])
    page = io.StringIO()
    console = Console(file=page, width=100, force_terminal=True, color_system=None)
    with logs.Progress(40, console=console, clock=lambda: next(times)) as progress:
        progress.update(10, loss=0.5)
        progress.update(20, loss=0.125, dice=0.6)
    shown = page.getvalue()
    assert "step 20/40" in shown
    assert "2 steps/s  ETA 0:00:10  loss 0.1250  Dice 0.6000" in shown


def test_progress_hidden_prints_nothing():
    page = io.StringIO()
    with logs.Progress(40, console=Console(file=page), showing=False) as progress:
        progress.update(10, loss=0.5)
        progress.print("line")
    assert page.getvalue() == ""
