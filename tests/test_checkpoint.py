import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dilformer_jax.io.volumes import BadInput
from dilformer_jax.training import checkpoint, parallel
from dilformer_jax.training.checkpoint import Checkpoints, restore_params


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: Any


OPTIMISER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def fresh(width=3):
    random = np.random.default_rng(0)
    params = {
        "enc": {"kernel": jnp.asarray(random.normal(size=(2, width)), jnp.float32)},
        "half": jnp.asarray(random.normal(size=5), jnp.bfloat16),
        # Bits that no arithmetic would keep: a denormal, a signed zero, a NaN.
        "odd": jnp.array([1e-40, -0.0, np.nan], jnp.float32),
    }
    return State(jnp.int32(0), params, OPTIMISER.init(params))


def advanced(state):
    """One step of the optimiser, with gradients that depend on the state."""
    gradients = jax.tree.map(lambda p: jnp.sin(p.astype(jnp.float32)).astype(p.dtype), state.params)
    updates, opt_state = OPTIMISER.update(gradients, state.opt_state, state.params)
    return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state)


def raw(tree):
    """Type, shape and bytes of every leaf."""
    return [(x.dtype, x.shape, x.tobytes()) for x in map(np.asarray, jax.tree.leaves(tree))]


def abstract(state=None):
    return jax.eval_shape(fresh) if state is None else jax.eval_shape(lambda: state)


def test_state_returns_bit_for_bit(tmp_path):
    state = fresh().replace(step=jnp.int32(2**31 - 1))
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.save(3, state, dice=0.5)
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest_step() == 3
        restored = checkpoints.restore(abstract())
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert raw(restored) == raw(state)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored))


def test_a_checkpoint_of_before_a_field_existed_is_restored_without_it(tmp_path):
    """As those that were written when a state had no running mean."""

    @flax.struct.dataclass
    class Longer:
        step: Any
        params: Any
        opt_state: Any
        average: Any = None

    old = advanced(fresh())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, old)
    wanted = abstract()
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(Longer(wanted.step, wanted.params, wanted.opt_state))
        assert found.average is None and raw((found.step, found.params, found.opt_state)) == raw(
            (old.step, old.params, old.opt_state)
        )
        # One that is written now knows of the field; one that wants it filled is refused.
        checkpoints.save(2, found)
        assert raw(checkpoints.restore(Longer(wanted.step, wanted.params, wanted.opt_state)).params) == raw(old.params)
        with pytest.raises(BadInput, match="does not fit this configuration"):
            checkpoints.restore(Longer(wanted.step, wanted.params, wanted.opt_state, wanted.params))


def test_only_a_whole_checkpoint_has_begun_a_run(tmp_path):
    assert not checkpoint.begun(tmp_path)
    (tmp_path / "checkpoints" / "250.orbax-checkpoint-tmp").mkdir(parents=True)
    assert not checkpoint.begun(tmp_path)
    (tmp_path / "checkpoints" / "250").mkdir()
    assert checkpoint.begun(tmp_path)


def test_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("run/checkpoints") as checkpoints:
        checkpoints.save(1, fresh())
    assert restore_params("run")[1] == 1


def test_shards_return_to_the_sharding_asked_for(tmp_path):
    replicated = parallel.replicated(parallel.mesh())
    state = jax.device_put(fresh(), replicated)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        restored = checkpoints.restore(jax.tree.map(lambda leaf: leaf.update(sharding=replicated), abstract()))
    assert all(leaf.sharding == replicated for leaf in jax.tree.leaves(restored))
    assert raw(restored) == raw(state)


def test_training_on_from_a_checkpoint_equals_training_through(tmp_path):
    step = jax.jit(advanced)
    through = fresh()
    for _ in range(6):
        through = step(through)
    state = fresh()
    with Checkpoints(tmp_path) as checkpoints:
        for _ in range(2):
            state = step(state)
        checkpoints.save(2, state)
    with Checkpoints(tmp_path) as checkpoints:
        state = checkpoints.restore(abstract())
        for _ in range(4):
            state = step(state)
    assert raw(state) == raw(through)


