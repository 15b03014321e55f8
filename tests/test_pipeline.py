"""The stream of batches: the same whatever reads it, and each batch what NumPy makes of the files."""

import functools
import itertools
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import dilformer_jax
from dilformer_jax.data.pipeline import batches, common_grid, common_shape, load, spacing
from dilformer_jax.data.subjects import Pair, Subject, ordered_pairs
from dilformer_jax.io.volumes import BadInput

SHAPE = (4, 6, 8)
STEPS = 7
# For a checkout that is not installed.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(dilformer_jax.__file__).parents[1])}


def write(folder, name, shape=SHAPE, affine=None):
    array = np.random.default_rng(list(name.encode())).integers(1, 999, shape).astype(np.int16)
    nib.Nifti1Image(array, np.eye(4) if affine is None else affine).to_filename(folder / f"{name}.nii.gz")
    return Subject(name, folder / f"{name}.nii.gz", None)


@pytest.fixture
def pairs(tmp_path):
    return ordered_pairs([write(tmp_path, name) for name in "abc"])


def stream(pairs, steps=STEPS, **options):
    settings = {"batch_size": 4, "seed": 11, "flips": (0, 2), **options}
    with batches(pairs, {"normalise": "max", "downsample": 2}, **settings) as iterator:
        return list(itertools.islice(iterator, steps))


def assert_same(one, other):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys() and {"fixed", "moving", "index"} <= a.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@functools.cache
def voxels(subject):
    """The image after preprocessing, by NumPy and nibabel alone."""
    array = np.asarray(nib.load(subject.image).dataobj).astype(float)
    pooled = sum(array[i::2, j::2, k::2] for i, j, k in itertools.product((0, 1), repeat=3)) / 8
    return (pooled / array.max())[..., None]


def test_batches_hold_the_pairs_that_their_index_names(pairs):
    for batch in stream(pairs):
        assert batch["fixed"].shape == batch["moving"].shape == (4, 2, 3, 4, 1)
        assert batch["fixed"].dtype == np.float32 and batch["index"].dtype == np.int32
        for role in "fixed", "moving":
            for image, index in zip(batch[role], batch["index"], strict=True):
                np.testing.assert_allclose(image, voxels(getattr(pairs[index], role)), atol=1e-6)


def test_each_axis_is_flipped_half_of_the_time(pairs):
    seen = [tuple(np.flatnonzero(flips)) for batch in stream(pairs, steps=30) for flips in batch["flips"]]
    # 120 draws at 1/4 each: 30 expected, sd 4.7.
    assert {axes: 12 < seen.count(axes) < 48 for axes in ((), (0,), (2,), (0, 2))} == dict.fromkeys(set(seen), True)
    assert "flips" not in stream(pairs, 1, flips=())[0] and "affine" not in stream(pairs, 1)[0]


@pytest.mark.parametrize(("common", "own"), [(0.05, 0.0), (0.0, 0.05)])
def test_random_affine_maps(pairs, common, own):
    maps = np.concatenate([batch["affine"] for batch in stream(pairs, 75, affine=(common, own), images=False)])
    assert maps.shape == (300, 2, 3, 4) and maps.dtype == np.float32
    # 300 draws: the standard deviation is known to 4 %. The shift is a quarter of it, in edges of 2 x 3 x 4 voxels.
    expected = np.column_stack([np.full((3, 3), 0.05), np.array([2, 3, 4]) * 0.05 / 4])
    np.testing.assert_allclose(maps.std(axis=0), np.stack([expected, expected]), rtol=0.2)
    assert np.abs(maps.mean(axis=0)).max() < 0.2 * 0.05
    correlation = np.corrcoef(maps[:, 0, 0, 1], maps[:, 1, 0, 1])[0, 1]
    assert abs(correlation - (1 if common else 0)) < 0.25


def test_powers_of_intensities(pairs):
    powers = np.concatenate([batch["power"] for batch in stream(pairs, 200, gamma=0.3, images=False)])
    assert powers.shape == (800, 2) and powers.dtype == np.float32
    logarithms = np.log(powers)
    np.testing.assert_allclose(logarithms.std(0), 0.3, rtol=0.1)
    assert np.abs(logarithms.mean(0)).max() < 0.05 and abs(np.corrcoef(logarithms.T)[0, 1]) < 0.15
    assert "power" not in stream(pairs, 1)[0]


