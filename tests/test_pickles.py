"""The restricted reader of (image, labels) pickles."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from dilformer_jax.io.pickles import read_pickle
from dilformer_jax.io.volumes import BadInput

IMAGE = np.random.default_rng(0).random((3, 4, 5))
LABELS = np.arange(60, dtype=np.uint16).reshape(3, 4, 5)


class Trap:
    """A pickle that makes a file when it is loaded by an ordinary unpickler."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_protocol_are_read(tmp_path, protocol, order):
    path = tmp_path / "subject_1.pkl"
    path.write_bytes(pickle.dumps((np.array(IMAGE, order=order), LABELS), protocol))
    image, labels = read_pickle(path)
    assert (image.dtype, labels.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(image, IMAGE.astype(np.float32))
    np.testing.assert_array_equal(labels, LABELS)


@pytest.mark.parametrize(("old", "new"), [("numpy._core", "numpy.core"), ("numpy.core", "numpy._core")])
def test_arrays_pickled_by_either_numpy_are_read(tmp_path, old, new):
    # Protocol 0 spells names out as lines of text, so that they can be exchanged.
    content = pickle.dumps((IMAGE, LABELS), 0).replace(old.encode(), new.encode())
    assert new.encode() in content
    path = tmp_path / "subject_1.pkl"
    path.write_bytes(content)
    np.testing.assert_array_equal(read_pickle(path)[1], LABELS)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    made, path = tmp_path / "made", tmp_path / "evil.pkl"
    content = pickle.dumps((IMAGE, LABELS, Trap(made)))
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"evil\.pkl is not a pickle of plain NumPy arrays"):
        read_pickle(path)
    assert not made.exists()
    pickle.loads(content)
    assert made.exists(), "the trap does not work, so that this test shows nothing"


def test_an_object_array_cannot_smuggle_anything_in(tmp_path):
    made, path = tmp_path / "made", tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps((np.array([Trap(made)], dtype=object), LABELS)))
    with pytest.raises(BadInput, match="plain NumPy arrays"):
        read_pickle(path)
    assert not made.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ((IMAGE, LABELS, IMAGE, LABELS), "holds 4 arrays"),
        (IMAGE, "holds a ndarray"),
        ((IMAGE, LABELS[:2]), r"labels of shape \(2, 4, 5\)"),
        ((IMAGE[0], LABELS[0]), "two 3-D arrays"),
        ((IMAGE, LABELS + 0.5), "not whole numbers"),
        ((np.where(IMAGE > 0.5, np.nan, IMAGE), LABELS), "NaN"),
        ((IMAGE, np.full(LABELS.shape, np.nan)), "NaN"),
        ((IMAGE.astype("U4"), LABELS), "arrays of numbers"),
    ],
)
def test_other_contents_are_refused(tmp_path, content, said):
    path = tmp_path / "subject_1.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(BadInput, match=f"subject_1.pkl .*{said}"):
        read_pickle(path)


def test_damaged_and_missing_files_are_named(tmp_path):
    path = tmp_path / "subject_1.pkl"
    with pytest.raises(BadInput, match=r"subject_1\.pkl does not exist"):
        read_pickle(path)
    path.write_bytes(pickle.dumps((IMAGE, LABELS))[:-40])
    with pytest.raises(BadInput, match=r"subject_1\.pkl is not a pickle"):
        read_pickle(path)
    path.write_text("a text")
    with pytest.raises(BadInput, match=r"subject_1\.pkl is not a pickle"):
        read_pickle(path)
