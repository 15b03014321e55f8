"""Which packages are installed, and whether they go together."""

import importlib
import importlib.metadata
import re
from collections.abc import Iterator

OK, WARNING, PROBLEM = "ok", "warning", "problem"
Line = tuple[str, str]  # how bad it is, and the sentence
# Distributions, and how those that depend on the version of JAX are imported.
PACKAGES = {
    "jax": "jax",
    "jaxlib": "jaxlib",
    "flax": "flax.linen",
    "optax": "optax",
    "orbax-checkpoint": "orbax.checkpoint",
    "grain": "grain",
    "numpy": "numpy",
    "scipy": "scipy",
    "nibabel": "nibabel",
}
PLUGINS = r"jax[-_](cuda|rocm)\d*[-_](plugin|pjrt)"


def versions() -> Iterator[Line]:
    """Versions, and where one is not what another asks for."""
    there = {name: installed(name) for name in PACKAGES}
    yield OK, ", ".join(f"{name} {version or 'missing'}" for name, version in there.items())
    for asking in ("dilformer-jax", *PACKAGES):
        for name, bounds in asked(asking):
            version = there.get(name)
            if name in there and not (version and within(version, bounds)):
                fault = f"{asking} {installed(asking)} needs {name}{bounds} and there is {version or 'none'}"
                yield PROBLEM, f"{fault}: pip install --upgrade '{asking}' '{name}{bounds}'"
    jaxlib = there["jaxlib"]
    if jaxlib and jaxlib != there["jax"]:
        yield WARNING, f"jax is {there['jax']} and jaxlib {jaxlib}: pip install --upgrade 'jaxlib=={there['jax']}'"
    for name, version in sorted(plugins().items()):
        # JAX leaves such a plugin out, and computes on the CPU.
        matches = jaxlib is not None and version.split(".")[:3] == jaxlib.split(".")[:3]
        mend = f" and jaxlib {jaxlib}, so that JAX does not use it: pip install --upgrade '{name}=={jaxlib}'"
        yield (OK, f"{name} {version}") if matches else (WARNING, f"{name} is {version}{mend}")
    if installed("matplotlib") is None:
        yield WARNING, "matplotlib is missing, without which there are no figures: pip install 'dilformer-jax[plot]'"
    else:
        yield OK, f"matplotlib {installed('matplotlib')}"


def imports() -> Iterator[Line]:
    """Packages that do not start: whatever their numbers are, these do not go together."""
    for name, module in PACKAGES.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # anything may go wrong in a package that was made for another JAX
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            fault = f"{name} {installed(name) or ''} fails to start with jax {installed('jax')} ({reason})"
            yield PROBLEM, f"{fault}: pip install --upgrade 'jax' 'jaxlib' '{name}'"
            return


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def plugins() -> dict[str, str]:
    """JAX's plugins for GPUs that are installed, and their versions."""
    found = {one.metadata["Name"] or "": one.version for one in importlib.metadata.distributions()}
    return {name: version for name, version in found.items() if re.match(PLUGINS, name)}


def asked(name: str) -> list[tuple[str, str]]:
    """What an installed package needs, as ("jaxlib", ">=0.10.1,<=0.10.2"); extras aside."""
    try:
        needs = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    parsed = (re.match(r"([\w.-]+)\s*(?:\[.*?\])?\s*\(?([<>=!~\d., ]*)", need) for need in needs if ";" not in need)
    return [(match[1], match[2].replace(" ", "")) for match in parsed if match]


def within(version: str, bounds: str) -> bool:
    """Whether "0.10.2" is within ">=0.10,<0.11". Of a version's parts the numbers count."""
    number = lambda text: [*map(int, re.findall(r"\d+", re.split(r"[a-z+]", text)[0])), 0, 0, 0][:4]
    for bound in filter(None, bounds.split(",")):
        sign, limit = re.match(r"([<>=!~]*)(.*)", bound).groups()  # type: ignore[union-attr]
        a, b = number(version), number(limit)
        if not {">=": a >= b, "<=": a <= b, ">": a > b, "<": a < b, "==": a == b, "!=": a != b}.get(sign, True):
            return False
    return True
