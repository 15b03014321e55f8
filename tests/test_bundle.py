"""Bundles: bit for bit, readable by others, and refused when something is wrong with them."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dilformer_jax.io import bundle
from dilformer_jax.io.folders import staged
from dilformer_jax.io.volumes import BadInput

DESCRIPTION = {
    "network": {"name": "dilformer", "options": {"width": 8}},
    "preprocessing": {"normalise": "max"},
    "grid": {"shape": [160, 192, 160], "spacing_mm": [1, 1, 1], "orientation": "LPS"},
    "labels": [21, 22],
    "training": {"dataset": "phantoms", "licence": "Apache-2.0", "steps": 7, "seed": 3},
    "validation": {"dice": 0.5},
    "versions": {"jax": "1"},
}
# Quiet and signalling NaN, -0, a denormal, infinity, and numbers without a short decimal.
ODD = np.array([0x7FC00001, 0x7FA00000, 0x80000000, 0x00000001, 0x7F800000, 0x3DCCCCCD], np.uint32).view(np.float32)


def params() -> dict:
    rng = np.random.default_rng(0)
    return {
        "encoder": {"level0": {"kernel": rng.normal(size=(3, 4, 5)).astype(np.float32).T, "bias": ODD}},
        "head": {"scale": np.array(2.5, np.float16), "steps": np.array([1, -(2**40)]), "used": np.array([True, False])},
        "level10": np.zeros((0, 3), np.float32),
        "level2": jnp.arange(3, dtype=jnp.uint8),
    }


def same_bits(a, b) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_round_trip_is_bit_exact(tmp_path: Path):
    described = bundle.save(tmp_path / "new" / "weights", params(), DESCRIPTION)
    loaded, description = bundle.load(tmp_path / "new" / "weights")
    assert description == described
    assert {key: description[key] for key in DESCRIPTION} == DESCRIPTION
    assert description["parameters"] == 60 + 6 + 1 + 2 + 2 + 0 + 3
    before, after = bundle.flatten(params()), bundle.flatten(loaded)
    assert list(before) == list(after)
    assert all(same_bits(before[name], after[name]) for name in before)
    assert same_bits(loaded["encoder"]["level0"]["kernel"], params()["encoder"]["level0"]["kernel"])
    loaded["head"]["steps"][0] = 5  # not read-only
    assert not list((tmp_path / "new").glob(".*")), "a temporary folder was left behind"


def test_every_way_to_name_a_bundle(tmp_path: Path):
    bundle.save(tmp_path, params(), DESCRIPTION)
    for name in ("", "model.json", "model.safetensors"):
        assert same_bits(bundle.load(tmp_path / name)[0]["encoder"]["level0"]["bias"], ODD)
    for suffix in (".json", ".safetensors"):
        (tmp_path / f"model{suffix}").rename(tmp_path / f"mine{suffix}")
    assert same_bits(bundle.load(tmp_path / "mine.json")[0]["encoder"]["level0"]["bias"], ODD)


def test_files_are_read_by_other_programs_without_jax(tmp_path: Path):
    bundle.save(tmp_path, params(), DESCRIPTION)
    code = """
import hashlib, importlib.util, json, sys
sys.modules.update(jax=None, jaxlib=None, flax=None)
import numpy, safetensors.numpy
arrays, zipped = safetensors.numpy.load_file("model.safetensors"), numpy.load("model.npz")
assert sorted(arrays) == sorted(zipped.files) and "encoder/level0/kernel" in arrays, sorted(arrays)
for name, array in arrays.items():
    assert array.dtype == zipped[name].dtype and array.tobytes() == zipped[name].tobytes(), name
