"""`dilformer doctor`: what it prints, what it warns of, its forecast of memory, and its registration."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dilformer_jax import cli, doctor
from dilformer_jax.io.volumes import BadInput
from dilformer_jax.registration import selftest
from dilformer_jax.reporting import packages
from dilformer_jax.training import forecast

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def ran(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Exit code and stdout; stderr is empty unless the code is 2."""
    with pytest.raises(SystemExit) as stop:
        doctor.main(["doctor", *argv])
    out, err = capsys.readouterr()
    assert (stop.value.code == 2) == bool(err) and "Traceback" not in err
    return int(stop.value.code or 0), out or err


def test_every_line_has_its_level_and_the_last_is_the_verdict(capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    monkeypatch.setattr(doctor, "unused", lambda *_: [])
    code, out = ran(capsys)
    *lines, verdict = out.splitlines()
    assert code == 0 and verdict == "verdict  1 warning"
    assert {line.split()[0] for line in lines} == {"ok", "warning"}
    assert f"jax {jax.__version__}, jaxlib" in out and "backend: cpu (4 devices, 1 process)" in out
    assert "simulates 4 devices" in out and os.environ["JAX_COMPILATION_CACHE_DIR"] in out


@pytest.mark.parametrize(
    ("environment", "plugin", "mend"),
    [
        ({}, False, "pip install 'jax[cuda13]'"),
        ({}, True, "JAX said on stderr"),
        ({"JAX_PLATFORMS": "cpu"}, False, "unset JAX_PLATFORMS"),
    ],
)
def test_a_gpu_that_is_not_used_is_told_of(monkeypatch, environment, plugin, mend):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(packages, "plugins", lambda: {"jax-cuda13-plugin": "0.10.2"} if plugin else {})
    ((level, text),) = doctor.unused("cpu", environment)
    assert level == "warning" and "NVIDIA GPU" in text and mend in text
    assert not list(doctor.unused("gpu", environment))


def test_a_tpu_that_is_not_used_is_told_of(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    found = dict(doctor.unused("cpu", {"TPU_NAME": "local"}))
    assert found["warning"].endswith("a TPU and JAX computes on the CPU: pip install 'jax[tpu]'")


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, "default, which takes 0.75 of the memory at once (nothing set)"),
        ({"XLA_CLIENT_MEM_FRACTION": ".5"}, "takes .5 of"),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, "allocator: default (XLA_PYTHON"),
        ({"JAX_PJRT_CLIENT_CREATE_OPTIONS": "allocator:cuda_async"}, "allocator: cuda_async (JAX_PJRT"),
    ],
)
def test_the_allocator_that_is_in_effect(environment, told):
    ((level, text),) = doctor.allocator("gpu", environment)
    assert level == "ok" and told in text


def test_an_allocator_that_does_nothing(monkeypatch):
    asked = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    for version, warned in (("0.10.0", False), ("0.10.1", True), ("0.10.2", True)):
        monkeypatch.setattr(doctor, "installed", lambda name, version=version: version)
        assert ("warning" in dict(doctor.allocator("gpu", asked))) == warned
    both = {"XLA_CLIENT_MEM_FRACTION": ".5", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}
    assert "unset XLA_PYTHON" in dict(doctor.allocator("gpu", both))["warning"]


def test_settings_that_change_results():
    with jax.default_matmul_precision("bfloat16"):
        told = [text for level, text in doctor.settings({"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"})]
    assert told[0].startswith("JAX_DEFAULT_MATMUL_PRECISION is bfloat16") and "fast_math" in told[1]
    assert len(told) == 3 and told[2] == "environment: nothing set for JAX"