def test_without_images_the_stream_is_the_same(pairs):
    options = {"affine": (0.1, 0.1), "start_step": 2, "process_index": 1, "process_count": 2}
    whole, numbers = (stream(pairs, images=images, **options) for images in (True, False))
    for with_them, without in zip(whole, numbers, strict=True):
        assert with_them.keys() - without.keys() == {"fixed", "moving"}
        for name, array in without.items():
            np.testing.assert_array_equal(array, with_them[name])


def test_each_epoch_has_each_pair_once_in_an_order_of_its_own(pairs):
    indices = np.concatenate([batch["index"] for batch in stream(pairs, steps=9)]).reshape(6, 6)
    np.testing.assert_array_equal(np.sort(indices), np.tile(np.arange(6), (6, 1)))
    assert len({tuple(epoch) for epoch in indices}) > 3
    assert not np.array_equal(indices[0], [batch["index"] for batch in stream(pairs, 6, seed=12, batch_size=1)])


def test_a_stream_is_given_by_its_seed(pairs):
    assert_same(stream(pairs), stream(pairs))
    other = stream(pairs, seed=12)
    assert any(not np.array_equal(a["fixed"], b["fixed"]) for a, b in zip(stream(pairs), other, strict=True))
    assert any(not np.array_equal(a["flips"], b["flips"]) for a, b in zip(stream(pairs), other, strict=True))