description = json.load(open("model.json"))
assert description["sha256"] == hashlib.sha256(open("model.safetensors", "rb").read()).hexdigest()
spec = importlib.util.spec_from_file_location("bundle", sys.argv[1])
bundle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bundle)
params, _ = bundle.load(".")
print(params["encoder"]["level0"]["kernel"].shape)
"""
    command = [sys.executable, "-c", code, bundle.__file__]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=_path())
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(5, 4, 3)"


def test_sha256_is_that_of_the_file(tmp_path: Path):
    assert bundle.sha256(params()) == bundle.save(tmp_path, params(), DESCRIPTION)["sha256"]
    changed = params()
    changed["encoder"]["level0"]["bias"] = -ODD  # also of NaN, the sign is a bit
    assert bundle.sha256(changed) != bundle.sha256(params())


def test_changed_parameters_are_refused(tmp_path: Path):
    bundle.save(tmp_path, params(), DESCRIPTION)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BadInput, match=r"model\.safetensors is not the file that model\.json describes"):
        bundle.load(tmp_path)
    safetensors.numpy.save_file({"another": np.zeros(3, np.float32)}, file)
    with pytest.raises(BadInput, match="sha256"):
        bundle.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("nowhere", None, "nowhere does not exist"),
        ("nowhere.safetensors", None, "does not exist"),
        ("folder", None, "has no model.json"),
        ("weights.h5", b"x", "is a .h5"),
        ("model.json", b"not json", "is no JSON"),
        ("model.json", b"\xff\xfe", "is no JSON"),
        ("model.json", b"[1]", "is no description of a bundle"),
        ("model.json", json.dumps({**DESCRIPTION}).encode(), "no sha256"),
        ("model.json", json.dumps({**DESCRIPTION, "sha256": "0"}).encode(), "model.safetensors does not exist"),
    ],
)
def test_what_is_no_bundle_is_refused(tmp_path: Path, name: str, content: bytes | None, found: str):
    (tmp_path / "folder").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=found):
        bundle.load(tmp_path / name)


def test_saving_again_replaces_all_or_nothing(tmp_path: Path):
    bundle.save(tmp_path, params(), DESCRIPTION)
    (tmp_path / "notes.txt").write_text("mine")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="Out of range float values"):
        bundle.save(tmp_path, {"a": np.zeros(2, np.float32)}, {**DESCRIPTION, "validation": {"dice": float("nan")}})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    bundle.save(tmp_path, {"a": np.zeros(2, np.float32)}, DESCRIPTION)
    assert list(bundle.load(tmp_path)[0]) == ["a"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_a_bundle_cannot_hold(tmp_path: Path):
    with pytest.raises(ValueError, match="head is bfloat16"):
        bundle.save(tmp_path / "a", {"head": jnp.zeros(2, jnp.bfloat16)}, DESCRIPTION)
    with pytest.raises(ValueError, match="'a/b'"):
        bundle.save(tmp_path / "a", {"a/b": np.zeros(2, np.float32)}, DESCRIPTION)
    with pytest.raises(ValueError, match="grid, labels is missing"):
        bundle.save(
            tmp_path / "a", {}, {key: value for key, value in DESCRIPTION.items() if key not in ("grid", "labels")}
        )
    assert not list(tmp_path.iterdir())


def test_staged_output_is_whole_or_absent(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="file is a file"), staged(tmp_path / "file"):
        pass
    with pytest.raises(BadInput, match="cannot be written"), staged(tmp_path / "file" / "below"):
        pass
    with pytest.raises(KeyError), staged(tmp_path / "deep" / "output") as folder:
        (folder / "half").write_text("x")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

    # A folder is in the way of the second file: the first is not written either.
    output = tmp_path / "output"
    (output / "b").mkdir(parents=True)
    (output / "a").write_text("old")
    with pytest.raises(BadInput, match="output/b is a folder where a file"), staged(output) as folder:
        (folder / "a").write_text("new"), (folder / "b").write_text("new")
    assert (output / "a").read_text() == "old" and len(list(output.iterdir())) == 2


def test_what_an_earlier_run_left_is_not_taken_for_this_ones(tmp_path: Path):
    for name in ("report", "notes", "field"):
        (tmp_path / name).write_text("old")
    with pytest.raises(KeyError), staged(tmp_path, ("report", "field")):
        raise KeyError
    assert (tmp_path / "report").read_text() == "old"
    with staged(tmp_path, ("report", "field")) as folder:
        (folder / "field").write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"notes": "old", "field": "new"}


def _path() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(Path(bundle.__file__).parents[2])}
