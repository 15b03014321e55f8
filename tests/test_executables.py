"""Compiled programs from one start to the next: where they are kept, that they are used, and what is thrown away."""

import os
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import pytest

import dilformer_jax
from dilformer_jax.io import executables

ROOT = Path(dilformer_jax.__file__).parents[1]
# A command that compiles something and says how much of it was there already.
COMMAND = """
import sys
from dilformer_jax import cli

def main(arguments):
    import jax
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
    print(float(jax.jit(lambda x: (x @ x.T).sum())(jax.numpy.arange(12.0).reshape(3, 4))), len(hits))

cli.run_arguments(main, cli.Arguments("command"), ["command"])
"""


def run(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    settings = {name: value for name, value in os.environ.items() if name != executables.VARIABLE} | environment
    settings |= {"PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    return subprocess.run(command, env=settings, capture_output=True, text=True, check=True)


def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    first, second = (run(COMMAND, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
    assert first.stderr == second.stderr == ""
    result, hits = first.stdout.split()
    assert (float(result), hits) == (12**2 + 15**2 + 18**2 + 21**2, "0")  # of the sums of the columns
    assert second.stdout.split()[0] == result and int(second.stdout.split()[1]) > 0
    (folder,) = (tmp_path / "dilformer_jax" / "xla").iterdir()
    assert list(folder.glob("*-cache")) and folder.stat().st_mode & 0o077 == 0


def test_the_environment_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for said in ("", "/elsewhere"):
        monkeypatch.setenv(executables.VARIABLE, said)
        executables.keep()
        assert os.environ[executables.VARIABLE] == said and not list(tmp_path.iterdir())
    monkeypatch.delenv(executables.VARIABLE)
    # Not an absolute path: as if it were not there, says the XDG specification.
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    monkeypatch.setenv("HOME", str(tmp_path))
    executables.keep()
    assert os.environ[executables.VARIABLE].startswith(f"{tmp_path}/.cache/dilformer_jax/xla/")


def test_a_home_that_cannot_be_written_costs_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv(executables.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    executables.keep()
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and str(tmp_path / "file") in told and executables.VARIABLE in told
    assert executables.VARIABLE not in os.environ


def test_another_machine_has_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    here = executables._machine()
    assert here == executables._machine()
    text = "model name\t: X\nflags\t\t: fpu avx\ncpu MHz\t\t: 1.0\n"
    monkeypatch.setattr(executables.Path, "read_text", lambda _: text)
    other = executables._machine()
    monkeypatch.setattr(executables.Path, "read_text", lambda _: text.replace("1.0", "2.0"))
    assert executables._machine() == other != here  # its clock is not what it is
    monkeypatch.setattr(executables.Path, "read_text", lambda _: text.replace("avx", "avx avx2"))
    assert executables._machine() not in (other, here)
    monkeypatch.setattr(executables.os, "sched_getaffinity", lambda _: set(range(999)), raising=False)
    cores = executables._machine()
    monkeypatch.setattr(executables.os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert executables._machine() != cores


def test_damaged_entries_go_and_so_do_the_oldest(tmp_path: Path) -> None:
    whole = zlib.compress(os.urandom(1000))
    contents = {name: whole for name in "abc"} | {"zstandard": b"\x28\xb5\x2f\xfd"}
    contents |= {"cut": whole[:500], "empty": b"", "wrong": whole[:50] + b"?" + whole[51:]}
    for name, content in contents.items():
        (tmp_path / f"{name}-cache").write_bytes(content)
    (tmp_path / "note").write_bytes(b"not a program")
    left = lambda: {path.name.removesuffix("-cache") for path in tmp_path.iterdir()} - {executables.CHECKED}
    executables.clear(tmp_path, largest=10_000)
    assert left() == {"a", "b", "c", "zstandard", "note"}
    for used, name in enumerate(("b", "c", "a", "zstandard"), 1):
        os.utime(tmp_path / f"{name}-cache", (used, used))
    executables.clear(tmp_path, largest=2 * len(whole) + 4)
    assert left() == {"a", "c", "zstandard", "note"}
    # Only what was written since the last look is looked into.
    (tmp_path / "a-cache").write_bytes(b"\x78")
    os.utime(tmp_path / "a-cache", (5, 5))
    executables.clear(tmp_path, largest=10_000)
    assert "a" in left()
