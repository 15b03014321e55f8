"""Two processes on one machine train as one."""

import json
import re
import socket
from pathlib import Path

import numpy as np
import training_runs as runs

from dilformer_jax.io import bundle
from dilformer_jax.training import checkpoint


def of_gloo(line: str) -> bool:
    """Whether a line is Gloo's greeting or a piece of it: its threads write into each other's lines."""
    return re.fullmatch(r"(\[Gloo\]|Rank|is|connected|to|peer|ranks\.?|Expected|number|of|:|\d|\s)*", line) is not None


def test_two_processes_train_as_one(devices: dict[int, Path], phantoms: Path, tmp_path: Path) -> None:
    """Two devices each, against one process of four, two of which share each volume: the same batches, in another
    order, and from volumes that are on the devices."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workdir = tmp_path / "run"
    joined = {"DILFORMER_COORDINATOR": f"127.0.0.1:{port}", "DILFORMER_PROCESSES": "2"}
    processes = [
        runs.start(
            runs.training(workdir, phantoms, *runs.FIVE, "--config.data.cache=device"),
            env=runs.environment(2, **joined, DILFORMER_PROCESS_ID=str(number)),
        )
        for number in range(2)
    ]
    first, second = ([line for line in out.splitlines() if not of_gloo(line)] for out in runs.finish(*processes))
    assert first[0].startswith("backend: cpu (4 devices, 2 processes)")
    assert second == []  # one voice, one log
    ours, theirs = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (workdir, devices[4])
    )
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [0, 1, 2, 3, 4, 5, 5]
    # The processes add their gradients in no fixed order, and Adam's first steps make much of a gradient near zero.
    np.testing.assert_allclose(runs.losses(workdir), runs.losses(devices[4]), rtol=0, atol=1e-4)
    np.testing.assert_allclose(runs.losses(workdir)[:2], runs.losses(devices[4])[:2], rtol=0, atol=1e-6)
    assert len(list(tmp_path.rglob("metrics.jsonl"))) == len(list(tmp_path.rglob("config.json"))) == 1

    # In this process, which is neither of the two.
    (params, step), (expected, _) = (checkpoint.restore_params(path, "latest") for path in (workdir, devices[4]))
    assert step == 5
    flat, expected_flat = bundle.flatten(params), bundle.flatten(expected)
    assert flat.keys() == expected_flat.keys()
    # All but the few whose gradient is so near zero that Adam takes its rounding for a direction.
    apart = np.concatenate([np.abs(array - expected_flat[name]).ravel() for name, array in flat.items()])
    assert (apart < 1e-4).mean() > 0.95
