"""What the package imports and what setup.cfg declares: layers, floors, and that neither knows more than the other."""

import ast
import configparser
import functools
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dilformer_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
# A module imports only what stands to the left of it.
LAYERS = ("ops", "io", "models", "data", "training", "registration", "reporting")
# Modules of ops that measure: NumPy and SciPy, for whoever has no accelerator.
METRICS = [("ops", f"{noun}.py") for noun in ("correspondence", "folding", "overlap", "surfaces", "surfels")]
EXTRAS = ("plot", "ants")  # that modules import
ABSENT = {"ants": "antspyx"}  # what is imported of an extra that the tests do without, and its distribution
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """The modules that a file imports by their dotted names, and whether they are imported as soon as it is."""

    def visit(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_once) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0 and child.module, f"{path} imports relatively"
                # `from package import module` names a module only by what it imports.
                yield from ((f"{child.module}.{alias.name}", at_once) for alias in child.names)
            later = isinstance(child, ast.FunctionDef) or (
                isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            )
            yield from visit(child, at_once and not later)

    return visit(ast.parse(path.read_text()), True)


def layer(dotted: str) -> str | None:
    """The folder of the package that a dotted name lies in; None for other packages and for the entry points."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "dilformer_jax" and len(parts) > 2 and parts[1] in LAYERS else None


def requirements(kind: str) -> list[Requirement]:
    text = SETUP["options"]["install_requires"] if kind == "core" else SETUP["options.extras_require"][kind]
    return [Requirement(line) for line in re.split(r"[;\n]", text) if line.strip()]


packages_distributions = functools.cache(importlib.metadata.packages_distributions)


def distribution(module: str) -> str:
    if module in ABSENT:
        return ABSENT[module]
    found = {canonicalize_name(item) for item in packages_distributions()[module]}
    assert len(found) == 1, f"{module} comes from {found}"
    return found.pop()


def third_party(path: Path) -> set[tuple[str, bool]]:
    tops = {(dotted.split(".")[0], at_once) for dotted, at_once in imported(path)}
    return {item for item in tops if item[0] != "dilformer_jax" and item[0] not in sys.stdlib_module_names}


def test_imports_are_seen_by_these_tests(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import a.b\nfrom c import d, e as f\nclass G:\n    import h\n    def i(self):\n        import j\n")
    assert list(imported(path)) == [("a.b", True), ("c.d", True), ("c.e", True), ("h", True), ("j", False)]
    assert layer("dilformer_jax.ops.spatial.warp") == "ops" and layer("dilformer_jax.cli") is None


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_module_imports_only_what_stands_above_it(path):
    parts = path.relative_to(PACKAGE).parts
    own = parts[0] if parts[0] in LAYERS else None
    allowed = LAYERS if own is None else LAYERS[: LAYERS.index(own) + 1]
    below = {dotted for dotted, _ in imported(path) if layer(dotted) not in (None, *allowed)}
    assert not below
    if own is not None:
        entries = {entry.stem for entry in PACKAGE.glob("*.py")}
        found = {dotted for dotted, _ in imported(path) if dotted.startswith("dilformer_jax.")}
        assert not {dotted for dotted in found if dotted.split(".")[1] in entries}


@pytest.mark.parametrize("path", sorted((ROOT / "dilformer_jax").glob("[!_]*.py")), ids=name)
def test_entry_points_do_not_import_each_other(path):
    others = {entry.stem for entry in PACKAGE.glob("[!_]*.py")} - {"cli", "api", path.stem}
    found = {dotted for dotted, _ in imported(path) if dotted.split(".")[0] == "dilformer_jax"}
    assert not {dotted for dotted in found if dotted.split(".")[1] in others}


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_each_library_stays_in_its_place(path):
    parts = path.relative_to(PACKAGE).parts
    found = {dotted for dotted, _ in imported(path)}
    uses = lambda library: {dotted for dotted in found if f"{dotted}.".startswith(f"{library}.")}
    if parts[0] in ("io", "data") or parts in METRICS:
        assert not uses("jax") | uses("flax") | uses("optax") | uses("orbax")
        assert not {dotted for dotted, at_once in imported(path) if at_once} & uses("grain")
    assert parts[0] == "models" or not uses("flax.linen")
    assert parts[0] == "training" or not uses("orbax")
    assert parts[0] == "training" or not uses("optax")
    assert parts[0] == "data" or not uses("grain")
    assert parts[0] == "reporting" or not uses("matplotlib")
    assert parts == ("registration", "syn.py") or not uses("ants")


def test_files_are_read_without_jax():
    """Not even by way of another package: neither to read volumes nor to make batches' worker processes."""
    modules = [path for folder in ("io", "data") for path in sorted((PACKAGE / folder).glob("[!_]*.py"))]
    assert len(modules) >= 7
    modules += [PACKAGE.joinpath(*parts) for parts in METRICS]
    names = [f"dilformer_jax.{path.parent.name}.{path.stem}" for path in modules]
    code = f"import sys, {', '.join(names)}\n"
    code += "assert not {'jax', 'flax', 'grain'} & set(sys.modules)\n"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_are_declared(path):
    core = {canonicalize_name(requirement.name) for requirement in requirements("core")}
    optional = {canonicalize_name(requirement.name) for extra in EXTRAS for requirement in requirements(extra)}
    for module, at_once in third_party(path):
        allowed = core if at_once else core | optional
        assert distribution(module) in allowed, f"{module} is not declared in setup.cfg, or imported too early"


def test_nothing_is_declared_that_is_not_imported():
    used = {distribution(module) for path in MODULES for module, _ in third_party(path)}
    declared = {canonicalize_name(requirement.name) for kind in ("core", *EXTRAS) for requirement in requirements(kind)}
    assert declared == used


@pytest.mark.parametrize(
    "requirement",
    [requirement for kind in ("core", *SETUP["options.extras_require"]) for requirement in requirements(kind)],
    ids=lambda requirement: requirement.name,
)
def test_requirements_have_a_floor_and_no_ceiling(requirement):
    assert [specifier.operator for specifier in requirement.specifier] == [">="]
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return  # an extra that is not needed here
    assert installed in requirement.specifier


def test_the_lowest_python_is_the_same_everywhere():
    floor = "3.11"
    assert SETUP["options"]["python_requires"] == f">={floor}"
    versions = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
    assert versions[0] == floor
    ruff = tomllib.loads((ROOT / ".ruff.toml").read_text())
    assert ruff["target-version"] == "py" + floor.replace(".", "")
    # What is installed has not yet left it behind.
    for requirement in requirements("core"):
        needed = importlib.metadata.metadata(requirement.name)["Requires-Python"]
        assert needed is None or f"{floor}.0" in SpecifierSet(needed), f"{requirement.name} needs Python {needed}"


def test_the_commands_are_those_that_the_package_has():
    assert SETUP["options.entry_points"]["console_scripts"].split() == ["dilformer", "=", "dilformer_jax.__main__:main"]
    from dilformer_jax.__main__ import COMMANDS

    for command in COMMANDS:
        tree = ast.parse((PACKAGE / f"{command}.py").read_text())
        assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
