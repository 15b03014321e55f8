"""Images and labels in pickles and .npz archives."""

import pickle
import zipfile

import numpy as np
import pytest
from brains import write_pickle

from dilformer_jax.io.bare import has_labels, read_bare_image, read_bare_labels
from dilformer_jax.io.volumes import BadInput

IMAGE = np.random.default_rng(0).random((3, 4, 5))
LABELS = np.arange(60, dtype=np.uint16).reshape(3, 4, 5)


def test_a_pickle_of_two_is_an_image_and_its_labels(tmp_path):
    path = write_pickle(tmp_path / "subject_1.pkl", IMAGE, LABELS)
    image, labels = read_bare_image(path), read_bare_labels(path)
    assert (image.dtype, labels.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(image, IMAGE.astype(np.float32))
    np.testing.assert_array_equal(labels, LABELS)


def test_a_pickle_of_four_is_moving_fixed_and_their_labels(tmp_path):
    path = write_pickle(tmp_path / "p_0438_0439.pkl", IMAGE, IMAGE + 1, LABELS, LABELS + 1)
    for part, more in (("moving", 0), ("fixed", 1)):
        np.testing.assert_array_equal(read_bare_image(path, part), (IMAGE + more).astype(np.float32))
        np.testing.assert_array_equal(read_bare_labels(path, part), LABELS + more)
    with pytest.raises(BadInput, match=r"p_0438_0439\.pkl holds 4 arrays; give an \(image, labels\) pair"):
        read_bare_image(path)
    write_pickle(path, IMAGE, LABELS)
    with pytest.raises(BadInput, match=r"holds 2 arrays; give \(moving, fixed, moving labels, fixed labels\)"):
        read_bare_image(path, "moving")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ((IMAGE, LABELS[:2]), r"labels of shape \(2, 4, 5\)"),
        ((IMAGE[0], LABELS[0]), "4x5 voxels; give 3-D arrays"),
        ((IMAGE, LABELS + 0.5), "not whole numbers"),
        ((np.where(IMAGE > 0.5, np.nan, IMAGE), LABELS), "NaN"),
        ((IMAGE, np.full(LABELS.shape, np.nan)), "NaN"),
        ((IMAGE[:0], LABELS[:0]), "0x4x5 voxels"),
        ((IMAGE,), "holds 1 arrays"),
    ],
)
def test_other_contents_are_refused(tmp_path, content, said):
    path = write_pickle(tmp_path / "subject_1.pkl", *content)
    with pytest.raises(BadInput, match=f"subject_1.pkl .*{said}"):
        read_bare_image(path)
        read_bare_labels(path)


def test_voxelmorphs_archives_are_read(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, vol=IMAGE[None, ..., None], seg=LABELS[None, ..., None])
    np.testing.assert_array_equal(read_bare_image(path), IMAGE.astype(np.float32))
    np.testing.assert_array_equal(read_bare_labels(path), LABELS)
    assert has_labels(path)
    np.savez(path, vol=IMAGE)
    assert not has_labels(path)
    np.savez(path, LABELS)  # one array, of any name, is what is asked for
    np.testing.assert_array_equal(read_bare_labels(path), LABELS)
    np.testing.assert_array_equal(read_bare_image(path), LABELS)
    np.savez(path, vol=IMAGE, train_avg=IMAGE)
    with pytest.raises(BadInput, match=r"a\.npz has no labels; name the array of labels seg"):
        read_bare_labels(path)
    with pytest.raises(BadInput, match="holds one brain, not a pair"):
        read_bare_image(path, "fixed")
    np.savez(path, image=IMAGE, seg=LABELS)
    with pytest.raises(BadInput, match="holds image, seg; name the image vol"):
        read_bare_image(path)


class Trap:
    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return open, (str(self.made), "w")


def test_archives_are_read_without_pickles_and_not_beyond_measure(tmp_path, monkeypatch):
    path, made = tmp_path / "a.npz", tmp_path / "made"
    np.savez(path, vol=np.array([Trap(made)], dtype=object), seg=LABELS)
    with pytest.raises(BadInput, match=r"a\.npz has an array vol that cannot be read \(Object arrays"):
        read_bare_image(path)
    assert not made.exists()
    with pytest.raises(BadInput, match=r"b\.npz does not exist"):
        read_bare_image(tmp_path / "b.npz")
    np.savez_compressed(path, vol=np.zeros((256, 256, 128)), seg=LABELS)
    assert path.stat().st_size < 200_000
    monkeypatch.setattr("dilformer_jax.io.bare.MOST_BYTES", 1 << 25)
    with pytest.raises(BadInput, match=r"a\.npz unpacks to 64 MiB; give one brain a file"):
        read_bare_image(path)
    np.savez(path, vol=IMAGE, seg=LABELS)
    whole = path.read_bytes()
    for length in (10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(BadInput, match=r"a\.npz is no whole \.npz archive"):
            read_bare_image(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vol.npy", pickle.dumps(IMAGE))
    with pytest.raises(BadInput, match="array vol that cannot be read"):
        read_bare_image(path)