def test_donating_at_once_does_not_reach_the_file(tmp_path):
    replicated = parallel.replicated(parallel.mesh())
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0, out_shardings=replicated)
    state = jax.device_put({"params": {str(k): jnp.full((512, 512), float(k)) for k in range(8)}}, replicated)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for number in range(3):
            checkpoints.save(number, state)
            for _ in range(4):
                state = add(state)
            jax.block_until_ready(state)
            checkpoints.wait()
            params, step = restore_params(tmp_path, "latest")
            assert step == number
            assert {key: (value.min(), value.max()) for key, value in params.items()} == {
                str(k): (k + 4 * number, k + 4 * number) for k in range(8)
            }


def test_the_latest_and_the_best_are_kept(tmp_path):
    dice = {1: 0.4, 2: 0.7, 3: None, 4: 0.6, 5: float("nan"), 6: None}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step, value in dice.items():
            checkpoints.save(step, fresh().replace(params={"a": jnp.full(2, float(step))}), value)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "6"]
    for which, step in (("best", 2), ("latest", 6)):
        params, found = restore_params(tmp_path, which)
        assert found == step
        np.testing.assert_array_equal(params["a"], [step, step])
    # The best of before is remembered by a run that goes on.
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.best_step() == 2
        checkpoints.save(7, fresh(), 0.65)
        checkpoints.wait()
        assert checkpoints.best_step() == 2
        checkpoints.save(8, fresh(), 0.75)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["8"]


def test_best_is_the_latest_where_nothing_was_validated(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, fresh())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert restore_params(tmp_path, "best")[1] == 3


def test_a_step_is_saved_once_and_an_earlier_one_only_by_force(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(5, fresh())
        assert not checkpoints.save(5, fresh().replace(step=jnp.int32(9)), force=True)
        assert checkpoints.restore(abstract(), 5).step == 0
        assert not checkpoints.save(4, fresh())
        # The best and, being saved last, the latest; step 5 may go as soon as this one is on disk.
        assert checkpoints.save(4, fresh(), 0.5, force=True)


def test_params_are_restored_without_the_optimiser(tmp_path):
    state = jax.jit(advanced)(fresh())
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state)
    params, step = restore_params(tmp_path)
    assert step == 1
    assert jax.tree.structure(params) == jax.tree.structure(state.params)
    assert raw(params) == raw(state.params)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))


def test_params_are_restored_on_other_devices(tmp_path):
    """Written on four devices, read on one, by a process of its own."""
    replicated = parallel.replicated(parallel.mesh())
    assert jax.device_count() == 4
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, jax.device_put({"step": jnp.int32(1), "params": {"a": jnp.arange(3.0)}}, replicated))
    code = (
        "import sys, jax; from dilformer_jax.training.checkpoint import *\n"
        "assert jax.device_count() == 1\n"
        "print(restore_params(sys.argv[1])[0]['a'].tolist())\n"
        "with Checkpoints(sys.argv[1] + '/checkpoints') as c:\n"
        "    s = jax.ShapeDtypeStruct\n"
        "    print(c.restore({'step': s((), 'int32'), 'params': {'a': s((3,), 'float32')}})['params']['a'].tolist())\n"
    )
    environment = {**os.environ, "XLA_FLAGS": ""}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, tmp_path]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=True)
    assert done.stdout.splitlines() == ["[0.0, 1.0, 2.0]"] * 2


