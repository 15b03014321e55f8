"""Images from label maps: what is drawn, what is made of it, in NumPy and on devices alike, and the loss on labels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage  # type: ignore[import-untyped]
from scipy.interpolate import BSpline  # type: ignore[import-untyped]

from dilformer_jax.data import generated, pipeline, synthesis
from dilformer_jax.data.phantoms import phantom
from dilformer_jax.data.preprocessing import decode_classes, load_image, load_labels
from dilformer_jax.io.volumes import BadInput, normalise
from dilformer_jax.ops import losses, similarities
from dilformer_jax.training import feeding, parallel

SHAPE = (32, 36, 40)
STILL, UNFLIPPED = np.zeros((3, 4), np.float32), np.zeros(3, bool)
# Nothing but the class means: no noise, no blur, no bias, all fluid kept, a curve that changes nothing.
PLAIN: dict[str, Any] = {
    "elastic": np.zeros((6, 6, 6, 3), np.float32),
    "bias": np.zeros((5, 5, 5), np.float32),
    "means": np.linspace(0, 0.99, len(synthesis.IDS) + 1, dtype=np.float32),
    "deviations": np.zeros(len(synthesis.IDS) + 1, np.float32),
    "curve": np.linspace(0, 1, synthesis.KNOTS, dtype=np.float32),
    "sigma": np.zeros(3, np.float32),
    "spacing": np.ones(3, np.float32),
    "strip": np.array([1, -1, 2, 2], np.float32),
    "surroundings": np.zeros(2, np.float32),
    "soft": np.bool_(False),
    "noise": np.float32(0),
    "gamma": np.float32(1),
    "kept": np.arange(len(synthesis.IDS) + 1, dtype=np.uint8),
}


def ids_of(seed: int) -> np.ndarray:
    """FreeSurfer's ids in the places of a phantom's structures, the fluid around the brain among them."""
    labels = phantom(seed, SHAPE)[1]
    names = np.array([0, 24, *synthesis.STRUCTURES])
    return names[labels % len(names)].astype(np.uint8)


def classes(seed: int = 0) -> np.ndarray:
    return synthesis.classes(ids_of(seed), "a map")


def rendered(
    maps: np.ndarray, *, affine: Any = STILL, flips: Any = UNFLIPPED, white: Any = None, **numbers: Any
) -> Any:
    white = np.zeros((2, *maps.shape), np.float32) if white is None else white
    return synthesis.rendered(np, maps, PLAIN | numbers, affine, flips, white)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("maps")
    for number in range(5):
        # Each in a frame of its own, as the public ones are.
        affine = np.diag([-1.0, -1, 1, 1])
        affine[0, 3] = number
        nib.save(nib.Nifti1Image(ids_of(number), affine), directory / f"seg_{number:02d}.nii.gz")
    return directory


# --- Classes ---


def test_each_structure_is_a_class() -> None:
    assert len(synthesis.IDS) == 32 and len(synthesis.STRUCTURES) == 31 and synthesis.IDS[synthesis.FLUID - 1] == 24
    ids = np.array([[[0, 24, 2, 41, 60, 16]]])
    assert synthesis.classes(ids, "x").tolist() == [[[0, 32, 1, 18, 31, 13]]]
    # Left and right are one kind, and so have one mean.
    assert synthesis.KIND[0] == synthesis.KIND[17] == 0 and synthesis.T1[synthesis.KIND[12]] == 0.81
    with pytest.raises(BadInput, match=r"seg_x has the label 77, of which no image is made; keep 2, 3, .* 24 and set"):
        synthesis.classes(np.full((2, 2, 2), 77), "seg_x")


# --- An image ---


def test_class_means_come_back() -> None:
    maps = classes()
    found = rendered(maps)
    values = PLAIN["means"][maps]
    expected = normalise(values, "percentile")
    np.testing.assert_allclose(found["image"], expected, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(found["labels"], np.where(maps == synthesis.FLUID, 0, maps))
    assert found["labels"].dtype == np.uint8 and set(np.unique(found["labels"])) <= {0, *np.unique(maps)}
    cortex = maps == synthesis.IDS.index(3) + 1
    assert cortex.any() and (found["clean"][cortex] == np.float32(0.64)).all() and not found["clean"][maps == 0].any()


def test_noise_has_the_deviation_of_its_structure() -> None:
    maps = np.full(SHAPE, 5, np.uint8)
    maps[:2] = 31  # the brightest, lest the noise be clipped away
    maps[2:4] = 1
    white = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    means, deviations = np.zeros(33, np.float32), np.zeros(33, np.float32)
    means[[1, 5, 31]], deviations[5] = (0.01, 0.5, 1.0), 0.03
    inner = np.s_[6:]
    image = rendered(maps, white=white, means=means, deviations=deviations)["image"]
    assert image[inner].mean() == pytest.approx((0.5 - 0.01) / 0.99, abs=2e-3)
    assert image[inner].std() == pytest.approx(0.03 / 0.99, rel=0.03)
    blurred = rendered(maps, white=white, means=means, deviations=deviations, sigma=np.ones(3, np.float32))["image"]
    assert blurred[inner].std() < 0.3 * image[inner].std()


def test_a_flip_is_a_mirror_image_and_a_shift_a_shift() -> None:
    maps, white = classes(), np.zeros((2, *SHAPE), np.float32)
    plain, mirrored = rendered(maps, white=white), rendered(maps, flips=np.array([True, False, False]))
    for name in plain:
        np.testing.assert_allclose(mirrored[name], plain[name][::-1], rtol=0, atol=1e-6)
    shift = np.zeros((3, 4), np.float32)
    shift[:, 3] = 2, 0, -3
    expected = np.zeros_like(maps)
    expected[:-2, :, 3:] = plain["labels"][2:, :, :-3]
    np.testing.assert_array_equal(rendered(maps, affine=shift)["labels"], expected)


def test_a_map_is_deformed_as_scipy_does_it() -> None:
    generator, maps = np.random.default_rng(1), classes()
    controls = generator.standard_normal((6, 7, 8, 3)).astype(np.float32)
    affine = (0.05 * generator.standard_normal((3, 4))).astype(np.float32)
    u = np.asarray(controls, float)
    for axis, (n, g) in enumerate(zip(SHAPE, controls.shape, strict=False)):
        # Control point k has its centre at k, and lies under the knots k - 2 to k + 2.
        basis = BSpline(np.arange(-2, g + 2), np.eye(g), 3)
        u = np.moveaxis(np.tensordot(basis(1 + np.arange(n) * (g - 3) / (n - 1)), u, axes=(1, axis)), 0, axis)
    np.testing.assert_allclose(np.moveaxis(synthesis.spline(np, controls, SHAPE), 0, -1), u, rtol=0, atol=1e-5)
    centre = (np.array(SHAPE) - 1) / 2
    away = np.moveaxis(np.indices(SHAPE), 0, -1) + u - centre
    place = away + away @ affine[:, :3].T + affine[:, 3] + centre
    expected = ndimage.map_coordinates(maps, np.moveaxis(place, -1, 0), order=0, cval=0, mode="constant")
    found = rendered(maps, elastic=controls, affine=affine)["labels"]
    # But where a place lies, but for rounding, between two voxels.
    assert (found != np.where(expected == synthesis.FLUID, 0, expected)).mean() < 1e-3


def test_blur_is_scipys_and_thick_slices_are_linear_between() -> None:
    x = np.random.default_rng(2).standard_normal(SHAPE).astype(np.float32)
    sigma = (1.5, 0.7, 1.0)
    expected = ndimage.gaussian_filter(x, sigma, mode="constant", truncate=8)
    found = synthesis.filtered(np, x, np.array(sigma), np.ones(3))
    inner = (slice(8, -8),) * 3
    np.testing.assert_allclose(found[inner], expected[inner], rtol=0, atol=2e-3)
    thick = synthesis.filtered(np, x, np.zeros(3), np.array([1.0, 4.0, 1.0]))
    np.testing.assert_allclose(thick[:, ::4], x[:, ::4], rtol=0, atol=1e-4)
    np.testing.assert_allclose(thick[:, 5], 0.75 * x[:, 4] + 0.25 * x[:, 8], rtol=0, atol=1e-4)


def test_coarse_images_are_so_along_all_axes() -> None:
    options = synthesis.OPTIONS | {"coarse": 1.0, "coarseness": 3.0, "thick": 0.0, "blur": 0.0}
    for voxel in ((1.0, 1.0, 1.0), (1.0, 1.5, 0.5)):
        found = [synthesis.drawn(np.random.default_rng(seed), options, voxel) for seed in range(40)]
        samples = np.concatenate([numbers["spacing"] for numbers in found]) * voxel
        distance = samples[:, 2]  # of voxels that are never larger
        assert 2.5 < distance.max() <= 3 and 1 <= distance.min() < 1.5 and abs(distance.mean() - 2) < 0.2
        # But for axes whose voxels are farther apart as it is.
        np.testing.assert_allclose(samples, np.maximum(distance[:, None], voxel), rtol=1e-5)
        np.testing.assert_allclose(found[0]["sigma"], 0.4 * (found[0]["spacing"] - 1), rtol=1e-6)
    never = synthesis.drawn(np.random.default_rng(0), options | {"coarse": 0.0}, (1.0, 1.0, 1.0))
    assert (never["spacing"] == 1).all()


def test_fluid_far_from_the_brain_is_cut_off_and_surroundings_lie_around_it() -> None:
    maps = np.full(SHAPE, synthesis.FLUID, np.uint8)
    maps[10:20, 10:20, 10:20] = 1
    maps[14:16, 14:16, 14:16] = synthesis.FLUID
    means = np.zeros(33, np.float32)
    maps[12, 12, 12] = 2
    means[1], means[2], means[synthesis.FLUID] = 1.0, 0.2, 0.4
    cut = rendered(maps, means=means, strip=np.array([2, 0.5, 1, 1], np.float32))["image"]
    assert cut[14, 14, 14] == pytest.approx(0.25, abs=1e-4) and not cut[:9].any() and not cut[22:].any()
    strip, shells = np.array([2, 0.3, 0.1, 0.01], np.float32), np.array([0.2, 0.8], np.float32)
    image = rendered(maps, means=means, strip=strip, surroundings=shells)["image"]
    line = image[15, 15].round(3)  # from the middle outwards: brain, fluid, a dark band, a bright one, nothing
    changes = [value for k, value in enumerate(line[19:]) if not k or value != line[18 + k]]
    scaled = lambda value: pytest.approx((value - 0.2) / 0.8, abs=1e-3)
    assert changes == [scaled(1.0), scaled(0.4), scaled(0.2), scaled(0.8), 0.0]


def test_a_structure_that_is_cut_off_is_in_nothing() -> None:
    maps = classes()
    gone = int(maps[maps != synthesis.FLUID].max())
    kept = PLAIN["kept"].copy()
    kept[gone] = 0
    found = rendered(maps, kept=kept)
    assert (maps == gone).any() and not any(x[maps == gone].any() for x in found.values())


# --- What is drawn ---


def test_a_pair_is_a_function_of_its_generator() -> None:
    draw = lambda seed, **o: synthesis.drawn(np.random.default_rng(seed), synthesis.options_of(o), (1.0, 1.0, 1.0))
    first, again, other = draw(3), draw(3), draw(4)
    assert first.keys() == other.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        assert first[name].shape == other[name].shape and first[name].dtype == other[name].dtype
    assert (first["means"] != other["means"]).any() and (first["key"] != other["key"]).any()


def test_probabilities_and_lengths_are_kept() -> None:
    options = synthesis.options_of({"shared_contrast": 0.3, "t1": 0.6, "without_below": 0.25, "deformation": 4.0})
    generator = np.random.default_rng(0)
    pairs = [synthesis.drawn(generator, options, (2.0, 2.0, 2.0)) for _ in range(600)]
    share = lambda told: pytest.approx(np.mean([told(pair) for pair in pairs]), abs=0.06)
    assert share(lambda pair: (pair["means"][0] == pair["means"][1]).all()) == 0.3
    assert share(lambda pair: (pair["kept"] != np.arange(33)).sum() == 2 * 6) == 0.25
    assert share(lambda pair: np.corrcoef(pair["means"][0, 1:], synthesis.CLEAN[1:])[0, 1] > 0.85) == 0.6
    # In voxels of 2 mm: uniform from 0 to 4 mm, whose mean square is a third of its largest.
    assert np.mean([pair["elastic"] ** 2 for pair in pairs]) == pytest.approx(2**2 / 3, rel=0.1)


@pytest.mark.parametrize(
    ("options", "told"), [({"blurr": 1}, "has no 'blurr'; it has t1,"), ({"noise": -1}, "noise is -1; make it 0 or")]
)
def test_options_that_cannot_be_are_refused(options: Mapping[str, Any], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        synthesis.options_of(options)


# --- The data set, its stream, and the devices ---


def test_label_maps_are_a_data_set(folder: Path) -> None:
    dataset = generated.label_maps(folder, validation=2, synthesis={"noise": 0.1})
    assert (len(dataset.train), len(dataset.validation), len(dataset.labels)) == (6, 2, 31)
    assert dataset.synthesis == synthesis.OPTIONS | {"noise": 0.1}
    subject = dataset.validation[0].fixed
    image, labels = load_image(subject, {"normalise": "percentile"})[..., 0], load_labels(subject, {})
    maps = classes(4)
    np.testing.assert_array_equal(labels, ids_of(4))
    np.testing.assert_array_equal(image, normalise(synthesis.t1_like(maps, 4), "percentile"))
    np.testing.assert_array_equal(decode_classes(subject, {"downsample": 2}), maps[1::2, 1::2, 1::2])
    with pytest.raises(BadInput, match="5 of them seg_.*, and 4 are for validation; give two"):
        generated.label_maps(folder)


def test_what_the_devices_make_is_what_numpy_makes(folder: Path) -> None:
    """Of the numbers that come with a batch, whatever their step, and of the same noise."""
    mesh = parallel.mesh(2 if jax.device_count() % 2 == 0 else 1)
    pairs = generated.label_maps(folder, validation=2).train
    maps = feeding.upload(pairs, {}, SHAPE, parallel.replicated(mesh), classes=True)
    assert maps.volumes.dtype == jnp.uint8
    feed = feeding.feeder(mesh, parallel.slabs(mesh, SHAPE[0], 4), maps)
    how: Any = {"flips": (0,), "affine": (0.05, 0.02), "synthesis": synthesis.options_of({"controls": 6})}
    stream = lambda start: pipeline.batches(pairs, {}, batch_size=2, seed=1, start_step=start, images=False, **how)
    with stream(0) as batches, stream(1) as later:
        first, batch, resumed = next(batches), next(batches), next(later)
    for name in batch:
        np.testing.assert_array_equal(batch[name], resumed[name])
    assert (first["means"] != batch["means"]).any()
    made = feed(batch)
    image = jax.ShapeDtypeStruct((2, *SHAPE, 1), jnp.float32)
    told = feeding.shapes(image, made=True, labelled=True)
    assert {name: (x.shape, x.dtype) for name, x in made.items()} == {
        name: (x.shape, x.dtype) for name, x in told.items()
    }
    for k, index in enumerate(batch["index"]):
        key = jax.random.wrap_key_data(jnp.asarray(batch["key"][k]))
        for role, subject in enumerate((pairs[index].fixed, pairs[index].moving)):
            numbers = {name: batch[name][k, role] for name in PLAIN}
            white = np.asarray(jax.random.normal(jax.random.fold_in(key, role), (2, *SHAPE)))
            source = decode_classes(subject, {})
            flips, affine = batch["flips"][k], batch["affine"][k, role]
            expected = synthesis.rendered(np, source, numbers, affine, flips, white)
            name = ("fixed", "moving")[role]
            # Rounding puts a few places, and a few thresholds, on the other side.
            labels = np.asarray(made[f"{name}_labels"][k, ..., 0])
            assert (labels != expected["labels"]).mean() < 1e-3
            assert np.median(np.abs(made[name][k, ..., 0] - expected["image"])) < 1e-4
            assert (np.abs(made[name][k, ..., 0] - expected["image"]) > 1e-2).mean() < 0.01


# --- The loss ---


def dice_by_hand(fixed: np.ndarray, moved: np.ndarray, count: int) -> float:
    """Mean over the labels of the fixed map, of shares of 2x2x2 blocks, by NumPy."""
    blocks = lambda x: x.reshape(4, 2, 4, 2, 4, 2).mean((1, 3, 5))
    found = []
    for label in range(1, count + 1):
        f, m = blocks(fixed == label), blocks(moved == label)
        if f.any():
            found.append(2 * (f * m).sum() / (f.sum() + m.sum()))
    return float(np.mean(found))


def test_overlap_is_that_of_numpy_and_its_gradient_aligns() -> None:
    generator = np.random.default_rng(5)
    fixed = generator.integers(0, 4, (2, 8, 8, 8, 1)).astype(np.uint8)
    moving = np.roll(fixed, -2, 1)
    fixed[1][fixed[1] == 3] = 0  # absent from one: in no mean
    still = jnp.zeros((2, 4, 4, 4, 3))
    overlap = jax.jit(lambda u: similarities.label_overlap(jnp.asarray(fixed), jnp.asarray(moving), u, 3))
    by_hand = lambda moved: np.mean([dice_by_hand(f, m, 3) for f, m in zip(fixed[..., 0], moved[..., 0], strict=True)])
    assert overlap(still) == pytest.approx(by_hand(moving), abs=1e-6)
    # A voxel of 2x2x2 along the first axis, padded with the border's shares.
    along = np.concatenate([moving[:, 2:], moving[:, -2:]], axis=1)
    assert overlap(still.at[..., 0].set(1.0)) == pytest.approx(by_hand(along), abs=1e-6)


def test_the_loss_has_labels_where_there_are_some() -> None:
    generator = np.random.default_rng(6)
    image = lambda: jnp.asarray(generator.uniform(size=(1, 8, 8, 8, 1)), jnp.float32)
    label = lambda: jnp.asarray(generator.integers(0, 4, (1, 8, 8, 8, 1)), jnp.uint8)
    fixed, moving, u = image(), image(), jnp.zeros((1, 4, 4, 4, 3))
    options: Any = {
        "finest": 1, "weights": (1.0,), "windows": (3,), "similarity": "lncc", "regulariser": "diffusion",
        "regulariser_weight": 1.0, "border": "cut",
    }  # fmt: skip
    labels = {"fixed_labels": label(), "moving_labels": label()}
    plain, parts = losses.multi_resolution(fixed, moving, [u], **options)
    whole, more = losses.multi_resolution(fixed, moving, [u], **options, **labels, label_count=3, label_weight=2.5)
    overlap = similarities.label_overlap(labels["fixed_labels"], labels["moving_labels"], u, 3)
    assert 0.1 < overlap < 0.9 and more == parts | {"overlap": overlap}
    assert float(whole) == pytest.approx(float(plain + 2.5 * (1 - overlap)), abs=1e-6)
