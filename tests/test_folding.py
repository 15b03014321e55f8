"""Folding against closed forms, naive loops over voxels and tetrahedra, and stored numbers."""

import itertools

import jaxtyping
import numpy as np
import pytest
from scipy import ndimage

from dilformer_jax.ops import folding


@pytest.fixture
def unchecked():
    """The functions as users have them, without the test run's shape checks in front of their own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def affine_displacement(matrix: np.ndarray, shape: tuple[int, int, int] = (6, 7, 8)) -> np.ndarray:
    """u with x + u(x) = matrix @ x."""
    points = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float64) for n in shape), indexing="ij"), axis=-1)
    return (points @ (matrix - np.eye(3)).T).astype(np.float32)


def ragged(seed: int, size: float, shape: tuple[int, int, int] = (7, 6, 8)) -> np.ndarray:
    """A displacement that folds here and there, from whole numbers of eighths: exact in single precision."""
    return np.random.default_rng(seed).integers(-8, 9, (*shape, 3)).astype(np.float32) * (size / 8)


def naive_ndv(displacement: np.ndarray, mask: np.ndarray) -> float:
    """Over each voxel of the cropped mask and the ten tetrahedra at it, by the volume of their four images."""
    points = displacement.astype(np.float64) + np.stack(np.indices(displacement.shape[:3]), axis=-1)
    signs = list(itertools.product((-1, 1), repeat=3))
    corners = [np.diag(sign) for sign in signs]
    middles = [sign * np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]]) for sign in (-1, 1)]
    volume = voxels = 0.0
    for voxel in itertools.product(*(range(1, n - 1) for n in mask.shape)):
        if not mask[voxel]:
            continue
        voxels += 1
        for steps in [*corners, *middles]:
            vertices = [voxel, *(tuple(np.add(voxel, step)) for step in steps)]
            before, after = (
                np.linalg.det([[*place(vertex), 1.0] for vertex in vertices]) / 6
                for place in (lambda vertex: vertex, lambda vertex: points[vertex])
            )
            if before * after < 0:  # it is turned over
                volume += abs(after) / 2
    return 100 * volume / voxels


MATRICES = {
    "shear and scale": np.array([[1.2, 0.3, -0.1], [0.05, 0.8, 0.2], [-0.3, 0.1, 1.1]]),
    "rotation": np.array([[np.cos(0.4), -np.sin(0.4), 0], [np.sin(0.4), np.cos(0.4), 0], [0, 0, 1]]),
    "reflection": np.diag([-0.5, 1.5, 1.0]),
}


@pytest.mark.parametrize("name", MATRICES)
def test_jacobian_of_an_affine_map_is_its_determinant(name):
    displacement = affine_displacement(MATRICES[name])
    determinant = folding.jacobian_determinant(displacement)
    assert determinant.dtype == np.float32, "no silent copy in double precision"
    assert determinant.shape == (6, 7, 8)
    np.testing.assert_allclose(determinant, np.linalg.det(MATRICES[name]), atol=1e-5)
    assert folding.folding_percent(displacement) == (100.0 if name == "reflection" else 0.0)
    assert folding.sdlogj(affine_displacement(MATRICES[name])) == pytest.approx(0, abs=1e-5)
    # The tetrahedra at a voxel take up two voxels' volume, halved to one, and 0.75 of it in the reflection.
    assert folding.ndv_percent(displacement) == pytest.approx(75 if name == "reflection" else 0, abs=1e-4)


@pytest.mark.parametrize("slab", [1, 100, 1 << 16])
def test_jacobian_of_a_quadratic_field_has_its_closed_form(slab, monkeypatch):
    # u_0 = x²/20, u_1 = xy/10, u_2 = z/2: inside, det = (1 + x/10)(1 + x/10)(3/2); at the face x = 0 the one-sided
    # difference of x²/20 is 1/20, so the first factor is 1.05 there and 1 + (n - 1)/10 - 1/20 at the other face.
    monkeypatch.setattr(folding, "SLAB", slab)
    n = 9
    x, y, z = np.meshgrid(*(np.arange(n, dtype=np.float64),) * 3, indexing="ij")
    displacement = np.stack([x**2 / 20, x * y / 10, z / 2], axis=-1)
    first = 1 + x / 10
    first[0] += 0.05
    first[-1] -= 0.05
    np.testing.assert_allclose(folding.jacobian_determinant(displacement), first * (1 + x / 10) * 1.5)


def test_jacobian_takes_the_differences_of_numpy():
    displacement = np.random.default_rng(1).normal(size=(6, 5, 7, 3))
    gradients = [np.gradient(displacement[..., axis]) for axis in range(3)]
    matrices = np.moveaxis(np.array(gradients), (0, 1), (-2, -1)) + np.eye(3)
    np.testing.assert_allclose(folding.jacobian_determinant(displacement), np.linalg.det(matrices), atol=1e-12)


def test_folding_counts_the_voxels_that_turn_over():
    # x + u runs 0 1 2 3 2 1 0 1 2 3: central differences are negative at four of ten planes (0 counts as folded too).
    run = np.array([0, 1, 2, 3, 2, 1, 0, 1, 2, 3], np.float32)
    displacement = np.zeros((10, 4, 5, 3), np.float32)
    displacement[..., 0] = (run - np.arange(10))[:, None, None]
    slope = np.array([1, 1, 1, 0, -1, -1, 0, 1, 1, 1])
    np.testing.assert_array_equal(folding.jacobian_determinant(displacement)[:, 2, 3], slope)
    np.testing.assert_array_equal(folding.folded(displacement)[:, 0, 0], slope <= 0)
    assert folding.folding_percent(displacement) == pytest.approx(40)
    # Of the planes 2 to 4 and half of plane 5.
    mask = np.zeros((10, 4, 5), bool)
    mask[2:5] = True
    mask[5, :2] = True
    assert folding.folding_percent(displacement, mask=mask) == pytest.approx(100 * 2.5 / 3.5)
    assert np.isnan(folding.folding_percent(displacement, mask=np.zeros_like(mask)))
    # The three steps from 3 down to 0 are turned over, and half of each belongs to the voxel at either end of it.
    assert folding.ndv_percent(displacement) == pytest.approx(100 * (0.5 + 1 + 1 + 0.5) / 8)
    assert folding.ndv_percent(displacement, mask) == pytest.approx(100 * (0.5 + 1 + 1 * 0.5) / 3.5)
    assert np.isnan(folding.ndv_percent(displacement, np.zeros_like(mask)))


def test_a_field_that_is_not_a_number_counts_as_folded():
    displacement = np.zeros((5, 5, 5, 3), np.float32)
    displacement[2, 2, 2, 0] = np.nan
    # Central differences see the voxel from its two neighbours on each axis, np.gradient's own voxel does not.
    assert folding.folding_percent(displacement) == pytest.approx(100 * 6 / 125)
    assert np.isnan(folding.ndv_percent(displacement))


@pytest.mark.parametrize("slab", [1, 1 << 16])
def test_sdlogj_is_learn2regs(slab, monkeypatch):
    monkeypatch.setattr(folding, "SLAB", slab)
    displacement = np.random.default_rng(0).normal(size=(9, 8, 10, 3)).astype(np.float32) * 1.5
    logs = []
    for i, j, k in itertools.product(range(2, 7), range(2, 6), range(2, 8)):
        matrix = np.eye(3)
        for axis in range(3):
            step = np.eye(3, dtype=int)[axis]
            after, before = (displacement[tuple(np.array([i, j, k]) + s * step)] for s in (1, -1))
            matrix[:, axis] += (after.astype(np.float64) - before) / 2
        logs.append(np.log(np.clip(np.linalg.det(matrix) + 3, 1e-9, 1e9)))
    assert min(logs) < np.log(1e-8), "the clip is to be tested too"
    assert folding.sdlogj(displacement) == pytest.approx(np.std(logs), rel=1e-5)


def test_a_known_determinant_is_not_computed_again():
    displacement = affine_displacement(np.eye(3))
    determinant = np.linspace(-1, 3, 6 * 7 * 8, dtype=np.float32).reshape(6, 7, 8)
    assert folding.folding_percent(displacement, determinant=determinant) == pytest.approx(25, abs=0.3)
    expected = np.std(np.log(determinant[2:-2, 2:-2, 2:-2].astype(np.float64) + 3))
    assert folding.sdlogj(displacement, determinant=determinant) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [0.4, 1.0, 3.0])
def test_ndv_agrees_with_a_naive_loop_over_tetrahedra(size, monkeypatch):
    displacement = ragged(0, size)
    mask = np.random.default_rng(1).random(displacement.shape[:3]) > 0.4
    expected = naive_ndv(displacement, np.ones_like(mask)), naive_ndv(displacement, mask)
    assert expected[0] > 1e-3 and abs(expected[0] - expected[1]) > 1e-3
    for slab in (1, 100, 1 << 16):
        monkeypatch.setattr(folding, "SLAB", slab)
        assert folding.ndv_percent(displacement) == pytest.approx(expected[0], rel=1e-6)
        assert folding.ndv_percent(displacement, mask) == pytest.approx(expected[1], rel=1e-6)
        assert folding.ndv_percent(displacement.astype(np.float64)) == pytest.approx(expected[0], abs=1e-10)


def test_ndv_is_that_of_its_authors():
    # `calc_jacdets_3d` and `calc_non_diffeomorphic_volume` of github.com/yihao6/digital_diffeomorphism (1.1.1, commit
    # da59e2d), without the outermost voxels, as its first release and MIR leave them out: 100 * sum / number of voxels.
    stored = {
        (1, 0.5): (1.3529580876387453, 1.5570483345849762),
        (2, 1.0): (31.986006755622448, 30.686191838440255),
        (3, 2.5): (556.9243320130876, 562.9370698910109),
    }
    for (seed, size), (whole, masked) in stored.items():
        displacement = ragged(seed, size, (9, 8, 10))
        mask = np.random.default_rng(seed).random(displacement.shape[:3]) > 0.4
        assert folding.ndv_percent(displacement) == pytest.approx(whole, rel=1e-6)
        assert folding.ndv_percent(displacement, mask) == pytest.approx(masked, rel=1e-6)


def test_ndv_sees_the_folds_of_a_checkerboard_that_central_differences_miss():
    # u_0 is 0.9 on white voxels and -0.9 on black ones: a step along axis 0 from white to black turns 1 into -0.8, and
    # each voxel has such a step on one side. Four of the eight tetrahedra at its corners hold it, each with determinant
    # -0.8; the two in the middle of cubes join voxels of one colour, and are only moved.
    shape = (12, 13, 14)
    colour = 1 - 2 * (np.indices(shape).sum(axis=0) % 2)
    board = np.zeros((*shape, 3), np.float32)
    board[..., 0] = 0.9 * colour
    inside = np.zeros(shape, bool)
    inside[3:-3, 3:-3, 3:-3] = True
    board[~ndimage.binary_dilation(inside)] = 0
    assert folding.folding_percent(board) == 0
    assert folding.ndv_percent(board, inside) == pytest.approx(100 * 4 * 0.8 / 12, rel=1e-6)
    whole = folding.ndv_percent(board)
    assert whole == pytest.approx(naive_ndv(board, np.ones(shape, bool)), rel=1e-5) and whole > 5


@pytest.mark.parametrize("seed", range(3))
def test_ndv_of_a_smooth_diffeomorphism_is_exactly_zero(seed):
    # Steps of less than a third of a voxel in any direction leave every tetrahedron on its side.
    noise = np.random.default_rng(seed).normal(size=(20, 22, 18, 3))
    smooth = ndimage.gaussian_filter(noise, (3, 3, 3, 0)).astype(np.float32)
    smooth *= 0.32 / max(np.abs(np.diff(smooth, axis=axis)).max() for axis in range(3))
    assert np.abs(smooth).max() > 1
    assert folding.ndv_percent(smooth) == 0 == folding.folding_percent(smooth)
    assert folding.ndv_percent(20 * smooth) > 1


def test_shapes_without_an_answer_are_refused(unchecked):
    with pytest.raises(ValueError, match=r"\(4, 4, 4, 2\)"):
        folding.jacobian_determinant(np.zeros((4, 4, 4, 2), np.float32))
    with pytest.raises(ValueError, match=r"\(4, 1, 4, 3\)"):
        folding.jacobian_determinant(np.zeros((4, 1, 4, 3), np.float32))
    with pytest.raises(ValueError, match=r"\(5, 4, 5\)"):
        folding.sdlogj(np.zeros((5, 4, 5, 3), np.float32))
    with pytest.raises(ValueError, match=r"\(5, 2, 5, 3\)"):
        folding.ndv_percent(np.zeros((5, 2, 5, 3), np.float32))
