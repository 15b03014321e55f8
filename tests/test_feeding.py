"""Images on the devices: the same pairs, varied by the same numbers, as NumPy and SciPy make of the files."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage  # type: ignore[import-untyped]

from dilformer_jax.data.pipeline import batches, load
from dilformer_jax.data.subjects import Pair, Subject, ordered_pairs
from dilformer_jax.io.volumes import BadInput
from dilformer_jax.training import feeding, parallel

SHAPE = (7, 8, 6)
PREPROCESSING = {"normalise": "none"}
# Two devices share each volume, and so hold five planes of seven: the last three are zeros.
MESH = parallel.mesh(2)
SPLIT = parallel.slabs(MESH, 7, 5)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, ...]:
    folder = tmp_path_factory.mktemp("volumes")
    for number in range(3):
        generator = np.random.default_rng(number)
        image, labels = generator.uniform(0.5, 1, SHAPE), generator.choice([0, 7, 30, 31, 200], SHAPE)
        (folder / f"{number}.pkl").write_bytes(pickle.dumps((image, labels)))
    return ordered_pairs([Subject(f"{n}", folder / f"{n}.pkl", folder / f"{n}.pkl") for n in range(3)])


@pytest.fixture(scope="module")
def resident(pairs: tuple[Pair, ...]) -> feeding.Resident:
    return feeding.upload(pairs, PREPROCESSING, SHAPE, parallel.replicated(MESH))


def seen(image: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The image (d, h, w) at x + A (x - c) + t, by SciPy in float64."""
    centre, matrix = (np.array(image.shape) - 1) / 2, np.eye(3) + affine[:, :3]
    offset = centre - matrix @ centre + affine[:, 3]
    return ndimage.affine_transform(image.astype(np.float64), matrix, offset, order=1)


@pytest.mark.parametrize(
    "how", [{}, {"flips": (0, 2)}, {"flips": (2, 1), "affine": (0.1, 0.05), "gamma": 0.4}], ids=str
)
@pytest.mark.parametrize("on_devices", [False, True], ids=["streamed", "resident"])
def test_a_batch_is_what_numpy_makes_of_the_files(
    pairs: tuple[Pair, ...], resident: feeding.Resident, how: dict[str, Any], on_devices: bool
) -> None:
    feed = feeding.feeder(MESH, SPLIT, resident if on_devices else None)
    numbers, images = (
        batches(pairs, PREPROCESSING, batch_size=8, seed=5, images=images, **how) for images in (False, True)
    )
    with numbers, images:
        for _ in range(2):
            told = next(numbers)
            made = feed(told if on_devices else next(images))
            assert made.keys() == {"fixed", "moving"}
            for column, role in enumerate(made):
                assert (
                    made[role].sharding.is_equivalent_to(parallel.sharded(MESH), 5) and made[role].dtype == np.float32
                )
                for k, index in enumerate(told["index"]):
                    image = load(getattr(pairs[index], role), PREPROCESSING)[0][..., 0]
                    if "flips" in how:
                        image = np.flip(image, np.flatnonzero(told["flips"][k]))
                    if "affine" in how:
                        image = seen(image, told["affine"][k, column])
                        assert 0 < (image == 0).mean() < 0.9  # what comes from outside
                    if "gamma" in how:
                        image = image ** told["power"][k, column]
                    found, beyond = np.split(np.asarray(made[role][k, ..., 0]), [SHAPE[0]])
                    assert beyond.shape[0] == 3 and not beyond.any()
                    np.testing.assert_allclose(found, image, rtol=0, atol=1e-6 if "affine" in how else 0)


