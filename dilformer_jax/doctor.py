"""Looks at this machine: `python -m dilformer_jax.doctor`; its lines are made to be pasted into an issue."""

import argparse
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dilformer_jax import cli
from dilformer_jax.io import executables
from dilformer_jax.io.volumes import BadInput
from dilformer_jax.reporting import packages, provenance, run_record
from dilformer_jax.reporting.packages import OK, PROBLEM, WARNING, Line, installed

# JAX's settings that change what is computed, or how fast, and their values unless someone sets them.
SETTINGS = {
    "jax_enable_x64": (False, "computes in float64 here and there: more memory, other numbers"),
    "jax_default_matmul_precision": (None, "changes the precision of the networks, and with it every result"),
    "jax_disable_jit": (False, "compiles nothing, which takes a hundred times as long"),
    "jax_debug_nans": (False, "waits after every operation, and stops at what is not a number"),
    "jax_debug_infs": (False, "waits after every operation, and stops at what is infinite"),
}
ALLOCATOR = ("XLA_PYTHON_CLIENT_ALLOCATOR", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_CLIENT_MEM_FRACTION")
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # as XLA_CLIENT_MEM_FRACTION was called
GIB = 1 << 30


def doctor(options: argparse.Namespace, overrides: Sequence[str], parser: cli.Arguments) -> None:
    """Prints what it finds, line by line; exit code 1 where that is a problem, 2 for a config that is none."""
    config = None
    if options.config:
        config = cli.overridden(parser, cli.load_config(options.config), list(overrides), options.config)
        run_record.complete(config)
    elif overrides:
        parser.error(f"unrecognized arguments: {overrides[0]}")
    found: list[Line] = []
    for line in lines(options, config):
        found.append(line)
        print(f"{line[0]:<8} {line[1]}", flush=True)
    count = {level: sum(line[0] == level for line in found) for level in (PROBLEM, WARNING)}
    told = [f"{number} {level}{'s' * (number != 1)}" for level, number in count.items() if number]
    print(f"verdict  {', '.join(told) or 'all is well'}")
    sys.exit(count[PROBLEM] > 0)


def lines(options: argparse.Namespace, config: Any) -> Iterator[Line]:
    yield from machine()
    yield from packages.versions()
    wrong = list(packages.imports())
    yield from wrong
    if not wrong:
        yield from devices()
        yield from settings(os.environ)
    yield from cache(os.environ)
    if config is not None and not wrong:
        yield from memory(config, options.shape)
    if options.selftest and not wrong:
        yield from selftest()


def machine() -> Iterator[Line]:
    commit = provenance.versions().get("commit")
    yield OK, f"dilformer-jax {installed('dilformer-jax') or 'not installed'}{f', commit {commit}' if commit else ''}"
    ram = host_memory()
    yield (
        OK,
        (
            f"python {platform.python_version()}, {platform.platform()}, {cores()} cores, "
            f"{f'{ram / GIB:.1f} GiB' if ram else 'unknown'} of memory"
        ),
    )


def devices() -> Iterator[Line]:
    import jax

    from dilformer_jax.training import parallel

    try:
        backend = jax.default_backend()
    except RuntimeError as error:
        yield PROBLEM, f"JAX finds no device ({str(error).partition(chr(10))[0]}): unset JAX_PLATFORMS"
        return
    yield OK, parallel.describe()
    for device in jax.local_devices():
        limit = device_memory(device)
        room = f"{limit / GIB:.1f} GiB" if limit else "the machine's memory" if backend == "cpu" else "memory unknown"
        yield OK, f"device {device.id}: {device.device_kind}, {room}"
    yield from unused(backend, os.environ)
    yield from allocator(backend, os.environ)


def unused(backend: str, environment: Mapping[str, str]) -> Iterator[Line]:
    """Accelerators that this machine has and JAX does not use."""
    nvidia = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    tpu = any(Path("/dev").glob("accel*")) or "TPU_NAME" in environment
    for there, name, pip in ((nvidia, "an NVIDIA GPU", "jax[cuda13]"), (tpu, "a TPU", "jax[tpu]")):
        if not there or backend != "cpu":
            continue
        chosen = environment.get("JAX_PLATFORMS")
        if chosen and "cpu" in chosen.split(","):
            mend = f"unset JAX_PLATFORMS, which is {chosen}"
        elif name != "a TPU" and packages.plugins():
            mend = "its plugin is installed, and JAX said on stderr why it is not used"
        else:
            mend = f"pip install '{pip}'"
            if name != "a TPU":
                mend += " (with a driver older than 580: 'jax[cuda12]')"
        yield WARNING, f"this machine has {name} and JAX computes on the CPU: {mend}"


def allocator(backend: str, environment: Mapping[str, str]) -> Iterator[Line]:
    """How memory is allocated, and settings of it that are not what they seem."""
    told = [f"{name}={environment[name]}" for name in (*ALLOCATOR, FRACTION) if name in environment]
    created = environment.get("JAX_PJRT_CLIENT_CREATE_OPTIONS")
    told += [f"JAX_PJRT_CLIENT_CREATE_OPTIONS={created}"] if created else []
    if backend == "gpu":
        kind = environment.get(ALLOCATOR[0], "default").lower()
        # Of the two ways to set it the second wins.
        kind = dict(option.partition(":")[::2] for option in (created or "").split(";")).get("allocator", kind)
        ahead = kind in ("default", "bfc") and environment.get(ALLOCATOR[1]) not in ("false", "False", "0")
        share = environment.get(ALLOCATOR[2]) or environment.get(FRACTION) or "0.75"
        manner = f"{kind}, which takes {share} of the memory at once" if ahead else kind
    else:
        huge = environment.get("GLIBC_TUNABLES")
        told += [f"GLIBC_TUNABLES={huge}"] if huge else []
        kind = manner = "the C library's" if backend == "cpu" else f"the {backend}'s"
    yield OK, f"allocator: {manner} ({', '.join(told) or 'nothing set'})"
    if kind == "platform" and installed("jax") in ("0.10.1", "0.10.2"):
        # jax-ml/jax#39145: XLA falls back to its own allocator.
        fault = f"the allocator 'platform' does nothing in jax {installed('jax')}"
        yield WARNING, f"{fault}: unset it, or set {ALLOCATOR[0]}=cuda_async"
    if environment.get(ALLOCATOR[2]) and environment.get(FRACTION):
        yield WARNING, f"{ALLOCATOR[2]} and {FRACTION} together keep JAX from starting a GPU: unset {FRACTION}"


def settings(environment: Mapping[str, str]) -> Iterator[Line]:
    """What else was set that changes results or times."""
    import jax

    for name, (usual, consequence) in SETTINGS.items():
        value = getattr(jax.config, name)
        if value != usual:
            yield WARNING, f"{name.upper()} is {value}, which {consequence}: unset it"
    for flag in environment.get("XLA_FLAGS", "").split():
        simulated = re.fullmatch(r"--xla_force_host_platform_device_count=(\d+)", flag)
        what = (
            f"simulates {simulated[1]} devices on one processor" if simulated else "changes how programs are compiled"
        )
        yield WARNING, f"XLA_FLAGS has {flag}, which {what}: unset it unless you mean it"
    others = [f"{key}={value}" for key, value in sorted(environment.items()) if key.startswith(("JAX_", "DILFORMER_"))]
    yield OK, f"environment: {', '.join(others) or 'nothing set for JAX'}"


def cache(environment: Mapping[str, str]) -> Iterator[Line]:
    """Where compiled programs are kept."""
    name = executables.VARIABLE
    if not (said := environment.get(name)):
        what = "is empty" if name in environment else "is not set and no folder could be made"
        yield WARNING, f"{name} {what}, so that every start compiles anew: {'unset it' if said == '' else 'set it'}"
        return
    folder = Path(said)
    try:
        sizes = [path.stat().st_size for path in folder.glob("*-cache")]
    except OSError:
        sizes = []
    contents = f"compiled programs: {folder}, {len(sizes)} of them, {sum(sizes) / 2**20:.1f} MiB"
    # JAX makes the folder; what is asked is whether it can.
    nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK):
        yield OK, contents
    else:
        yield WARNING, f"{contents}, which cannot be written: set {name} to a folder that can, or unset it"


