import argparse
import subprocess
import sys

import pytest

from dilformer_jax import __main__, cli
from dilformer_jax.io.volumes import BadInput

CONFIG = """
from ml_collections import ConfigDict

def get_config(argument="full"):
    config = ConfigDict()
    config.total_steps = 100 if argument == "full" else 3
    config.bidirectional = True
    config.labels = (1, 2)
    config.cache = None
    config.model = {"name": "dilformer", "options": {"width": 16, "scale": 0.5}}
    return config
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(CONFIG)
    return path


def ran(argv):
    """What `run` gives the entry point."""
    got = []
    cli.run(lambda config, workdir: got.append((config, workdir)), ["train", *map(str, argv)])
    return got[0]


def refusal(capsys, argv):
    """The one sentence with which `run` refuses."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda config, workdir: pytest.fail("must not run"), ["train", *map(str, argv)])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_run_gives_config_and_workdir(config, tmp_path):
    given, workdir = ran(["--config", config, "--workdir", tmp_path / "run"])
    assert workdir == tmp_path / "run"
    assert given.total_steps == 100
    assert given.is_locked


def test_run_overrides_values_of_every_type(config):
    overrides = ["--config.total_steps=7", "--config.model.options.scale", "-2.5", "--noconfig.bidirectional"]
    overrides += ["--config.labels=3,4,5", "--config.model.name=voxelmorph2"]
    given, _ = ran([*overrides[:1], f"--config={config}:tiny", "--workdir=run", *overrides[1:]])
    assert given.total_steps == 7
    assert given.model.options.scale == -2.5
    assert given.bidirectional is False
    assert given.labels == (3, 4, 5)
    assert given.model.name == "voxelmorph2"
    assert given.model.options.width == 16


def test_config_argument_reaches_get_config_and_runs_do_not_share_flags(config):
    first, _ = ran(["--config", f"{config}:tiny", "--workdir", "run", "--config.model.options.width=8"])
    second, _ = ran(["--config", f"{config}:tiny", "--workdir", "run", "--config.model.options.width=9"])
    assert (first.total_steps, first.model.options.width) == (3, 8)
    assert (second.total_steps, second.model.options.width) == (3, 9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config.nope=1"], ["experiment.py", "'nope'", "closest"]),
        (["--config.totl_steps=1"], ["'totl_steps'", "closest is total_steps"]),
        (["--config.model.options.widht=1"], ["'model.options.widht'", "closest is model.options.width"]),
        (["--config.total_steps.more=1"], ["'total_steps.more'"]),
        (["--config.total_steps=1.5"], ["--config.total_steps=1.5", "not a whole number"]),
        (["--config.model.options.scale=wide"], ["--config.model.options.scale=wide", "not a number"]),
        (["--config.bidirectional=perhaps"], ["--config.bidirectional=perhaps", "not true or false"]),
        (["--config.model=5"], ["--config.model=5", "not a dictionary"]),
        (["--config.cache=here"], ["--config.cache", "experiment.py"]),
        (["--config.total_steps"], ["config.total_steps"]),
        (["--wrokdir=x"], ["--wrokdir", "closest is --workdir"]),
        (["stray"], ["'stray'"]),
    ],
)
def test_usage_errors_are_one_sentence(config, capsys, arguments, said):
    error = refusal(capsys, ["--config", config, "--workdir", "run", *arguments])
    for word in said:
        assert word in error


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("def get_config(:\n", "SyntaxError"),
        ("import no_such_module\n", "no_such_module"),
        ("def get_config():\n    raise ValueError('two\\nlines')\n", "two lines"),
        ("def get_config():\n    return {}\n", "ConfigDict"),
        ("config = 1\n", "get_config"),
    ],
)
def test_broken_config_is_one_sentence(tmp_path, capsys, content, said):
    path = tmp_path / "broken.py"
    path.write_text(content)
    error = refusal(capsys, ["--config", path, "--workdir", "run"])
    assert "broken.py" in error
    assert said in error


def test_missing_flags_and_files_are_one_sentence(config, tmp_path, capsys):
    assert "nowhere.py" in refusal(capsys, ["--config", tmp_path / "nowhere.py", "--workdir", "run"])
    assert "--workdir" in refusal(capsys, ["--config", config])
    assert "--config" in refusal(capsys, ["--workdir", "run"])
    assert "is a file" in refusal(capsys, ["--config", config, "--workdir", config])


def test_argument_without_parameter_is_one_sentence(tmp_path, capsys):
    path = tmp_path / "plain.py"
    path.write_text("def get_config():\n    pass\n")
    assert "plain.py:tiny" in refusal(capsys, ["--config", f"{path}:tiny", "--workdir", "run"])


def test_bad_input_of_the_entry_point_and_other_errors(config, capsys):
    def bad(config, workdir):
        raise BadInput("a.nii.gz is 4-D; give one 3-D volume.")

    def bug(config, workdir):
        raise ValueError("a fault of ours")

    with pytest.raises(SystemExit) as stop:
        cli.run(bad, ["train", f"--config={config}", "--workdir=run"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "a.nii.gz is 4-D; give one 3-D volume.\n"
    with pytest.raises(ValueError, match="a fault of ours"):
        cli.run(bug, ["train", f"--config={config}", "--workdir=run"])


def test_run_arguments(capsys):
    parser = cli.Arguments("register")
    parser.add_argument("--fixed", required=True)
    parser.add_argument("--refine", type=int, default=0)
    got = []
    cli.run_arguments(got.append, parser, ["register", "--fixed", "a.nii", "--refine", "3"])
    assert got == [argparse.Namespace(fixed="a.nii", refine=3)]
    for argv, said in (
        (["--fixed", "a", "--refien=1"], "closest is --refine"),
        (["--fixed", "a", "--refine=x"], "--refine"),
        ([], "--fixed"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.run_arguments(got.append, parser, ["register", *argv])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_dispatch_hands_over_the_arguments(monkeypatch, capsys):
    seen = []

    class Entry:
        @staticmethod
        def main():
            seen.append(list(sys.argv))

    monkeypatch.setitem(sys.modules, "dilformer_jax.export", Entry)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/dilformer", "export", "--workdir", "run"])
    __main__.main()
    assert seen == [["dilformer export", "--workdir", "run"]]

    monkeypatch.setattr(sys, "argv", ["dilformer", "--help"])
    __main__.main()
    out = capsys.readouterr().out
    assert all(any(line.split()[:1] == [name] for line in out.splitlines()) for name in __main__.COMMANDS)

    monkeypatch.setattr(sys, "argv", ["dilformer", "trian"])
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("dilformer has no command 'trian'; it has train, ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("dispatched", [False, True])
def test_help_and_mistyped_options_import_little(dispatched):
    """What imports JAX, SciPy's parts or Matplotlib takes seconds."""
    code = f"""
import contextlib, importlib, io, sys
from dilformer_jax import __main__
for name in __main__.COMMANDS:
    for option, code in ("--help", 0), ("--hlep", 2):
        if {dispatched}:
            sys.argv, main = ["dilformer", name, option], __main__.main
        else:
            sys.argv, main = [name, option], importlib.import_module("dilformer_jax." + name).main
        with contextlib.redirect_stdout(io.StringIO()) as told:
            try:
                main()
            except SystemExit as stop:
                assert stop.code == code, (name, option)
        assert ("usage: " in told.getvalue()) == (code == 0)
sys.argv = ["dilformer"]
__main__.main()
heavy = {{"jax", "flax", "optax", "orbax", "grain", "matplotlib"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: dilformer COMMAND" in done.stdout
