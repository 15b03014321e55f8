"""Every configuration of configs/: each of its keys is known to the code, and its `:tiny` trains."""

import ast
import functools
import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
import training_runs as runs
from ml_collections import ConfigDict  # type: ignore[import-untyped]

from dilformer_jax import cli, models, train
from dilformer_jax.data.ixi import IXI_LABELS
from dilformer_jax.data.preprocessing import resolved
from dilformer_jax.data.sources import DATASETS
from dilformer_jax.data.synthesis import OPTIONS, STRUCTURES
from dilformer_jax.ops import losses
from dilformer_jax.registration.predictor import keywords
from dilformer_jax.training import feeding, logs, parallel, state

CONFIGS = sorted((runs.ROOT / "configs").glob("*.py"))
# Of the images as they reach the network.
SHAPES = {
    "demo": (64, 80, 64),
    "ixi": (160, 192, 224),
    "ixi_2mm": (80, 96, 112),
    "lpba40": (160, 192, 160),
    "lpba40_cpu": (80, 96, 80),
    "lpba40_diffeomorphic": (160, 192, 160),
    "lpba40_labels": (160, 192, 160),
    "synthseg": (160, 192, 160),
    "voxelmorph_lpba40_cpu": (80, 96, 80),
}
each = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
tiny_too = pytest.mark.parametrize("argument", ["", ":tiny"], ids=["whole", "tiny"])
# Whose `:tiny` is trained below, wherever the tests run.
TRAINED = {"ixi", "synthseg"}