def memory(config: Any, shape: Sequence[int] | None) -> Iterator[Line]:
    """What a training step of the configuration needs of each device, and what would make it less."""
    import jax

    from dilformer_jax.training import forecast

    grid, count = forecast.images(config, shape)
    device = jax.local_devices()[0]
    own = device_memory(device)
    # Simulated devices share the machine's.
    room = own or (host_memory() or 0) // jax.local_device_count()
    size = "x".join(map(str, grid))
    try:
        needed = forecast.need(config, grid, count)
    except jax.errors.JaxRuntimeError as error:
        yield PROBLEM, f"the step at {size} does not compile here: {str(error).partition(chr(10))[0]}"
        return
    fits = not room or needed.total <= room
    yield (
        OK if fits else PROBLEM,
        (
            f"a training step at {size} needs {needed.total / GIB:.2f} GiB a device, this one has "
            f"{room / GIB:.1f}{'' if own else ' (the machine)'}: {needed.temporary / GIB:.2f} for the step, "
            f"{needed.held / GIB:.2f} held, {needed.volumes / GIB:.2f} for resident volumes"
        ),
    )
    if fits:
        return
    for change, other in forecast.savings(config):
        try:
            less = forecast.need(other, grid, count).total
        except (BadInput, jax.errors.JaxRuntimeError):  # a way that is closed to this one
            continue
        yield WARNING, f"with --config.{change}: {less / GIB:.2f} GiB{'' if less <= room else ', still too much'}"
    if jax.device_count() == 1:
        yield WARNING, "with --config.space=N: about an Nth on each of N devices"


