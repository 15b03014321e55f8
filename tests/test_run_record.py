"""With what a run began, and what of it may change when it goes on."""

import json
from pathlib import Path

import pytest
import training_runs as runs

from dilformer_jax import train
from dilformer_jax.io.volumes import BadInput
from dilformer_jax.reporting import run_record


def test_a_run_goes_on_with_its_batches_on_other_devices(tmp_path: Path) -> None:
    """0 stands for one pair a device and part; of a run that goes on, for what it stood for when that began."""
    config = train.cli.load_config(str(runs.ROOT / "configs" / "demo.py:tiny"))
    config.accumulate = 2
    assert train._batch_size(config, 3, tmp_path) == 6
    config.batch_size = 6
    run_record.write_config(config, tmp_path, resuming=False, writing=True)
    config.batch_size, config.accumulate = 0, 3
    assert train._batch_size(config, 1, tmp_path) == 3  # nothing was done yet
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    assert train._batch_size(config, 1, tmp_path) == 6
    config.batch_size = 12
    assert train._batch_size(config, 1, tmp_path) == 12  # which is then refused


def test_a_run_of_before_an_option_existed_goes_on_at_its_default(tmp_path: Path) -> None:
    config = train.cli.load_config(str(runs.ROOT / "configs" / "demo.py:tiny"))
    run_record.write_config(config, tmp_path, resuming=False, writing=True)
    path = tmp_path / "config.json"
    old = json.loads(path.read_text())
    del old["model"]["options"]["dtype"], old["average"], old["start_from"], old["data"]["gamma"]
    path.write_text(json.dumps(old))
    run_record.write_config(config, tmp_path, resuming=True, writing=False)
    assert config.start_from == "" and config.optimiser.kind == "adam"
    with config.unlocked():
        del config.start_from, config.data.gamma, config.optimiser.kind, config.loss.foreground
    run_record.complete(config)
    assert (config.start_from, config.data.gamma, config.optimiser.kind) == ("", 0.0, "adam")
    assert config.loss.foreground is False
    with config.unlocked():  # nor need it be given
        del config.model.options.dtype
    run_record.write_config(config, tmp_path, resuming=True, writing=False)
    with config.unlocked():
        config.model.options.dtype = "bfloat16"
    with pytest.raises(BadInput, match="was trained with model.options.dtype=float32 and now is given bfloat16"):
        run_record.write_config(config, tmp_path, resuming=True, writing=False)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("seed", 1, "seed=0 and now is given 1"), ("loss.regulariser_weight", 3.0, "regulariser_weight=1.0 .* given 3.0")],
)
def test_a_run_keeps_what_decides_its_numbers(tmp_path: Path, key: str, value: float, said: str) -> None:
    config = train.cli.load_config(str(runs.ROOT / "configs" / "demo.py:tiny"))
    run_record.write_config(config, tmp_path, resuming=False, writing=True)
    before = (tmp_path / "config.json").read_bytes()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(BadInput, match=said):
        run_record.write_config(config, tmp_path, resuming=True, writing=True)
    assert (tmp_path / "config.json").read_bytes() == before


def test_an_option_that_is_left_out_is_a_change_too(tmp_path: Path) -> None:
    began = train.cli.load_config(str(runs.ROOT / "configs" / "demo.py:tiny"))
    run_record.write_config(began, tmp_path, resuming=False, writing=True)
    began.data.options = {"train": 2, "validation": 2, "shape": (32, 32, 32)}  # the seed of the phantoms is missing
    with pytest.raises(train.BadInput, match=r"data\.options\.seed"):
        run_record.write_config(began, tmp_path, resuming=True, writing=True)
