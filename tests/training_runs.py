"""The training command in a process of its own: started, awaited, killed, and what its log says."""

import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 600  # seconds, for a machine that does much else
STEPS = 12


def compiler(devices: int, level: int = 0) -> str:
    """XLA_FLAGS for so many simulated devices and a compiler that takes a quarter of its time, or half at level 1."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level={level}"
    # Loops written as LLVM's own, not by way of MLIR. XLA gives this up, and a flag it does not know ends the process.
    return flags + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10.")


def environment(devices: int = 1, level: int = 0, **more: str) -> dict[str, str]:
    """The environment of a process with so many simulated devices, whose compiler does not take long."""
    return {**os.environ, "XLA_FLAGS": compiler(devices, level), **more}


def command(name: str, *arguments: object) -> list[str]:
    """`python -m dilformer_jax.NAME`, in which a warning is an error."""
    return [sys.executable, "-W", "error", "-m", f"dilformer_jax.{name}", *map(str, arguments)]


def training(workdir: Path, phantoms: Path, *overrides: str) -> list[str]:
    data = f"--config.data.directory={phantoms}"
    return command("train", "--config", ROOT / "configs" / "demo.py:tiny", "--workdir", workdir, data, *overrides)


# A Dilformer of one level, at half the images' resolution, which is compiled in a quarter of the time.
ONE_LEVEL = (
    "--config.model.options.levels=1",
    "--config.model.options.finest=1",
    "--config.loss.weights=(1.0,)",
    "--config.loss.windows=(5,)",
)
# Twelve steps, so that a run can be killed amid them; Dice at every fourth, a checkpoint at every second, and a running
# mean, which must be the same too.
WHOLE = (
    f"--config.total_steps={STEPS}",
    "--config.validate_every=4",
    "--config.checkpoint_every=2",
    "--config.average=0.9",
    *ONE_LEVEL,
)
# Five steps of four pairs each. What several levels need of other slabs `test_slabs` compares.
FIVE = (
    "--config.batch_size=4",
    "--config.total_steps=5",
    "--config.validate_every=5",
    "--config.checkpoint_every=5",
    *ONE_LEVEL,
)


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
