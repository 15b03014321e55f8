"""From files to arrays: what each setting does to known voxels, and that nothing is decoded twice."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dilformer_jax.data import preprocessing
from dilformer_jax.data.lpba40 import lpba40
from dilformer_jax.data.preprocessing import load, load_image
from dilformer_jax.data.subjects import Subject
from dilformer_jax.io.volumes import BadInput

GENERATOR = np.random.default_rng(5)
IMAGE = GENERATOR.integers(1, 200, (8, 12, 4)).astype(np.int16)
LABELS = GENERATOR.integers(0, 5, (8, 12, 4)).astype(np.uint8)


@pytest.fixture(autouse=True)
def empty_memory():
    preprocessing._memory.clear()


def subject(folder, image=IMAGE, labels=LABELS, affine=None, labels_affine=None):
    affine = np.eye(4) if affine is None else affine
    nib.Nifti1Image(image, affine).to_filename(folder / "a_t1.nii.gz")
    nib.Nifti1Image(labels, affine if labels_affine is None else labels_affine).to_filename(folder / "a_seg.nii.gz")
    return Subject("a", folder / "a_t1.nii.gz", folder / "a_seg.nii.gz")


def blocks(array, factor):
    """Every block of voxels by itself, in loops."""
    d, h, w = (n // factor for n in array.shape)
    return {
        (i, j, k): array[
            i * factor : (i + 1) * factor, j * factor : (j + 1) * factor, k * factor : (k + 1) * factor
        ].ravel()
        for i in range(d)
        for j in range(h)
        for k in range(w)
    }


def test_by_default_the_image_is_divided_by_its_maximum(tmp_path):
    image, labels = load(subject(tmp_path), {})
    assert image.shape == (8, 12, 4, 1) and image.dtype == np.float32 and labels.dtype == np.int32
    np.testing.assert_allclose(image[..., 0], IMAGE / IMAGE.max(), rtol=1e-6)
    np.testing.assert_array_equal(labels, LABELS)
    assert load(Subject("b", tmp_path / "a_t1.nii.gz", None), {})[1] is None


@pytest.mark.parametrize("factor", [2, 4])
def test_downsampling_averages_the_normalised_image_and_leaves_the_labels(tmp_path, factor):
    image, labels = load(subject(tmp_path), {"normalise": "minmax", "downsample": factor})
    scaled = (IMAGE - IMAGE.min()) / (IMAGE.max() - IMAGE.min())
    for place, block in blocks(scaled, factor).items():
        assert image[(*place, 0)] == pytest.approx(block.mean(), abs=1e-6)
    assert image.shape == (8 // factor, 12 // factor, 4 // factor, 1) and labels.shape == (8, 12, 4)


def test_a_box_is_cut_around_the_middle_of_what_is_not_zero(tmp_path):
    image = np.zeros((10, 12, 6), np.int16)
    image[3:8, 9:12, 1:3] = np.arange(1, 31).reshape(5, 3, 2)
    labels = np.where(image > 0, image, 0).astype(np.uint8)
    cut, cut_labels = load(subject(tmp_path, image, labels), {"normalise": "none", "crop_to": (3, 6, 6)})
    # First axis: 3..7, middle 5, so 4..6. Second: 9..11, middle 10, moved inside to 6..11. Third: all of it.
    np.testing.assert_array_equal(cut[..., 0], image[4:7, 6:12, :])
    np.testing.assert_array_equal(cut_labels, labels[4:7, 6:12, :])


def test_a_box_larger_than_the_volume_continues_the_image_and_not_the_labels(tmp_path):
    image, labels = load(subject(tmp_path), {"normalise": "none", "crop_to": [8, 15, 4]})
    # Three voxels to add on the second axis: two in front, one behind.
    np.testing.assert_array_equal(image[:, 2:14, :, 0], IMAGE)
    np.testing.assert_array_equal(image[:, 0, :, 0], IMAGE[:, 0])
    np.testing.assert_array_equal(image[:, 14, :, 0], IMAGE[:, -1])
    np.testing.assert_array_equal(labels[:, 2:14], LABELS)
    assert not labels[:, :2].any() and not labels[:, 14:].any() and LABELS[:, 0].any()


def test_the_box_is_cut_before_the_intensities_are_scaled(tmp_path):
    image = np.zeros((9, 4, 4), np.int16)
    image[0], image[4], image[8] = 200, 50, 200
    assert load_image(subject(tmp_path, image), {"crop_to": (3, 4, 4)}).max() == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"normalize": "max"}, "preprocessing has no 'normalize'; it has normalise, downsample"),
        ({"downsample": 3}, "preprocessing.downsample is 3; choose one of 1, 2, 4"),
        ({"normalise": "zscore"}, "'zscore'; choose one of 'max'"),
        ({"crop_to": (8, 8)}, "three positive numbers"),
        ({"crop_to": 8}, "three positive numbers"),
        ({"crop_to": (8, 10, 5), "downsample": 2}, "a_t1.nii.gz is 8x10x5 after cropping, which downsample=2 does not"),
    ],
)
def test_settings_that_do_not_exist_or_fit_are_refused(tmp_path, settings, said):
    with pytest.raises(BadInput, match=said):
        load(subject(tmp_path), settings)


def test_faults_of_the_files_name_them(tmp_path):
    apart = np.diag([1.0, 1, 1, 1])
    apart[0, 3] = 5
    with pytest.raises(BadInput, match=r"a_seg\.nii\.gz .*a_t1\.nii\.gz .*grids"):
        load(subject(tmp_path, labels_affine=apart), {})
    with pytest.raises(BadInput, match=r"a_seg\.nii\.gz .*4x12x4 .*a_t1"):
        load(subject(tmp_path, labels=LABELS[:4]), {})
    with pytest.raises(BadInput, match=r"gone\.nii cannot be read"):
        load(Subject("gone", tmp_path / "gone.nii", None), {})
    with pytest.raises(BadInput, match=r"a_t1\.nii\.gz: intensities .* by 'max'"):
        load(subject(tmp_path, -IMAGE), {})


def test_pickles_are_read_by_their_suffix(tmp_path):
    path = tmp_path / "subject_1.pkl"
    path.write_bytes(pickle.dumps((IMAGE / np.float32(400), LABELS.astype(np.uint16))))
    image, labels = load(Subject("subject_1", path, path), {"normalise": "none"})
    np.testing.assert_array_equal(image[..., 0], IMAGE / np.float32(400))
    np.testing.assert_array_equal(labels, LABELS)
    assert labels.dtype == np.int32


def counted(monkeypatch, name):
    calls, real = [], getattr(preprocessing, name)
    monkeypatch.setattr(preprocessing, name, lambda *given: calls.append(given) or real(*given))
    return calls


@pytest.mark.parametrize("on_disk", [False, True])
def test_each_file_is_decoded_once_until_it_changes(tmp_path, monkeypatch, on_disk):
    cache = tmp_path / "cache" if on_disk else None
    calls, brain = counted(monkeypatch, "image_of"), Subject("a", tmp_path / "a.nii", None)
    nib.Nifti1Image(IMAGE, np.eye(4)).to_filename(brain.image)
    first = load_image(brain, {}, cache=cache)
    assert load_image(Subject("other name", brain.image, None), {"normalise": "max"}, cache=cache) is first
    assert len(calls) == 1
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1
    load_image(brain, {"downsample": 2}, cache=cache)
    assert len(calls) == 2
    nib.Nifti1Image(IMAGE[::-1], np.eye(4)).to_filename(brain.image)  # of the same size in bytes
    os.utime(brain.image, ns=(1, 1))
    np.testing.assert_allclose(load_image(brain, {}, cache=cache)[..., 0], IMAGE[::-1] / IMAGE.max(), rtol=1e-6)
    assert len(calls) == 3


def test_the_cache_on_disk_outlives_the_process_and_mends_itself(tmp_path, monkeypatch):
    cache, brain = tmp_path / "deep" / "cache", subject(tmp_path)
    image, labels = (np.array(array) for array in load(brain, {"downsample": 2}, cache=cache))
    files = sorted(cache.iterdir())
    assert len(files) == 2 and all(path.suffix == ".npy" for path in files)

    preprocessing._memory.clear()
    images, maps = counted(monkeypatch, "image_of"), counted(monkeypatch, "labels_of")
    again = load(brain, {"downsample": 2}, cache=cache)
    assert not images and not maps
    np.testing.assert_array_equal(again[0], image)
    np.testing.assert_array_equal(again[1], labels)

    preprocessing._memory.clear()
    for path in files:
        path.write_bytes(path.read_bytes()[:150])
    again = load(brain, {"downsample": 2}, cache=cache)
    np.testing.assert_array_equal(again[0], image)
    np.testing.assert_array_equal(again[1], labels)
    assert images and maps
    assert sorted(cache.iterdir()) == files


def test_a_cache_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="file cannot be made"):
        load_image(subject(tmp_path), {}, cache=tmp_path / "file")


def test_memory_forgets_what_was_unused_for_longest(tmp_path, monkeypatch):
    one = subject(tmp_path)
    monkeypatch.setattr(preprocessing, "MEMORY_BYTES", 2 * IMAGE.size * 4)
    calls = counted(monkeypatch, "image_of")
    load_image(one, {})
    load_image(one, {"normalise": "minmax"})
    load_image(one, {})
    load_image(one, {"normalise": "none"})  # the third: minmax goes
    load_image(one, {})
    assert len(calls) == 3
    load_image(one, {"normalise": "minmax"})
    assert len(calls) == 4


def test_the_data_modules_leave_jax_alone():
    code = "import sys, dilformer_jax.data.pipeline, dilformer_jax.data.sources; sys.exit('jax' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(preprocessing.__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0


@pytest.mark.data
def test_real_brains_have_the_known_overlap(shared_data):
    """Figures of a separate script over the raw files: mean Dice of the 54 regions between unregistered brains."""
    dataset = lpba40(shared_data / "lpba40")
    known = {"S36_to_S35": 0.525826, "S40_to_S38": 0.571615, "S37_to_S40": 0.406692}
    for pair in dataset.validation:
        if pair.name not in known:
            continue
        fixed, moving = (load(subject, {"normalise": "max"}) for subject in (pair.fixed, pair.moving))
        assert fixed[0].shape == (160, 192, 160, 1) and fixed[0].max() == moving[0].max() == 1
        values = [
            2 * np.sum(fixed_mask & moving_mask) / (np.sum(fixed_mask) + np.sum(moving_mask))
            for fixed_mask, moving_mask in ((fixed[1] == label, moving[1] == label) for label in dataset.labels)
        ]
        assert np.mean(values) == pytest.approx(known.pop(pair.name), abs=1e-5)
    assert not known
    # One voxel of S35 as the file has it: 833 of at most 1693.
    assert load_image(dataset.validation[0].moving, {})[80, 96, 80, 0] == pytest.approx(833 / 1693)
