"""A network as a predictor: what it sees of files, and where its displacement lies in them."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from toys import TINY, Constant, image, predictor, tiny_bundle

from dilformer_jax import models
from dilformer_jax.data.preprocessing import prepared, resolved
from dilformer_jax.io import bundle
from dilformer_jax.io.volumes import BadInput
from dilformer_jax.registration import pipeline
from dilformer_jax.registration.predictor import load_predictor, read_config
from dilformer_jax.training import checkpoint


class Ramp(Constant):
    """u = params['shift'] * (i + 1/2) along axis 0, i being the voxel at half resolution."""

    def apply(self, variables, fixed, moving):
        shape = [size // 2 for size in fixed.shape[1:4]]
        return (
            jnp.broadcast_to((jnp.arange(shape[0]) + 0.5)[:, None, None, None], (1, *shape, 3))
            * variables["params"]["shift"],
        )


class Seen(Constant):
    """Gives back what it was given: the fixed image, the moving image and 1."""

    downsampling = 2

    def apply(self, variables, fixed, moving):
        return (jnp.concatenate([fixed, moving, jnp.ones_like(fixed)], axis=-1),)


def test_displacement_is_in_voxels_of_the_files_whatever_the_downsampling():
    network = predictor(Constant(), (1.0, -0.5, 0.25), downsample=2)
    u = network.displacement(image((17, 22, 19)), image((17, 22, 19), 1))
    assert u.shape == (17, 22, 19, 3) and u.dtype == np.float32
    np.testing.assert_allclose(u, np.broadcast_to([4.0, -2.0, 1.0], u.shape), rtol=1e-6)
    assert network.module.traced == [(1, 12, 12, 12, 1)]  # 17, 22, 19 -> 24, 24, 24, halved
    network.displacement(image((17, 22, 19), 2), image((17, 22, 19), 3))
    assert len(network.module.traced) == 1, "compiled twice for one shape"
    network.displacement(image((16, 22, 19)), image((16, 22, 19)))
    assert network.module.traced[1:] == [(1, 8, 12, 12, 1)]


def test_displacement_keeps_its_place_on_the_way_up():
    # Half-pixel: voxel i at half resolution lies at 2i + 1/2, so i + 1/2 is (x + 1/2) / 2; a vector counts double.
    u = predictor(Ramp(), (0.3, 0.0, -0.1)).displacement(image((18, 8, 9)), image((18, 8, 9), 1))
    x = np.arange(1, 17)[:, None, None, None]
    np.testing.assert_allclose(u[1:17], np.broadcast_to((x + 0.5) * [0.3, 0, -0.1], (16, 8, 9, 3)), atol=1e-5)


def test_network_sees_normalised_images_continued_at_their_ends():
    fixed, moving = image((7, 8, 9)), image((7, 8, 9), 1) * 3
    u = predictor(Seen()).displacement(fixed, moving)
    np.testing.assert_allclose(u[..., 0], fixed / fixed.max(), rtol=1e-6)
    np.testing.assert_allclose(u[..., 1], moving / moving.max(), rtol=1e-6)
    averaged = prepared(fixed, resolved({"normalise": "none", "downsample": 2}), "f", multiple=2)
    assert averaged.shape == (4, 4, 6, 1)
    padded = fixed[np.ix_([0, 1, 2, 3, 4, 5, 6, 6], range(8), [*range(9), 8, 8, 8])]
    naive = [
        [[padded[2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2].mean() for k in range(6)] for j in range(4)]
        for i in range(4)
    ]
    np.testing.assert_allclose(averaged[..., 0], naive, rtol=1e-6)
    with pytest.raises(BadInput, match=r"f.nii is 7x8x9 after cropping, which downsample=2 does not divide"):
        prepared(fixed, resolved({"downsample": 2}), "f.nii")


def test_cropping_is_undone_in_both_images():
    fixed, moving = (np.zeros((20, 24, 16), np.float32) for _ in range(2))
    fixed[6:14, 4:12, 5:11], moving[3:11, 9:17, 5:11] = image((8, 8, 6)), image((8, 8, 6))
    # The boxes are cut around the brains, so that a network which sees no difference moves by the boxes' distance.
    still = predictor(Constant(), crop_to=(8, 8, 8)).displacement(fixed, moving)
    np.testing.assert_array_equal(still, np.broadcast_to([-3, 5, 0], still.shape))
    moved = pipeline.warp_image(moving, still)
    np.testing.assert_array_equal(moved[6:14, 4:12, 5:11], fixed[6:14, 4:12, 5:11])
    ramp = predictor(Ramp(), (0.2, 0.0, 0.0), crop_to=(8, 8, 8)).displacement(fixed, moving)
    inner = np.arange(7, 13)[:, None, None]
    np.testing.assert_allclose(ramp[7:13, ..., 0], np.broadcast_to((inner - 6 + 0.5) * 0.2 - 3, (6, 24, 16)), atol=1e-5)
    np.testing.assert_array_equal(ramp[:6], np.broadcast_to(ramp[6], (6, 24, 16, 3)))  # continued by the border value
    np.testing.assert_array_equal(ramp[14:], np.broadcast_to(ramp[13], (6, 24, 16, 3)))


def test_too_small_for_the_network():
    small = predictor(Constant(), downsample=2)
    with pytest.raises(BadInput, match=r"a.nii is 9x8x30, too small for toy, which needs 9 voxels or more"):
        small.displacement(image((9, 8, 30)), image((9, 8, 30)), ("a.nii", "b.nii"))
    assert small.displacement(image((9, 9, 9)), image((9, 9, 9), 1)).shape == (9, 9, 9, 3)
    with pytest.raises(ValueError, match="both lie on one grid"):
        small.displacement(image((9, 9, 9)), image((9, 9, 10)))
    with pytest.raises(BadInput, match=r"b.nii: intensities from 0 to -1"):
        small.displacement(image((9, 9, 9)), np.full((9, 9, 9), -1, np.float32), ("a.nii", "b.nii"))


class Told(Constant):
    """Moves by params['shift'] times the smoothness that it is told."""

    smoothness = (0.5, 2.0)

    def apply(self, variables, fixed, moving, smoothness):
        return super().apply({"params": {"shift": variables["params"]["shift"] * smoothness}}, fixed, moving)


def test_a_network_is_asked_for_a_smoothness():
    network = predictor(Told(), (1.0, -0.5, 0.25))
    pair = image((17, 22, 19)), image((17, 22, 19), 1)
    usual = network.displacement(*pair)
    np.testing.assert_allclose(usual[3, 4, 5], [2.0, -1.0, 0.5], rtol=1e-6)
    smoother = network.with_smoothness(1.5)
    np.testing.assert_allclose(smoother.displacement(*pair), 1.5 * usual, rtol=1e-6)
    assert len(network.module.traced) == 1, "compiled anew for a number"
    assert smoother.asked == {"smoothness": 1.5} and network.with_smoothness(None) is network
    with pytest.raises(BadInput, match="smoothness is 3 and toy was trained for from 0.5 to 2; give such a one"):
        network.with_smoothness(3.0)
    with pytest.raises(BadInput, match="toy was trained for no smoothness but its own, 1"):
        predictor(Constant()).with_smoothness(2.0)
    assert predictor(Constant()).asked == {}


def test_load_predictor(inputs: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="either weights or a workdir"):
        load_predictor()
    with pytest.raises(BadInput, match=r"config.json cannot be read"):
        load_predictor(workdir=tmp_path)
    tiny_bundle(tmp_path / "w", network={"name": "voxelmorph", "options": {"lost": 1}})
    with pytest.raises(BadInput, match=r"that this version cannot make \(The network voxelmorph has no option 'lost'"):
        load_predictor(weights=tmp_path / "w")
    assert load_predictor(weights=inputs / "weights").module == models.create("voxelmorph", **TINY)


def test_a_workdir_and_its_bundle_are_the_same_network(inputs: Path, tmp_path: Path, monkeypatch):
    params, description = bundle.load(inputs / "weights")
    data = {"name": "phantoms", "options": {"shape": [40, 40, 40]}, "preprocessing": description["preprocessing"]}
    (tmp_path / "config.json").write_text(json.dumps({"model": description["network"], "data": data}))
    monkeypatch.setattr(checkpoint, "restore_params", lambda folder, which: (params, {"best": 3}[which]))
    run, shipped = load_predictor(workdir=tmp_path), load_predictor(inputs / "weights")
    assert run.module == shipped.module and run.sha256 == shipped.sha256 and run.preprocessing == shipped.preprocessing
    np.testing.assert_array_equal(*(p.displacement(image((9, 8, 7)), image((9, 8, 7), 1)) for p in (run, shipped)))
    assert read_config(tmp_path)["data"]["options"] == {"shape": (40, 40, 40)}
    assert run.grid is None and shipped.grid == description["grid"]
    (tmp_path / "run.json").write_text(json.dumps({"grid": description["grid"]}))
    assert load_predictor(workdir=tmp_path).grid == description["grid"]
