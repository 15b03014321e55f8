"""Training runs that several test files look at, each made once, by the command itself in a process of its own."""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dilformer_jax.data import sources

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 600  # seconds, for a machine that does much else
STEPS = 12


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """The environment of a process with so many simulated devices, whose compiler does not take long to optimise."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return {**os.environ, "XLA_FLAGS": flags, **more}


def command(name: str, *arguments: object) -> list[str]:
    """`python -m dilformer_jax.NAME`, in which a warning is an error."""
    return [sys.executable, "-W", "error", "-m", f"dilformer_jax.{name}", *map(str, arguments)]


def training(workdir: Path, phantoms: Path, *overrides: str) -> list[str]:
    data = f"--config.data.directory={phantoms}"
    return command("train", "--config", ROOT / "configs" / "demo.py:tiny", "--workdir", workdir, data, *overrides)


# Twelve steps, so that a run can be killed amid them; Dice at every fourth, a checkpoint at every second.
WHOLE = (f"--config.total_steps={STEPS}", "--config.validate_every=4", "--config.checkpoint_every=2")
# Five steps of four pairs each.
FIVE = ("--config.batch_size=4", "--config.total_steps=5", "--config.validate_every=5", "--config.checkpoint_every=5")


def start(arguments: list[str], **settings: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **{"env": environment()} | settings,
    )


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    """What the processes printed, once all have ended well."""
    try:
        told = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, told, strict=True):
        assert process.returncode == 0, out + err
    return [out for out, _ in told]


def kill(process: subprocess.Popen[str], workdir: Path, step: int) -> None:
    """SIGKILL as soon as the log has come to this step."""
    end = time.monotonic() + TIMEOUT
    while last_step(workdir) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)
    process.kill()
    process.communicate()


def last_step(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return max((json.loads(line)["step"] for line in whole if line.endswith("\n")), default=-1)


def losses(workdir: Path) -> list[float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@functools.cache
def phantoms(base: Path) -> Path:
    """The phantoms of `demo.py:tiny`. `base` is pytest's own folder for this session."""
    folder = base / "shared-phantoms"
    sources.phantoms(folder, train=2, validation=2, shape=(32, 32, 32), seed=0)
    return folder


@functools.cache
def whole(base: Path) -> Path:
    """The workdir of a run of `WHOLE` that nothing disturbed."""
    folder = base / "shared-whole"
    finish(start(training(folder, phantoms(base), *WHOLE)))
    return folder


@functools.cache
def one_and_four(base: Path) -> dict[int, Path]:
    """Workdirs of `FIVE`, by the number of devices."""
    found = {count: base / f"shared-devices-{count}" for count in (1, 4)}
    # Side by side: most of their time is a compiler's, which uses one core.
    finish(*(start(training(path, phantoms(base), *FIVE), env=environment(count)) for count, path in found.items()))
    return found