def test_remains_of_a_killed_save_are_passed_over_and_cleared(tmp_path):
    """SIGKILL at any moment of saving: what is found afterwards is whole, and nothing else stays."""
    code = (
        "import sys, jax.numpy as jnp; from dilformer_jax.training.checkpoint import Checkpoints\n"
        "state = {'params': {str(k): jnp.zeros((256, 1024)) for k in range(16)}}\n"
        "with Checkpoints(sys.argv[1]) as c:\n"
        "    first = (c.latest_step() or 0) + 1\n"
        "    print('ready', flush=True)\n"
        "    for step in range(first, 10000):\n"
        "        c.save(step, {'params': {k: v + step for k, v in state['params'].items()}}, dice=step % 5)\n"
    )
    directory = tmp_path / "checkpoints"
    for delay in (0.15, 0.5):
        with subprocess.Popen([sys.executable, "-c", code, directory], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        with Checkpoints(directory) as checkpoints:
            latest = checkpoints.latest_step()
        for which in ("latest", "best") if latest else ():
            params, step = restore_params(tmp_path, which)
            assert {(value.min(), value.max()) for value in params.values()} == {(step, step)}
    assert latest
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(latest + 1, {"params": {"a": jnp.ones(1)}}, dice=9.0)
    assert [path.name for path in directory.iterdir()] == [str(latest + 1)]


def test_an_unfinished_folder_is_no_checkpoint(tmp_path):
    directory = tmp_path / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, fresh())
    (directory / "1").rename(directory / "1.orbax-checkpoint-tmp")
    with pytest.raises(BadInput, match="no finished checkpoint"):
        restore_params(tmp_path)
    assert (directory / "1.orbax-checkpoint-tmp").exists()
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(BadInput, match="holds no checkpoint; train first"):
            checkpoints.restore(abstract())
        checkpoints.save(2, fresh())
    assert [path.name for path in directory.iterdir()] == ["2"]


@pytest.mark.parametrize("gone", ["metrics/metrics", "default/_METADATA", "_CHECKPOINT_METADATA"])
def test_a_half_deleted_folder_is_passed_over_and_cleared(tmp_path, gone):
    """An old checkpoint that a SIGKILL left half deleted."""
    directory = tmp_path / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, fresh(), 0.9)
        checkpoints.save(2, fresh(), 0.5)
        checkpoints.wait()
        shutil.copytree(directory / "2", tmp_path / "old")
        checkpoints.save(3, fresh(), 0.4)
    (tmp_path / "old" / gone).unlink()
    (tmp_path / "old").rename(directory / "2")
    assert [restore_params(tmp_path, which)[1] for which in ("best", "latest")] == [1, 3]
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(4, fresh(), 0.3)
    assert sorted(path.name for path in directory.iterdir()) == ["1", "4"]


def test_another_structure_is_one_sentence(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, fresh())
        checkpoints.wait()
        other = fresh().replace(params={"other": jnp.zeros(2)})
        for wanted in (jax.eval_shape(lambda: fresh(width=4)), abstract(other)):
            with pytest.raises(BadInput, match="does not fit this configuration") as caught:
                checkpoints.restore(wanted)
            assert "\n" not in str(caught.value)


def test_damage_is_one_sentence(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        # One array: of several, orbax closes its event loop at the first that fails, and the others complain into it at
        # some later time, which would fail a test that has nothing to do with them.
        checkpoints.save(1, {"params": {"a": jnp.arange(4096.0)}})
    for path in (tmp_path / "checkpoints" / "1").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(BadInput, match="cannot be read"):
        restore_params(tmp_path)


def test_folder_without_checkpoints_is_one_sentence(tmp_path):
    with pytest.raises(BadInput, match="holds no checkpoints"):
        restore_params(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="a file stands there"):
        Checkpoints(Path(tmp_path / "file" / "checkpoints"))
    with pytest.raises(BadInput, match=r"/proc/run/checkpoints cannot be made \(No such file or directory\)"):
        Checkpoints(Path("/proc/run/checkpoints"))  # where nobody may make a folder, not even root
    with pytest.raises(ValueError, match="'best' or 'latest'"):
        restore_params(tmp_path, "first")
