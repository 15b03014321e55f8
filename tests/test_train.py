"""The training command: exact resumption, any number of devices, learning, and what it refuses."""

import json
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import training_runs as runs

from dilformer_jax import train
from dilformer_jax.data import folders, generated, pipeline
from dilformer_jax.io import bundle
from dilformer_jax.io.volumes import read_labels, write_labels
from dilformer_jax.training import checkpoint, logs, state


def test_a_killed_run_ends_as_one_never_killed(workdir: Path, tmp_path: Path, phantoms: Path) -> None:
    """Killed twice: before its first checkpoint, and between two checkpoints or while one is written."""
    again = tmp_path / "again"
    # What the first leaves: a log of the step at the start and of the one after it, and of a third but a half.
    again.mkdir()
    for name in ("config.json", "run.json"):
        shutil.copy(workdir / name, again)
    begun = (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:3]
    (again / "metrics.jsonl").write_bytes(b"".join(begun)[:-20])
    runs.kill(runs.start(runs.training(again, phantoms, *runs.WHOLE)), again, 7)
    assert runs.last_step(again) < runs.STEPS
    # At last from volumes on the device, which are the same.
    (told,) = runs.finish(runs.start(runs.training(again, phantoms, *runs.WHOLE, "--config.data.cache=device")))
    start = int(told.partition("from step ")[2].split()[0])
    assert start % 2 == 0 and 4 <= start < runs.STEPS
    assert (again / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()
    # Another 2 % of the bits could still hide in what is logged.
    ours, theirs = (checkpoint.restore_params(path, "latest") for path in (again, workdir))
    assert ours[1] == theirs[1] == runs.STEPS
    flat, expected = (bundle.flatten(params) for params, _ in (ours, theirs))
    assert {name: array.tobytes() for name, array in flat.items()} == {
        name: array.tobytes() for name, array in expected.items()
    }


def test_a_run_leaves_what_explains_it(workdir: Path, phantoms: Path) -> None:
    lines = logs.read(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, runs.STEPS + 1))
    validated = [line for line in lines if "dice" in line]
    assert [line["step"] for line in validated] == [0, 4, 8, 12]
    # Doing nothing, by the definition of Dice, on the one pair of two that is looked at.
    pair = generated.phantoms(phantoms, train=2, validation=2, shape=(32, 32, 32)).validation[0]
    fixed, moving = (read_labels(subject.labels).array for subject in (pair.fixed, pair.moving) if subject.labels)
    overlaps = [
        2 * ((fixed == label) & (moving == label)).sum() / ((fixed == label).sum() + (moving == label).sum())
        for label in range(1, 22)
    ]
    np.testing.assert_allclose([line["dice_identity"] for line in validated], np.mean(overlaps), rtol=1e-12)
    assert validated[0]["dice"] == validated[0]["dice_identity"]  # a fresh network is the identity
    for line in validated:
        assert {"displacement_p95", "folding_percent"} <= set(line)
    assert 0 < validated[-1]["regulariser_share"] < 1
    began = json.loads((workdir / "run.json").read_text())
    assert began["command"].startswith("python -m dilformer_jax.train --config ") and "jax" in began["versions"]
    assert began["grid"] == {
        "shape": [32, 32, 32],
        "spacing_mm": [1, 1, 1],
        "orientation": "RAS",
        "network_shape": [32, 32, 32],
    }
    shown = json.loads((workdir / "config.json").read_text())
    assert shown["batch_size"] == 1  # which 0 had stood for
    assert shown["total_steps"] == runs.STEPS and shown["model"]["options"]["width"] == 4
    assert (workdir / "figures" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert all(line["seconds"] > 0 for line in logs.read(workdir / "timing.jsonl"))


def test_one_and_four_devices_compute_the_same(devices: dict[int, Path]) -> None:
    one, four = (np.array(runs.losses(devices[count])) for count in (1, 4))
    assert len(one) == 5 and np.ptp(one) > 1e-3
    # Adam's first steps make much of a gradient near zero, and so of its rounding.
    np.testing.assert_allclose(four, one, rtol=0, atol=1e-4)
    np.testing.assert_allclose(four[:2], one[:2], rtol=0, atol=1e-6)
    of_first, of_second = (logs.read(devices[count] / "metrics.jsonl")[1] for count in (1, 4))
    for name in ("loss", "similarity", "regulariser"):
        assert of_second[name] == pytest.approx(of_first[name], rel=1e-5, abs=1e-9)
    # A fresh network's displacements are rounding, and a trilinear slope depends on which side of a voxel a point is.
    assert of_second["gradient_norm"] == pytest.approx(of_first["gradient_norm"], rel=1e-3)


VOXELMORPH, DILFORMER = "voxelmorph_lpba40_cpu", "lpba40_cpu"


def trained(monkeypatch: pytest.MonkeyPatch, workdir: Path, *overrides: str, config: str = VOXELMORPH) -> None:
    """The command, in this process, with a network that is soon compiled and the data as the overrides have them."""
    arguments = [
        "--config",
        f"{runs.ROOT}/configs/{config}.py:tiny",
        "--workdir",
        str(workdir),
        "--config.data.preprocessing.downsample=1",
    ]
    monkeypatch.setattr(sys, "argv", ["train", *arguments, *overrides])
    train.main()


def refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, workdir: Path, *overrides: str, **network: str
) -> str:
    """The one sentence that a user gets, by which the command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        trained(monkeypatch, workdir, *overrides, **network)
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.count("\n") == 1 and "Traceback" not in told
    return told


LEARNING = (
    "--config.data.name=pairs_csv",
    "--config.validation_pairs=0",
    "--config.total_steps=48",
    "--config.log_every=4",
    "--config.validate_every=48",
    "--config.checkpoint_every=48",
    "--config.optimiser.learning_rate=0.01",
    "--config.loss.regulariser_weight=1.0",
    "--config.data.flips=()",
    "--config.data.affine=0.0,0.0",
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """Names one pair to train on; to validate on, this pair and two others: one has no labels, one nothing in
    common."""
    folder = tmp_path_factory.mktemp("learnt")
    table = folder / "pair.csv"
    names = [f"{phantoms}/phantom_00{number}_{kind}.nii.gz" for kind in ("t1", "seg") for number in (0, 1)]
    other = read_labels(Path(names[3]))
    write_labels(folder / "others.nii.gz", np.where(other.array == 1, 50, 0).astype(np.int32), other)
    rows = [
        "fixed,moving,fixed_labels,moving_labels,split",
        ",".join([*names, "train"]),
        ",".join([*names, "validation"]),
        ",".join([names[1], names[0], "", "", "validation"]),
        ",".join([*names[:3], "others.nii.gz", "validation"]),
    ]
    table.write_text("\n".join(rows))
    return table


def test_a_network_learns_a_pair(table: Path, tmp_path: Path) -> None:
    """A Dilformer of plain blocks, in a process with one device, for which it is soon compiled."""
    config = runs.ROOT / "configs" / f"{DILFORMER}.py:tiny"
    settings = [f"--config.data.directory={table}", "--config.data.preprocessing.downsample=1", *LEARNING]
    network = [f"--config.model.options.{option}" for option in ("width=8", "msr=False", "dilformer=plain")]
    command = runs.command("train", "--config", config, "--workdir", tmp_path / "run", *settings, *network)
    runs.finish(runs.start(command))
    lines = logs.read(tmp_path / "run" / "metrics.jsonl")
    falling = [line["loss"] for line in lines if "loss" in line]
    assert len(falling) == 12 and falling[-1] < min(falling[0], 0) - 0.4
    first, last = [line for line in lines if "dice" in line]
    assert (first["step"], last["step"]) == (0, 48) and first["dice"] == first["dice_identity"] > 0.4
    # Of the only pair that has a Dice, the one trained on.
    assert last["dice"] > last["dice_identity"] + 0.02 and last["dice_identity"] == first["dice_identity"]
    assert 0.3 < last["displacement_p95"] < 4 and last["folding_percent"] < 1


def test_a_run_goes_on_only_as_it_began(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir, settings = tmp_path / "run", LEARNING[:1]
    data = f"--config.data.directory={table}"
    trained(monkeypatch, workdir, data, *settings)
    before = {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    for override, said in (
        ("--config.optimiser.learning_rate=0.02", "optimiser.learning_rate=0.001 and now is given 0.02"),
        # It was given as 0, one for each of these four devices.
        ("--config.batch_size=8", "batch_size=4 and now is given 8"),
    ):
        told = refusal(monkeypatch, capsys, workdir, data, *settings, override)
        assert said in told and str(workdir) in told
        assert {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()} == before
    # A pair more: its batches would be others from here on.
    more = shutil.copy(table, table.with_name("more.csv"))
    with more.open("a") as file:
        row = table.read_text().splitlines()[1].split(",")
        file.write("\n" + ",".join(row[column] for column in (1, 0, 3, 2, 4)))
    data = f"--config.data.directory={more}"
    told = refusal(monkeypatch, capsys, workdir, data, *settings)
    assert f"{workdir} was trained on 1 pairs and {more} now gives 2" in told
    assert {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()} == before
    # Where the data lie and how they are read is free to change; a finished run has nothing more to do.
    elsewhere = shutil.copy(table, table.with_name("elsewhere.csv"))
    free = (f"--config.data.directory={elsewhere}", "--config.data.workers=1")
    trained(monkeypatch, workdir, *settings, *free)
    assert (workdir / "metrics.jsonl").read_bytes() == before["metrics.jsonl"]
    assert json.loads((workdir / "config.json").read_text())["data"]["workers"] == 1


def test_a_run_starts_from_the_running_mean_of_another(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    short = (f"--config.{name}=8" for name in ("total_steps", "validate_every", "checkpoint_every"))
    settings = (f"--config.data.directory={table}", *LEARNING, *short, "--config.average=0.7")
    trained(monkeypatch, first, *settings)
    mean, step = checkpoint.restore_params(first)
    last = logs.read(first / "metrics.jsonl")[-1]
    assert last["step"] == step and last["dice"] != last["dice_identity"]
    # Of one checkpoint, the mean is not the parameters themselves.
    with checkpoint.Checkpoints(first / checkpoint.FOLDER) as checkpoints:
        saved = checkpoints._manager.restore(step)
    assert not np.array_equal(saved["params"]["head"]["Conv_0"]["bias"], mean["head"]["Conv_0"]["bias"])
    np.testing.assert_array_equal(saved["average"]["head"]["Conv_0"]["bias"], mean["head"]["Conv_0"]["bias"])
    # The same pair under other names.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    rows = table.read_text().splitlines()[:3]
    for path in {part for row in rows[1:] for part in row.split(",")[:4]}:
        shutil.copy(path, elsewhere / f"other_{Path(path).name}")
        rows = [row.replace(path, f"other_{Path(path).name}") for row in rows]
    (elsewhere / "pairs.csv").write_text("\n".join(rows))
    started = (*settings, f"--config.data.directory={elsewhere / 'pairs.csv'}", f"--config.start_from={first}")
    trained(monkeypatch, second, *started)
    begun = logs.read(second / "metrics.jsonl")[0]
    assert (begun["step"], begun["dice"]) == (0, last["dice"])
    # What the first has seen the second has, which is trained on another pair; so has one that goes on.
    subjects = lambda path: json.loads((path / "run.json").read_text())["subjects"]
    assert {*subjects(second)["trained"]} > {*subjects(first)["trained"]} and len(subjects(first)["trained"]) == 2
    assert {*subjects(second)["chosen_by"]} > {*subjects(first)["chosen_by"]}
    assert (subjects(first)["others"], subjects(second)["others"]) == ([], ["pairs_csv"])
    before = subjects(second)
    shutil.rmtree(first)
    trained(monkeypatch, second, *started)  # finished: what it began with may be gone
    trained(monkeypatch, second, *started, "--config.start_from=")
    assert subjects(second) == before
    assert json.loads((second / "config.json").read_text())["start_from"] == str(first)
    told = refusal(monkeypatch, capsys, tmp_path / "third", *started)
    assert f"config.start_from {first} does not exist; give a bundle" in told
    one_way = ("--config.loss.inverse_weight=0.1", "--config.bidirectional=False")
    assert "compares both directions" in refusal(monkeypatch, capsys, tmp_path / "third", *settings, *one_way)
    wider = "--config.model.options.final=(3,)"
    told = refusal(monkeypatch, capsys, tmp_path / "third", *settings, f"--config.start_from={second}", wider)
    assert f"config.start_from {second}: the parameters to start from have Conv_4/bias of 4 where" in told
    told = refusal(monkeypatch, capsys, tmp_path / "third", *settings, "--config.average=1.0")
    assert "average is 1.0; make it 0, for none, or less than 1" in told
    assert not (tmp_path / "third").exists()


def test_a_loss_that_is_no_number_names_the_pairs(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Rises to 1e30 after the first step, whose rate is 0, so that the third step's displacement is infinite.
    overrides = ("--config.data.name=folder", f"--config.data.directory={phantoms}")
    told = refusal(monkeypatch, capsys, tmp_path / "run", *overrides, "--config.optimiser.learning_rate=1e30")
    step = int(told.partition(" at step ")[2].split(",")[0])
    assert step in (2, 3, 4) and "a lower optimiser.learning_rate than 1e+30" in told
    pairs = folders.folder(phantoms).train
    stream = pipeline.batches(pairs, {"crop_to": (32, 32, 32)}, batch_size=4, seed=0, start_step=step - 1)
    with stream as batches:
        names = ", ".join(pairs[index].name for index in next(batches)["index"])
    assert f"on {names};" in told
    assert runs.last_step(tmp_path / "run") == step - 1


def test_a_gradient_that_is_no_number_is_not_kept(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss before it is sound, and the parameters after it are not."""

    def step_function(*_, **__):
        measured = {"loss": 0.5, "regulariser_share": 0.1}

        def step(now, batch):
            # eval_shape, which looks at the shapes beforehand, has no number to look at.
            spoilt = jnp.where(now.step == 3, jnp.nan, 1.0)
            return now.replace(step=now.step + 1), measured | {"gradient_norm": spoilt}

        return step

    monkeypatch.setattr(state, "step_function", step_function)
    data = ("--config.data.name=folder", f"--config.data.directory={phantoms}")
    told = refusal(monkeypatch, capsys, tmp_path / "run", *data)
    assert told.startswith("The gradient norm is nan at step 4, on phantom_")
    assert checkpoint.restore_params(tmp_path / "run", "latest")[1] == 2


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--config.batch_size=3"], "batch_size 3 does not divide among 4 devices"),
        (["--config.accumulate=0"], "accumulate is 0; make it 1 or more"),
        (
            ["--config.batch_size=4", "--config.accumulate=2"],
            "batch_size 4 on 4 devices does not divide into accumulate=2",
        ),
        (["--config.log_every=3"], "validate_every is 4 and log_every 3; make it a multiple"),
        (["--config.validate_every=6", "--config.log_every=3"], "checkpoint_every is 2 and log_every 3"),
        (["--config.data.name=lpba41"], "config.data.name is 'lpba41'; give one of lpba40, "),
        (["--config.data.preprocessing.crop_to=30,32,32"], "(30, 32, 32) voxels and voxelmorph needs multiples of 4"),
        (["--config.data.preprocessing.downsample=3"], "preprocessing.downsample is 3"),
        (["--config.model.name=voxelmorph3"], "config.model: There is no network 'voxelmorph3'"),
        (["--config.model.name=dilformer"], "config.model: The network dilformer has no option 'down'"),
        (["--config.optimiser.schedule=linear"], "optimiser.schedule is 'linear'; give 'cosine' or 'constant'"),
        (["--config.optimiser.warmup_steps=4"], "optimiser.warmup_steps is 4 of 4 steps"),
        (["--config.data.directory=nowhere"], "nowhere does not exist"),
        (["--config.seed=-1"], "seed is -1"),
        (["--config.log_every=0"], "log_every"),
        (["--config.loss.windows=4"], "An LNCC window has an odd number of voxels, got 4"),
        (["--config.loss.similarity=ncc"], "'ncc'"),
        (["--config.loss.windows=5,3"], "1 weights and 2 windows"),
        (["--config.loss.windows=-1"], "An LNCC window has an odd number of voxels, got -1"),
        (["--config.loss.finest=-1"], "The finest level of a loss is 0, the input's, or coarser, got -1"),
        (["--config.validation_pairs=-1"], "validation_pairs is -1"),
        (["--config.data.workers=-1"], "data.workers is -1"),
        (["--config.optimiser.warmup_steps=-1"], "optimiser.warmup_steps is -1"),
        (["--config.optimiser.learning_rate=0"], "optimiser.learning_rate is 0.0; make it positive"),
        (["--config.model.options.up=4,4,4"], "config.model: VoxelMorph goes up as often as down"),
    ],
    ids=lambda value: value[0].removeprefix("--config.") if isinstance(value, list) else "",
)
def test_what_cannot_be_trained(
    phantoms: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    said: str,
) -> None:
    data = ("--config.data.name=folder", f"--config.data.directory={phantoms}")
    assert said in refusal(monkeypatch, capsys, tmp_path / "run", *data, *overrides)
    assert not list(tmp_path.iterdir())


def test_heads_that_do_not_divide_the_channels(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What only the network's blocks can know."""
    data = ("--config.data.name=folder", f"--config.data.directory={phantoms}", "--config.model.options.width=5")
    told = refusal(monkeypatch, capsys, tmp_path / "run", *data, config=DILFORMER)
    assert "config.model: 4 attention heads do not divide a width of 10 channels" in told
    assert not list(tmp_path.iterdir())


def test_options_of_another_data_set_are_named(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """demo.py has those of the phantoms."""
    data = ["--config.data.name=folder", f"--config.data.directory={phantoms}"]
    with pytest.raises(SystemExit) as stop:
        train.cli.run(
            train.train, ["train", f"--config={runs.ROOT}/configs/demo.py:tiny", f"--workdir={tmp_path}/run", *data]
        )
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.count("\n") == 1 and "config.data.options" in told
    assert not list(tmp_path.iterdir())
