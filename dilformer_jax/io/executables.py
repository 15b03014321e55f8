"""Where compiled programs are kept from one start of a command to the next: a folder for JAX's compilation cache."""

import hashlib
import os
import platform
import sys
import zlib
from contextlib import suppress
from pathlib import Path

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
LARGEST = 4 << 30  # bytes of a folder, beyond which the programs unused for longest go
PROCESSOR = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU")  # lines of Linux's /proc/cpuinfo
CHECKED = ".checked"  # its time is that of the last look for damage


def keep() -> None:
    """Lets JAX, which must not be imported yet, keep what takes over a second to compile under the user's cache folder.

    That is $XDG_CACHE_HOME or ~/.cache, and in it dilformer_jax/xla/MACHINE. Where JAX_COMPILATION_CACHE_DIR is set
    it decides instead, and nothing is kept where it is empty. A folder that cannot be written costs a sentence on
    stderr and the time of compiling.
    """
    if VARIABLE in os.environ:
        return
    try:
        folder = _caches() / "dilformer_jax" / "xla" / _machine()
        # Whoever writes there runs programs as this user.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        clear(folder, LARGEST)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        print(
            f"Compiled programs are not kept ({error}); set {VARIABLE} to a folder, or to nothing to be quiet.",
            file=sys.stderr,
        )
        return
    os.environ[VARIABLE] = str(folder)


def clear(folder: Path, largest: int) -> None:
    """Removes what was written since the last time and is damaged, then what is unused for longest beyond `largest`
    bytes. Raises OSError where the folder cannot be written.

    JAX writes in place: killed at it, a process leaves half an entry, of which JAX would warn at every start without
    ever replacing it.
    """
    mark = folder / CHECKED
    since = mark.stat().st_mtime_ns if mark.exists() else 0
    mark.touch()
    entries = []
    for path in folder.glob("*-cache"):
        with suppress(FileNotFoundError):  # gone meanwhile
            state = path.stat()
            if state.st_mtime_ns >= since and _damaged(path):
                path.unlink()
            else:
                entries.append((max(state.st_atime_ns, state.st_mtime_ns), state.st_size, path))
    excess = sum(size for _, size, _ in entries) - largest
    for _, size, path in sorted(entries):
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        excess -= size


def _damaged(path: Path) -> bool:
    content = path.read_bytes()
    if content and content[0] != 0x78:
        return False  # not zlib's, so zstandard's, where that is installed
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(content)
    except zlib.error:
        return True
    return not unpacking.eof


def _caches() -> Path:
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return named if named.is_absolute() else Path.home() / ".cache"


def _machine() -> str:
    """Names the processor and how many cores this process has: a program is compiled for both, and one compiled for
    another processor may not even run."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = [platform.processor()]
    kinds = {line for line in lines if line.startswith(PROCESSOR)} or set(lines)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    told = [platform.system(), platform.machine(), *sorted(kinds), str(cores)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]