@pytest.mark.parametrize("step", [1, 5])
@pytest.mark.parametrize("affine", [(0.0, 0.0), (0.1, 0.1)])
def test_a_stream_resumes_at_any_step(pairs, step, affine):
    resumed = stream(pairs, STEPS - step, start_step=step, affine=affine)
    assert_same(resumed, stream(pairs, affine=affine)[step:])


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("affine", [(0.0, 0.0), (0.1, 0.1)])
def test_processes_share_the_global_batches(pairs, count, affine):
    parts = [stream(pairs, process_index=index, process_count=count, affine=affine) for index in range(count)]
    joined = [
        {name: np.stack([part[name] for part in step], 1).reshape(-1, *step[0][name].shape[1:]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert all(len(batch["index"]) == 4 // count for part in parts for batch in part)
    assert_same(joined, stream(pairs, affine=affine))


def test_worker_processes_read_the_same_stream_and_leave_nothing_behind(pairs, tmp_path):
    """In a process of its own, as from a user's script, with two workers, resumed and cut off while they read ahead."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import itertools, pathlib, pickle, sys
        from dilformer_jax.data.pipeline import batches

        if __name__ == "__main__":
            folder = pathlib.Path(sys.argv[1])
            pairs, options = pickle.loads((folder / "job").read_bytes())
            preprocessing = {"normalise": "max", "downsample": 2}
            iterator = batches(pairs, preprocessing, workers=2, cache=folder / "cache", **options)
            found = list(itertools.islice(iterator, 5))
            iterator.close()
            assert all(type(array) is __import__("numpy").ndarray for batch in found for array in batch.values())
            (folder / "found").write_bytes(pickle.dumps(found))
        """)
    )
    options = {
        "batch_size": 4,
        "seed": 11,
        "flips": (0, 2),
        "affine": (0.05, 0.02),
        "start_step": 2,
        "process_index": 1,
        "process_count": 2,
    }
    (tmp_path / "job").write_bytes(pickle.dumps((pairs, options)))
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, check=False, timeout=120, env=ENVIRONMENT
    )
    assert done.returncode == 0 and "leaked" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert_same(pickle.loads((tmp_path / "found").read_bytes()), stream(pairs, 5, **options))


def test_workers_keep_off_the_accelerator():
    """Grain imports jax into them; what they run first must reach jax's own setting, and no backend may be up."""
    code = """
    import os, sys
    os.environ.pop("JAX_PLATFORMS", None)
    import grain
    from dilformer_jax.data.pipeline import _stay_off_the_accelerator
    _stay_off_the_accelerator(0, 2)
    import jax
    assert jax.config.jax_platforms == "cpu" == os.environ["JAX_PLATFORMS"]
    from jax._src import xla_bridge
    assert not xla_bridge._backends
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=ENVIRONMENT)


def test_closing_ends_the_reading_threads(pairs):
    def readers():
        return [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]

    before = set(readers())
    iterator = batches(pairs, {}, batch_size=2, seed=0)
    next(iterator)
    started = [thread for thread in readers() if thread not in before]
    assert started
    iterator.close()
    iterator.close()
    assert list(iterator) == []
    for thread in started:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in started)


def test_a_batch_is_the_readers_own_to_change(pairs):
    iterator = batches(pairs, {}, batch_size=1, seed=0)
    with iterator:
        batch = next(iterator)
        batch["fixed"][:] = 7
    assert load(pairs[batch["index"][0]].fixed, {})[0].max() == 1


def test_the_common_grid_is_that_of_the_files(pairs, tmp_path):
    path = tmp_path / "p.pkl"
    path.write_bytes(pickle.dumps((np.ones((2, 4, 6)), np.zeros((2, 4, 6), int))))
    pickled = Subject("p", path, path)
    assert common_grid([Pair(pickled, pickled)], {"downsample": 2}) == {
        "shape": [2, 4, 6],
        "spacing_mm": [1, 1, 1],
        "orientation": None,
        "network_shape": [1, 2, 3],
    }
    assert common_grid(pairs, {"downsample": 2, "crop_to": (6, 6, 6)})["shape"] == [6, 6, 6]


def test_the_common_shape_is_that_of_the_networks_input(pairs, tmp_path):
    assert common_shape(pairs, {}) == (4, 6, 8)
    assert common_shape(pairs, {"downsample": 2}) == (2, 3, 4)
    assert common_shape(pairs, {"downsample": 2, "crop_to": (6, 6, 6)}) == (3, 3, 3)
    path = tmp_path / "p.pkl"
    path.write_bytes(pickle.dumps((np.ones((2, 4, 6)), np.zeros((2, 4, 6), int))))
    pickled = Subject("p", path, path)
    assert common_shape([Pair(pickled, pickled)], {"downsample": 2}) == (1, 2, 3)


def test_the_image_that_differs_is_named(pairs, tmp_path):
    turned = np.diag([-1.0, 1, 1, 1])
    small, left = write(tmp_path, "small", (4, 6, 6)), write(tmp_path, "left", affine=turned)
    with pytest.raises(BadInput, match=r"small\.nii\.gz is 4x6x6 RAS while 3 of these 4 images are 4x6x8 RAS"):
        batches([Pair(small, pairs[0].moving), *pairs], {}, batch_size=1, seed=0)
    with pytest.raises(BadInput, match=r"left\.nii\.gz is 4x6x8 LAS while 3 of these 4 images are RAS"):
        common_shape([Pair(pairs[0].moving, left), *pairs], {"crop_to": (4, 4, 4)})
    assert common_shape([Pair(small, pairs[0].moving), *pairs], {"crop_to": (4, 4, 4)}) == (4, 4, 4)
    with pytest.raises(BadInput, match=r"4x6x8 .*downsample=4 does not divide"):
        common_shape(pairs, {"downsample": 4})


def test_a_pickle_that_differs_is_named_when_it_comes(tmp_path):
    subjects = []
    for name, size in (("atlas", 4), ("odd", 6)):
        path = tmp_path / f"{name}.pkl"
        path.write_bytes(pickle.dumps((np.ones((size, 4, 4)), np.zeros((size, 4, 4), int))))
        subjects.append(Subject(name, path, path))
    with (
        batches([Pair(subjects[0], subjects[1])], {}, batch_size=1, seed=0) as iterator,
        pytest.raises(BadInput, match=r"odd\.pkl is 6x4x4 after preprocessing while the other images are 4x4x4"),
    ):
        next(iterator)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 3, "process_count": 2}, "batch_size 3 does not divide among 2 processes"),
        ({"batch_size": 0}, "batch_size 0 does not"),
        ({"process_index": 2, "process_count": 2}, "process_index 2 is not one of 2"),
        ({"flips": (0, 3)}, r"flips is \(0, 3\)"),
        ({"flips": (1, 1)}, "each once"),
        ({"affine": (0.1,)}, r"affine is \(0\.1,\); give two"),
        ({"affine": (0.0, 0.5)}, r"affine is \(0\.0, 0\.5\)"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(pairs, options, said):
    with pytest.raises(ValueError, match=said):
        stream(pairs, **options)
    with pytest.raises(BadInput, match="There are no pairs"):
        stream([])


def test_spacing_is_that_of_the_file(tmp_path):
    brain = write(tmp_path, "thick", affine=np.array([[0, 0, 3, 0], [-1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1.0]]))
    assert spacing(brain) == (1, 2, 3)
    assert spacing(Subject("p", tmp_path / "p.pkl", None)) == (1, 1, 1)