def test_label_maps_come_along_with_their_images(pairs: tuple[Pair, ...]) -> None:
    """As classes of the ids asked for, nearest to where the image is read."""
    ids = (200, 7, 31)
    labelled = feeding.upload(pairs, PREPROCESSING, SHAPE, parallel.replicated(MESH), ids=ids)
    feed = feeding.feeder(MESH, SPLIT, labelled)
    how: Any = {"flips": (1, 2), "affine": (0.1, 0.05)}
    with batches(pairs, PREPROCESSING, batch_size=8, seed=3, images=False, **how) as numbers:
        told = next(numbers)
    made = feed(told)
    image = jax.ShapeDtypeStruct((8, 10, *SHAPE[1:], 1), np.float32)
    expected = feeding.shapes(image, made=False, labelled=True)
    assert {name: (x.shape, x.dtype) for name, x in made.items()} == {
        n: (x.shape, x.dtype) for n, x in expected.items()
    }
    for column, role in enumerate(("fixed", "moving")):
        for k, index in enumerate(told["index"]):
            source = load(getattr(pairs[index], role), PREPROCESSING)[1]
            classes = sum((number * (source == label) for number, label in enumerate(ids, 1)), np.zeros(SHAPE, int))
            classes = np.flip(classes, np.flatnonzero(told["flips"][k]))
            affine = told["affine"][k, column].astype(np.float64)
            centre, matrix = (np.array(SHAPE) - 1) / 2, np.eye(3) + affine[:, :3]
            offset = centre - matrix @ centre + affine[:, 3]
            nearest = ndimage.affine_transform(classes, matrix, offset, order=0, mode="grid-constant")
            found = np.asarray(made[f"{role}_labels"][k, : SHAPE[0], ..., 0])
            assert (found != nearest).mean() < 0.01 and len(np.unique(found)) == 4  # halves may round either way
    bare = [Pair(Subject("a", pairs[0].fixed.image, None), pairs[0].moving)]
    with pytest.raises(BadInput, match=r"\d.pkl has no label map, which loss.label_weight needs"):
        feeding.upload(bare, PREPROCESSING, SHAPE, parallel.replicated(MESH), ids=ids)


def test_a_large_map_and_none() -> None:
    image = jax.random.uniform(jax.random.key(0), (2, 20, 24, 17, 1), minval=1.0)
    affine = 0.3 * jax.random.normal(jax.random.key(1), (2, 3, 4))
    expected = np.stack([seen(*case) for case in zip(np.asarray(image)[..., 0], np.asarray(affine), strict=True)])
    still = jnp.zeros((2, 3), bool)
    np.testing.assert_allclose(feeding.resampled(image, still, affine)[..., 0], expected, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(feeding.resampled(image, still, 0 * affine), image)


def test_devices_make_their_own_examples(resident: feeding.Resident) -> None:
    """Nothing is sent between them, and no device makes another's."""
    numbers = {"rows": resident.rows[:4], "affine": np.zeros((4, 2, 3, 4), np.float32)}
    program = feeding.assembly(MESH, SPLIT).lower(resident.volumes, None, {}, numbers)
    text = program.compile().as_text()
    assert "f32[2,5,8,6,1]" in text and "f32[4," not in text
    assert not any(word in text for word in ("all-gather", "all-reduce", "collective-permute", "all-to-all"))


def test_each_subject_is_there_once(pairs: tuple[Pair, ...], resident: feeding.Resident) -> None:
    assert resident.volumes.shape == (3, *SHAPE, 1) and resident.volumes.sharding.is_fully_replicated
    for pair, rows in zip(pairs, resident.rows, strict=True):
        for subject, row in zip((pair.fixed, pair.moving), rows, strict=True):
            np.testing.assert_array_equal(resident.volumes[row], load(subject, PREPROCESSING)[0])


def test_what_does_not_fit_is_refused(pairs: tuple[Pair, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: Any = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 16 * 10**9}, device_kind="a GPU")
    feeding.check_room(290, (160, 192, 224), gpu)
    with pytest.raises(BadInput, match=r"needs 8\.1 GB for 295 volumes and may take 8\.0 GB of a GPU's 16\.0 GB; set"):
        feeding.check_room(295, (160, 192, 224), gpu)
    monkeypatch.setattr(feeding, "HOST_BYTES", 1000)
    with pytest.raises(BadInput, match="data.cache='device' .* the host's memory; set data.cache to a folder"):
        feeding.upload(pairs, PREPROCESSING, SHAPE, parallel.replicated(MESH))
    monkeypatch.undo()
    odd = tmp_path / "odd.pkl"
    odd.write_bytes(pickle.dumps((np.ones((4, 4, 4)), np.zeros((4, 4, 4), int))))
    with pytest.raises(BadInput, match=r"odd\.pkl is 4x4x4 after preprocessing while the other images are 7x8x6"):
        feeding.upload(
            [Pair(pairs[0].fixed, Subject("odd", odd, odd))], PREPROCESSING, SHAPE, parallel.replicated(MESH)
        )