def test_a_cache_that_keeps_nothing(tmp_path):
    ((level, text),) = doctor.cache({"JAX_COMPILATION_CACHE_DIR": ""})
    assert level == "warning" and text.endswith("unset it")
    (tmp_path / "a-cache").write_bytes(bytes(3 << 20))
    ((level, text),) = doctor.cache({"JAX_COMPILATION_CACHE_DIR": str(tmp_path)})
    assert level == "ok" and text.endswith("1 of them, 3.0 MiB")
    ((level, text),) = doctor.cache({"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "a-cache" / "under")})
    assert level == "warning" and "cannot be written" in text


@pytest.mark.parametrize(
    ("there", "needs", "told"),
    [
        ({"jaxlib": "0.9.1"}, {"jax": ["jaxlib<=0.10.2,>=0.10.1"]}, [("problem", "'jaxlib<=0.10.2,>=0.10.1'")]),
        ({"jaxlib": "0.10.1"}, {"jax": ["jaxlib<=0.10.2,>=0.10.1"]}, []),
        ({}, {"dilformer-jax": ["jax>=0.11", 'torch>=2; extra == "torch"']}, [("problem", "'jax>=0.11'")]),
        ({"jax": "0.9.2", "jaxlib": "0.9.2"}, {"flax": ["jax>=0.10.0"]}, [("problem", "'flax' 'jax>=0.10.0'")]),
        ({"matplotlib": None}, {}, [("warning", "dilformer-jax[plot]")]),
    ],
)
def test_packages_that_do_not_go_together(monkeypatch, there, needs, told):
    versions = dict.fromkeys((*packages.PACKAGES, "matplotlib", "dilformer-jax"), "0.10.2") | there
    monkeypatch.setattr(packages, "installed", versions.get)
    monkeypatch.setattr(packages.importlib.metadata, "requires", needs.get)
    monkeypatch.setattr(packages, "plugins", dict)
    wrong = [line for line in packages.versions() if line[0] != "ok" and "jax is" not in line[1]]
    assert len(wrong) == len(told)
    assert all(line[0] == level and mend in line[1] for line, (level, mend) in zip(wrong, told, strict=True))
    differ = [text for _, text in packages.versions() if "jax is" in text]
    assert bool(differ) == (versions["jax"] != versions["jaxlib"])


def test_a_plugin_of_another_version_and_a_package_that_does_not_start(monkeypatch, capsys):
    monkeypatch.setattr(packages, "plugins", lambda: {"jax-cuda13-plugin": "0.9.0"})
    assert "pip install --upgrade 'jax-cuda13-plugin==" in dict(packages.versions())["warning"]

    def started(name: str) -> None:
        if name == "flax.linen":
            raise AttributeError("module 'jax' has no attribute 'x'")

    monkeypatch.setattr(importlib, "import_module", started)
    code, out = ran(capsys, "--selftest")
    assert code == 1 and "selftest" not in out and out.endswith("verdict  1 problem, 1 warning\n")
    assert "AttributeError: module 'jax' has no attribute 'x'): pip install --upgrade 'jax' 'jaxlib' 'flax'" in out


@pytest.mark.parametrize(
    ("version", "bounds", "expected"),
    [
        ("0.10.2", ">=0.10", True),
        ("0.9.12", ">=0.10", False),
        ("0.10.2", "<=0.10.2,>=0.10.1", True),
        ("0.11.0.dev20260101+abc", ">=0.11", True),
        ("2.0", "==2.0.0", True),
        ("2.1", "!=2.1", False),
        ("1.0", "", True),
    ],
)
def test_within(version, bounds, expected):
    assert packages.within(version, bounds) == expected


# --- The forecast ---


def test_a_forecast_says_what_a_step_needs_and_what_makes_it_less(capsys, monkeypatch):
    """Told that the machine has hardly any memory; and of what a step surely has."""
    seen = []
    real = forecast.need
    # The remedies are compiled like the step itself, which takes long enough once.
    one = real(cli.load_config(f"{CONFIGS}/voxelmorph_lpba40_cpu.py:tiny"), (32, 32, 32))
    monkeypatch.setattr(forecast, "need", lambda config, *_: seen.append(config) or one)
    monkeypatch.setattr(doctor, "host_memory", lambda: 4 << 20)
    code, out = ran(capsys, "--config", f"{CONFIGS}/voxelmorph_lpba40_cpu.py:tiny", "--config.batch_size=8")
    assert code == 1 and "problem  a training step at 16x16x16 needs 0.0" in out and "--config.remat=True" in out
    assert [(c.remat, c.accumulate, c.space) for c in seen] == [
        (False, 1, 1),
        (True, 1, 1),
        (False, 2, 1),
        (False, 1, 4),
    ]
    # Parameters and two moments of each, in float32; two batches; a displacement at the images' resolution.
    config = seen[0]
    module = forecast.models.create(config.model.name, **config.model.options.to_dict())
    shape = jax.ShapeDtypeStruct((1, 32, 32, 32, 1), "float32")
    parameters = sum(x.size for x in jax.tree.leaves(jax.eval_shape(module.init, jax.random.key(0), shape, shape)))
    images = 2 * 2 * 4 * 32**3
    assert 0 <= one.held - 12 * parameters - images < 100
    assert one.temporary > 3 * 4 * 32**3 and one.volumes == 0
    assert one.total == one.held + one.temporary


def test_a_forecast_without_the_images(capsys, tmp_path):
    config = cli.load_config(f"{CONFIGS}/lpba40_cpu.py")
    config.data.directory = str(tmp_path / "gone")
    with pytest.raises(BadInput, match=r"gone does not exist, .* --shape 160 192 160"):
        forecast.images(config)
    assert forecast.images(config, (160, 192, 160)) == ((80, 96, 80), 0)
    code, out = ran(capsys, "--config", str(tmp_path / "none.py"))
    assert code == 2 and out.count("\n") == 1 and "does not exist" in out
    code, out = ran(capsys, "--confg=1")
    assert code == 2 and "closest is --config" in out


@pytest.mark.data
def test_a_forecast_reads_headers(shared_data):
    config = cli.load_config(f"{CONFIGS}/lpba40.py")
    config.data.directory = str(shared_data / "lpba40")
    (shape, count) = forecast.images(config)
    assert shape == (160, 192, 160) and count > 1


# --- The registration ---


def test_the_known_registration_is_found_again_and_another_is_noticed(capsys, monkeypatch, tmp_path):
    now = selftest.measured()
    monkeypatch.setattr(selftest, "measured", lambda: now)
    code, out = ran(capsys, "--selftest")
    assert code == 0 and out.count("selftest") == len(selftest.TOLERANCES)
    assert now["dice"] > now["dice_before"] + 0.2
    # Recorded, it is what it was; with a vector half a voxel longer, a figure that is none or other points it is not.
    monkeypatch.setattr(selftest, "GOLDEN", tmp_path / "golden.json")
    selftest.record(selftest.GOLDEN)
    then = selftest.stored()
    assert max(selftest.drift(now, then).values()) < 2e-5
    first, *others = then["displacement"]
    longer = [[first[0] + 0.5, *first[1:]], *others]
    for spoilt in ({"displacement": longer}, {"dice": float("nan")}, {"points": then["points"][::-1]}):
        selftest.GOLDEN.write_text(json.dumps(then | spoilt))
        code, out = ran(capsys, "--selftest")
        assert code == 1 and "problem  selftest" in out
    selftest.GOLDEN.unlink()
    with pytest.raises(BadInput, match=r"golden.json cannot be read"):
        selftest.stored()


def test_it_is_a_command_of_its_own():
    told = subprocess.run([sys.executable, "-m", "dilformer_jax", "doctor", "--help"], capture_output=True, text=True)
    assert told.returncode == 0 and "--selftest" in told.stdout