def selftest() -> Iterator[Line]:
    """A registration whose result is known."""
    from dilformer_jax.registration import selftest as known

    now, then = known.measured(), known.stored()
    for name, apart in known.drift(now, then).items():
        limit = known.TOLERANCES[name]
        values = f"{now[name]:.5f}, stored {then[name]:.5f}, " if name in now else "at fixed points, in voxels: "
        # Not (apart > limit): what is not a number is no agreement.
        yield OK if apart <= limit else PROBLEM, f"selftest {name} {values}drift {apart:.5f} of {limit:g} tolerated"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_memory() -> int | None:
    """Bytes that this machine has, or that its container may use; None where the system does not say."""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not a Unix
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            whole = min(whole, int(Path(limit).read_text()))
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
    return whole


def device_memory(device: Any) -> int | None:
    """Bytes that JAX may allocate on a device; None where it does not say, as of CPUs."""
    return (device.memory_stats() or {}).get("bytes_limit")


def _parser() -> cli.Arguments:
    parser = cli.Arguments(
        "dilformer doctor",
        description="Looks at versions, devices, settings and caches. Exit code: 0, 1 for a problem, 2 for bad input.",
        allow_abbrev=False,
        epilog="--config.KEY=VALUE changes a value of the configuration, as in training.",
    )
    parser.add_argument(
        "--config",
        metavar="FILE.py[:ARGUMENT]",
        help="say how much memory a training step of it needs, which is compiled for that: half a minute or more, and "
        "as much again for each remedy where it does not fit",
    )
    parser.add_argument(
        "--shape", type=int, nargs=3, metavar=("D", "H", "W"), help="of the images' files, where they are not here"
    )
    parser.add_argument("--selftest", action="store_true", help="register two phantoms and compare with what is known")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` (sys.argv unless given) begins with the program's name."""
    with cli.one_sentence():
        parser = _parser()
        options, overrides = parser.parse_known_args(list(sys.argv if argv is None else argv)[1:])
        executables.keep()
        doctor(options, overrides, parser)


if __name__ == "__main__":
    main()
