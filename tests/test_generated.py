"""Data sets that are made: phantoms are written once."""

import json

import nibabel as nib
import numpy as np
import pytest
from brains import names, write

from dilformer_jax.data import phantoms as phantom_module
from dilformer_jax.data.generated import phantoms
from dilformer_jax.io.volumes import BadInput, read_image, read_labels


def test_phantoms_are_written_once_and_read_back(tmp_path, monkeypatch):
    directory = tmp_path / "phantoms"
    dataset = phantoms(directory, train=2, validation=1, shape=(32, 33, 34), seed=3)
    assert names(dataset.train) == ["phantom_000_to_phantom_001", "phantom_001_to_phantom_000"]
    assert dataset.validation == () and dataset.labels == tuple(sorted(phantom_module.LABELS))
    assert {path.name for path in directory.iterdir()} == {
        "phantoms.json", *(f"phantom_00{n}_{kind}.nii.gz" for n in range(3) for kind in ("t1", "seg"))
    }  # fmt: skip
    subject = dataset.train[0].moving
    image, labels = phantom_module.phantom(3_000_000, (32, 33, 34))
    np.testing.assert_array_equal(read_image(subject.image).array, image)
    np.testing.assert_array_equal(read_labels(subject.labels).array, labels)
    assert nib.load(subject.labels).get_data_dtype() == np.uint8
    np.testing.assert_array_equal(nib.load(subject.image).affine, np.eye(4))

    times = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    gone = dataset.train[0].fixed.image
    gone.unlink()
    made = []

    def phantom(seed, shape):
        made.append(seed)
        return image, labels

    monkeypatch.setattr("dilformer_jax.data.generated.phantom", phantom)
    assert phantoms(directory, train=2, validation=1, shape=(32, 33, 34), seed=3) == dataset
    assert made == [3_000_001] and gone.is_file()
    kept = [path for path in times if "001" not in path.name]
    assert len(kept) == 5 and all(path.stat().st_mtime_ns == times[path] for path in kept)


def test_phantoms_made_otherwise_are_refused(tmp_path):
    (tmp_path / "phantoms.json").write_text(json.dumps({"shape": [64, 80, 64], "seed": 0}))
    with pytest.raises(BadInput, match=r"holds phantoms made with .*80.*'seed': 0.* not .*'seed': 1"):
        phantoms(tmp_path, seed=1)
    with pytest.raises(BadInput, match=r"not \{'shape': \[32, 32, 32\], 'seed': 0\}"):
        phantoms(tmp_path, shape=(32, 32, 32))
    (tmp_path / "phantoms.json").unlink()
    write(tmp_path / "phantom_000_t1.nii.gz")
    with pytest.raises(BadInput, match="not recorded"):
        phantoms(tmp_path)
    with pytest.raises(BadInput, match="32 voxels or more"):
        phantoms(tmp_path / "new", shape=(64, 16, 64))
    assert not (tmp_path / "new").exists()