def leaves(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {prefix + key: value}
    return found


def size(config: ConfigDict, stem: str) -> tuple[int, ...]:
    """What a network of this configuration sees; `:tiny` says it by itself."""
    box = config.data.preprocessing.get("crop_to") or config.data.options.get("shape")
    return tuple(n // config.data.preprocessing.downsample for n in box) if box else SHAPES[stem]


def test_every_configuration_is_tested() -> None:
    assert {path.stem for path in CONFIGS} == set(SHAPES)


@each
def test_a_configuration_explains_itself(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"python -m dilformer_jax.train --config configs/{path.name} --workdir runs/" in text
    assert ":tiny" in text
    config = cli.load_config(str(path))
    json.loads(config.to_json_best_effort())  # as config.json is written


@each
def test_an_unknown_argument_is_refused(path: Path) -> None:
    get_config: Any = {}
    exec(compile(path.read_text(), path, "exec"), get_config)
    with pytest.raises(ValueError, match="knows the argument 'tiny', not 'tyni'"):
        get_config["get_config"]("tyni")
    with pytest.raises(cli.BadInput, match=f"{path.name}:tyni fails with ValueError"):
        cli.load_config(f"{path}:tyni")


@each
def test_tiny_differs_only_in_size(path: Path) -> None:
    whole, tiny = (leaves(cli.load_config(f"{path}{argument}")) for argument in ("", ":tiny"))
    assert whole.keys() == tiny.keys()
    changed = {key for key in whole if whole[key] != tiny[key]}
    assert changed <= {
        "total_steps", "log_every", "validate_every", "checkpoint_every", "validation_pairs", "optimiser.warmup_steps",
        "start_from",
        "model.options.width", "model.options.levels", "model.options.down", "model.options.up", "model.options.final",
        "data.preprocessing.crop_to", "data.options.train", "data.options.validation", "data.options.shape",
        "loss.weights", "loss.windows",
    }  # fmt: skip
    assert tiny["total_steps"] <= 4


@each
def test_every_key_is_read_by_the_code(path: Path) -> None:
    """The loop names what it reads as `config.KEY`; the rest are keyword arguments of the functions named here."""
    config = cli.load_config(str(path))
    tree = ast.parse((runs.ROOT / "dilformer_jax" / "train.py").read_text())
    named = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    function = DATASETS[config.data.name]
    parameters = lambda function: {f"{name}" for name in inspect.signature(function).parameters}
    known = {
        "model.options.": set(models.MODELS[config.model.name].__dataclass_fields__) - {"parent", "name"},
        "data.options.synthesis.": set(OPTIONS),
        "data.options.": parameters(function) - {"directory"},
        "data.preprocessing.": set(resolved({})),
        "loss.": parameters(state.losses.multi_resolution)
        - {"fixed", "moving", "displacements", "fixed_labels", "moving_labels"},
        "optimiser.": parameters(state.optimiser) - {"total_steps"},
    }
    for key in leaves(config):
        section = next((prefix for prefix in known if key.startswith(prefix)), None)
        if section is None:
            assert f"config.{key}" in named, key
        else:
            assert key.removeprefix(section) in known[section], key


@each
@tiny_too
def test_a_step_can_be_made_of_it(path: Path, argument: str, one_form: None) -> None:
    """Traced in the shapes that it will have, without computing or compiling anything."""
    config = cli.load_config(f"{path}{argument}")
    module = models.create(config.model.name, **keywords(config.model.options.to_dict()))
    shape = size(config, path.stem)
    assert not any(n % module.downsampling for n in shape)
    image = jax.ShapeDtypeStruct((len(jax.devices()), *shape, 1), jnp.float32)
    # Each level of the loss has images that can be averaged down to it, and a window that fits into them.
    levels = len(config.loss.weights) + config.loss.finest - 1
    assert not any(n % 2**levels for n in shape)
    assert all(min(shape) // 2**level >= w for level, w in enumerate(config.loss.windows, config.loss.finest))
    # What a loop over these steps needs.
    assert not config.validate_every % config.log_every and not config.checkpoint_every % config.log_every
    assert resolved(config.data.preprocessing.to_dict())
    if argument and path.stem in TRAINED:
        return
    small = jax.ShapeDtypeStruct((1, *3 * (2 * module.downsampling,), 1), jnp.float32)
    state.optimiser(total_steps=config.total_steps, **config.optimiser.to_dict())
    made, labelled = config.data.name == "label_maps", "label_weight" in config.loss
    assert not made or config.loss.label_count == len(STRUCTURES)
    batch = feeding.shapes(image, made=made, labelled=labelled)
    parts = {"similarity", "regulariser"} | ({"overlap"} if labelled else set())
    if not argument:
        params = jax.eval_shape(module.init, jax.random.key(0), small, small)["params"]

        # The loss at its size; the gradient, whose trace takes three times as long, is that of `:tiny`.
        def loss(params: Any, batch: Any) -> Any:
            displacements = module.apply({"params": params}, batch["fixed"], batch["moving"])
            labels = {name: batch[name] for name in batch if name.endswith("_labels")}
            images = batch["fixed"], batch["moving"], displacements
            return losses.multi_resolution(*images, **config.loss.to_dict(), **labels)

        assert set(jax.eval_shape(loss, params, batch)[1]) == parts
        return
    options = keywords(config.model.options.to_dict())
    loss = config.loss.to_dict() | {"regulariser_weight": 1.0}  # a factor
    assert traced(config.model.name, repr((options, loss)), config.bidirectional, labelled) == parts | {
        "loss",
        "regulariser_share",
        "gradient_norm",
    }


@functools.cache
def traced(name: str, settings: str, bidirectional: bool, labelled: bool) -> set[str]:
    """What a step measures that is traced, once for all configurations that differ only in data and numbers."""
    options, loss = ast.literal_eval(settings)
    module = models.create(name, **options)
    transformation = state.optimiser(learning_rate=1e-3, warmup_steps=1, total_steps=4, schedule="cosine", clip=1.0)
    small = jax.ShapeDtypeStruct((1, *3 * (2 * module.downsampling,), 1), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), small, small)["params"]
    image = jax.ShapeDtypeStruct((len(jax.devices()), 32, 32, 32, 1), jnp.float32)
    step = state.step_function(module, transformation, loss, bidirectional=bidirectional, mesh=parallel.mesh())

    def advanced(params: Any, batch: Any) -> Any:
        after, measured = step(state.State(jnp.zeros((), jnp.int32), params, transformation.init(params)), batch)
        return after.params, measured

    after, measured = jax.eval_shape(advanced, params, feeding.shapes(image, made=False, labelled=labelled))
    of_leaf = lambda leaf: (leaf.shape, leaf.dtype)
    assert jax.tree.map(of_leaf, after) == jax.tree.map(of_leaf, params)
    return set(measured)


TRAINING = """
import sys
from pathlib import Path
from dilformer_jax import cli, train
for item in sys.argv[1:]:
    source, directory, workdir = item.split("|")
    config = cli.load_config(source)
    config.data.directory = directory
    config.total_steps, config.validate_every, config.checkpoint_every = 2, 2, 2
    # As `training_runs.ONE_LEVEL`, with the regulariser of most: the step of the network itself is traced above.
    config.model.options.levels, config.model.options.finest = 1, 1
    config.loss.weights, config.loss.windows, config.loss.regulariser_weight = (1.0,), (5,), 1.0
    train.train(config, Path(workdir))
"""


def train_all(*items: tuple[str, Path, Path]) -> None:
    """Two steps of each (configuration, data, workdir), in one process, where compiling does not take long."""
    arguments = ["|".join(map(str, (f"{runs.ROOT / 'configs' / name}:tiny", *paths))) for name, *paths in items]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", TRAINING, *arguments],
        text=True,
        capture_output=True,
        env=runs.environment(),
        timeout=runs.TIMEOUT,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def check(workdir: Path, lowest: float, highest: float, *, highest_loss: float = -0.01) -> None:
    """Two steps are logged, and the Dice before them is that of brains."""
    lines = logs.read(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 2]
    # Not equal: `crop_to` cuts each brain around its own middle, and a fresh network lays these onto each other.
    assert lowest < lines[0]["dice_identity"] < highest and lowest < lines[0]["dice"] < highest
    assert all(-2 < line["loss"] < highest_loss for line in lines[1:3])
    assert lines[-1]["displacement_p95"] > 0


def test_demo_trains(workdir: Path) -> None:
    """By its own command, for as many steps as the other tests ask for, and as one level; the step of its own network
    is traced above."""
    assert len(runs.losses(workdir)) == runs.STEPS
    assert logs.read(workdir / "metrics.jsonl")[0]["dice_identity"] == pytest.approx(0.5174, abs=2e-3)


def test_ixi_trains(tmp_path: Path) -> None:
    """On four brains, and an atlas, in the layout and the types that TransMorph's archive has."""
    from dilformer_jax.data.phantoms import phantom

    ids = np.array([0, *IXI_LABELS], np.int16)
    for number, name in enumerate(("atlas", "Train/subject_1", "Train/subject_2", "Val/subject_3")):
        path = tmp_path / "data" / f"{name}.pkl"
        path.parent.mkdir(parents=True, exist_ok=True)
        image, labels = phantom(number, (32, 40, 36))
        path.write_bytes(pickle.dumps((image.astype(np.float64), ids[labels])))
    train_all(("ixi.py", tmp_path / "data", tmp_path / "run"))
    check(tmp_path / "run", 0.3, 0.8)


def test_synthseg_trains(tmp_path: Path) -> None:
    """On images made of the label maps of six phantoms."""
    from dilformer_jax.data.phantoms import phantom

    (tmp_path / "data").mkdir()
    ids = np.array([0, 24, *STRUCTURES], np.uint8)
    for number in range(6):
        labels = phantom(number, (32, 40, 36))[1]
        image = nib.Nifti1Image(ids[labels % len(ids)], np.eye(4))
        nib.save(image, tmp_path / "data" / f"seg_{number}.nii.gz")
    train_all(("synthseg.py", tmp_path / "data", tmp_path / "run"))
    lines = logs.read(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 2] and 0.2 < lines[0]["dice_identity"] < 0.8
    # Twice as much as the label overlap lacks, less the similarity.
    for line in lines[1:3]:
        parts = -line["similarity"] + line["regulariser"] + 2 * (1 - line["overlap"])
        assert line["loss"] == pytest.approx(parts, abs=1e-5) and 0.1 < line["overlap"] < 0.9
    config = cli.load_config(f"{runs.ROOT / 'configs' / 'synthseg.py'}:tiny")
    config.data.directory, config.data.preprocessing.normalise = str(tmp_path / "data"), "max"
    with pytest.raises(cli.BadInput, match="normalise is 'max'; images made of label maps are normalised by 'perc"):
        train.train(config, tmp_path / "other")


@pytest.mark.data
def test_real_brains_train(shared_data: Path, tmp_path: Path) -> None:
    """With their labels; the other configurations differ in what `test_a_step_can_be_made_of_it` sees."""
    train_all(("lpba40_labels.py", shared_data / "lpba40", tmp_path / "run"))
    check(tmp_path / "run", 0.3, 0.7, highest_loss=0.9)
    lines = logs.read(tmp_path / "run" / "metrics.jsonl")
    assert all(0.05 < line["overlap"] < 0.9 for line in lines[1:3])
