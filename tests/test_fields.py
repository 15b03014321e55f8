"""Displacements composed, integrated, resized and differentiated, against SciPy and fields known in closed form."""

import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from scipy import linalg, ndimage  # type: ignore[import-untyped]
from warps import SHAPE, compiled, equations, numbers, off_the_voxels, points, single, warp_by_scipy

from dilformer_jax.ops import folding, platforms, spatial


@pytest.fixture
def unchecked():
    """The functions as users have them, without the test run's shape checks in front of their own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def affine(matrix: np.ndarray, shift: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The field u(x) = matrix @ x + shift."""
    return points(shape) @ matrix.T + shift


def test_grid():
    got = np.asarray(spatial.grid((3, 4, 2)))
    assert got.shape == (3, 4, 2, 3) and got.dtype == jnp.float32
    for voxel in np.ndindex(3, 4, 2):
        np.testing.assert_array_equal(got[voxel], voxel)


# --- compose and integrate ---

TURN = np.array([[0.0, 0.12, -0.05], [-0.1, 0.05, 0.0], [0.06, 0.0, -0.08]])
STRETCH = np.array([[-0.1, 0.0, 0.03], [0.04, -0.12, 0.0], [0.0, 0.05, -0.06]])


def test_compose_of_affine_fields():
    shape, shift = (9, 8, 7), np.array([0.3, -0.2, 0.1])
    u, w = affine(TURN, shift, shape), affine(STRETCH, -2 * shift, shape)
    got = compiled(spatial.compose, u, w)
    reached = points(shape) + w  # w comes first, on the fixed grid
    inside = ((reached >= 0) & (reached <= np.array(shape) - 1)).all(-1)
    assert 0.4 < inside.mean() < 1
    expected = reached @ TURN.T + shift + w
    np.testing.assert_allclose(got[inside], expected[inside], atol=1e-5)


def test_compose_of_any_fields():
    u, w = numbers(*SHAPE, 3), off_the_voxels((*SHAPE, 3), SHAPE)
    still = np.zeros((*SHAPE, 3))
    compose = jax.jit(spatial.compose)
    np.testing.assert_allclose(compose(single(u), single(w)), warp_by_scipy(u, w) + w, atol=1e-5)
    np.testing.assert_array_equal(compose(single(u), single(still)), single(u))
    np.testing.assert_array_equal(compose(single(still), single(w)), single(w))


def test_composed_warps():
    """Moved by the composition is moved twice: moving(x + (u after w)(x)) is (moving warped by u) warped by w."""
    moving = points((9, 8, 7)) @ np.array([[1.0], [10.0], [-3.0]])  # a ramp, so that sampling twice loses nothing
    u, w = 0.5 * numbers(9, 8, 7, 3), 0.5 * numbers(9, 8, 7, 3, seed=1)

    def both(moving, u, w):
        return spatial.warp(moving, spatial.compose(u, w)), spatial.warp(spatial.warp(moving, u), w)

    once, twice = compiled(both, moving, u, w)
    np.testing.assert_allclose(once[3:-3, 3:-3, 3:-3], twice[3:-3, 3:-3, 3:-3], atol=1e-4)


def test_integral_of_a_constant_velocity_is_a_translation():
    velocity = np.zeros((*SHAPE, 3)) + [1.75, -3.5, 0.3]
    np.testing.assert_allclose(compiled(spatial.integrate, velocity), velocity, atol=1e-5)


def test_integral_of_a_linear_velocity_is_the_matrix_exponential():
    shape, centre = (13, 12, 11), np.array([6.0, 5.5, 5.0])
    velocity = affine(4 * TURN, -4 * TURN @ centre, shape)
    seven, three = compiled(lambda v: [spatial.integrate(v), spatial.integrate(v, 3)], velocity)
    interior = (slice(4, -4),) * 3
    offset = (points(shape) - centre)[interior]
    exact = offset @ (linalg.expm(4 * TURN) - np.eye(3)).T
    assert np.abs(exact).max() > 0.5
    np.testing.assert_allclose(seven[interior], exact, atol=0.005)
    assert np.abs(three[interior] - exact).max() > 0.01
    for got, squarings in (seven, 7), (three, 3):
        # What scaling and squaring makes of it: 2^steps equal Euler steps.
        euler = np.linalg.matrix_power(np.eye(3) + 4 * TURN / 2**squarings, 2**squarings)
        np.testing.assert_allclose(got[interior], offset @ (euler - np.eye(3)).T, atol=1e-4)


def smooth_velocity(shape: tuple[int, ...]) -> np.ndarray:
    return np.stack([ndimage.gaussian_filter(numbers(*shape, seed=seed), 1.5) * 10 for seed in range(3)], axis=-1)


def test_integrals_of_opposite_velocities_are_inverse():

    def there_and_back(v):
        forward, back = spatial.integrate(v), spatial.integrate(-v)
        return forward, spatial.compose(forward, back)

    forward, left = compiled(there_and_back, smooth_velocity((12, 13, 14)))
    length = np.linalg.norm(forward, axis=-1).max()
    assert length > 1.0
    assert np.linalg.norm(left[3:-3, 3:-3, 3:-3], axis=-1).max() < 0.1 * length


def test_gradient_of_integrate_equals_finite_differences():
    v, cotangent = smooth_velocity(SHAPE), numbers(*SHAPE, 3, seed=7)

    def by_scipy(v):
        u = v / 2**5
        for _ in range(5):
            u = warp_by_scipy(u, u) + u
        return u

    def answers(v, cotangent):
        value, pull = jax.vjp(lambda v: spatial.integrate(v, 5), v)
        return value, *pull(cotangent)

    value, gradient = compiled(answers, v, cotangent)
    np.testing.assert_allclose(value, by_scipy(v), atol=1e-5)
    for seed in range(5):
        direction = 1e-5 * numbers(*SHAPE, 3, seed=20 + seed)
        rise = ((by_scipy(v + direction) - by_scipy(v - direction)) * cotangent).sum() / 2
        assert (gradient * direction).sum() == pytest.approx(rise, rel=0.01)


def test_integrate_is_one_rolled_loop():
    """Unrolled, a diffeomorphic network compiles ten times more slowly."""
    integral = lambda steps: lambda v: spatial.integrate(v, steps)
    slope = lambda steps: jax.grad(lambda v: spatial.integrate(v, steps).sum())
    # The gradient's loops: forth and back over the steps, and two over the planes of a step.
    for program, loops in (integral, 1), (slope, 4):
        names = [
            [equation.primitive.name for equation in equations(jax.make_jaxpr(program(steps))(jnp.ones((4, 4, 4, 3))))]
            for steps in (2, 7)
        ]
        assert names[0] == names[1]
        assert names[1].count("while") + names[1].count("scan") == loops
        assert names[1].count("gather") >= 8


# --- grids of other resolutions ---

RESIZES = [((5, 4, 6), (10, 8, 12)), ((10, 8, 12), (5, 4, 6)), ((5, 6, 4), (7, 6, 3)), ((6, 1, 5), (1, 3, 15))]


def positions(source: int, target: int, align_corners: bool) -> np.ndarray:
    """Where each target voxel lies among the source's."""
    if align_corners:
        return np.linspace(0, source - 1, target)
    return (np.arange(target) + 0.5) / target * source - 0.5


def test_resize():
    images = [numbers(2, *source, 2, seed=seed) for seed, (source, _) in enumerate(RESIZES)]

    def every(images):
        resized = lambda corners: [
            spatial.resize(image, target, align_corners=corners)
            for image, (_, target) in zip(images, RESIZES, strict=True)
        ]
        return resized(False), resized(True)

    for align_corners, resized in zip((False, True), compiled(every, images), strict=True):
        for image, (source, target), got in zip(images, RESIZES, resized, strict=True):
            expected = np.stack([resize_by_scipy(each, target, align_corners) for each in image])
            np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=f"{source} to {target}, {align_corners}")


def test_resize_as_a_gpu_doubles(monkeypatch):
    monkeypatch.setattr(platforms, "by_platform", lambda x, cuda, default: cuda(x))
    image, target = numbers(2, 3, 4, 1, 2), (6, 8, 2)
    expected = np.stack([resize_by_scipy(each, target, False) for each in image])
    np.testing.assert_allclose(spatial.resize(jnp.asarray(image, jnp.float32), target), expected, atol=1e-5)


def resize_by_scipy(image, target, align_corners):
    axes = [positions(s, t, align_corners) for s, t in zip(image.shape[:3], target, strict=True)]
    return warp_by_scipy(image, np.stack(np.meshgrid(*axes, indexing="ij"), -1) - points(target))


def test_both_conventions_of_resize_are_pytorchs():
    torch = pytest.importorskip("torch")
    for (source, target), align_corners in itertools.product(RESIZES, (False, True)):
        image = numbers(*source, 1)
        theirs = torch.nn.functional.interpolate(
            torch.tensor(image[None, None, ..., 0]), size=target, mode="trilinear", align_corners=align_corners
        )
        ours = resize_by_scipy(image, target, align_corners)[..., 0]
        np.testing.assert_allclose(ours, theirs[0, 0].numpy(), atol=1e-12, err_msg=f"{source} to {target}")


def test_resize_of_a_ramp():
    """Half-pixel: a ramp keeps its place in the box and ends at the border value; corners: it keeps its ends."""
    ramp = points((4, 2, 2))[..., :1]
    resizes = lambda ramp: [spatial.resize(ramp, (8, 2, 2), align_corners=a) for a in (False, True)]
    box, corners = compiled(resizes, ramp)
    np.testing.assert_allclose(box[:, 0, 0, 0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3], atol=1e-6)
    np.testing.assert_allclose(corners[:, 1, 1, 0], np.arange(8) * 3 / 7, atol=1e-6)


def test_resize_displacement_of_an_affine_field():
    """The same motion of the same box: with half-pixel positions p = (x + 1/2) / n, with corners p = x / (n - 1)."""
    motion, shift = np.array([[0.2, -0.1, 0.05], [0.0, 0.1, -0.3], [0.1, 0.02, -0.15]]), np.array([0.05, -0.1, 0.2])

    def displacement(shape, align_corners):
        size = np.array(shape) - 1.0 if align_corners else np.array(shape, float)
        place = points(shape) / size if align_corners else (points(shape) + 0.5) / size
        return (place @ motion.T + shift) * size

    source = (6, 8, 4)
    targets = ((12, 16, 8), (3, 4, 2), (9, 4, 8))
    for align_corners in (False, True):
        to = lambda u, a=align_corners: [spatial.resize_displacement(u, shape, align_corners=a) for shape in targets]
        for target, got in zip(targets, compiled(to, displacement(source, align_corners)), strict=True):
            # Beyond the centres of the source's outer voxels the half-pixel grid takes their value.
            axes = [positions(s, t, align_corners) for s, t in zip(source, target, strict=True)]
            held = [np.where((p >= 0) & (p <= s - 1))[0] for p, s in zip(axes, source, strict=True)]
            assert all(len(inner) >= 2 for inner in held)
            np.testing.assert_allclose(
                got[np.ix_(*held)], displacement(target, align_corners)[np.ix_(*held)], atol=2e-5
            )


def test_resize_displacement_refuses_corners_without_an_extent():
    with pytest.raises(ValueError, match="two voxels an axis"):
        spatial.resize_displacement(jnp.ones((1, 4, 4, 3)), (2, 4, 4), align_corners=True)


def test_average(unchecked):
    image = numbers(2, 4, 6, 2, 3)
    got = np.asarray(spatial.average(single(image)))
    assert got.shape == (2, 2, 3, 1, 3)
    for b, i, j, k in np.ndindex(2, 2, 3, 1):
        cube = image[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2]
        np.testing.assert_allclose(got[b, i, j, k], cube.reshape(8, 3).mean(0), atol=1e-6)
    with pytest.raises(ValueError, match=r"got a volume of \(4, 5, 2\) voxels"):
        spatial.average(single(image[:, :, :5]))


# --- Jacobian determinant ---


def test_jacobian_determinant_of_affine_fields():
    shrink, fold = np.diag([-0.5, 0.25, 0.1]), np.diag([-1.5, 0.0, 0.2])
    matrices = (np.zeros((3, 3)), TURN, shrink, fold)
    fields = np.stack([affine(matrix, np.ones(3), SHAPE) for matrix in matrices])
    got = compiled(spatial.jacobian_determinant, fields)
    assert got.shape == (4, *SHAPE)
    for determinant, matrix in zip(got, matrices, strict=True):
        np.testing.assert_allclose(determinant, np.linalg.det(np.eye(3) + matrix), atol=1e-5)
    np.testing.assert_allclose(got[2:, 0, 0, 0], [0.5 * 1.25 * 1.1, -0.5 * 1.2], atol=1e-5)


def test_jacobian_determinant_of_a_quadratic_field():
    """Central differences are exact for it inside; at the faces they are one-sided, as `numpy.gradient` has them."""
    x, y, z = np.moveaxis(points(SHAPE), -1, 0)
    u = np.stack([0.05 * x**2 - 0.02 * y * z, 0.04 * x * z, 0.03 * y**2 + 0.02 * x * z], axis=-1)
    # By hand: rows are the components, columns the axes.
    one, zero = np.ones_like(x), np.zeros_like(x)
    rows = [
        [one + 0.1 * x, -0.02 * z, -0.02 * y],
        [0.04 * z, one + zero, 0.04 * x],
        [0.02 * z, 0.06 * y, one + 0.02 * x],
    ]
    expected = np.linalg.det(np.moveaxis(np.array(rows), (0, 1), (-2, -1)))
    got = compiled(spatial.jacobian_determinant, u)
    np.testing.assert_allclose(got[1:-1, 1:-1, 1:-1], expected[1:-1, 1:-1, 1:-1], atol=2e-5)
    stencil = np.stack([np.stack(np.gradient(u[..., a]), -1) for a in range(3)], axis=-2) + np.eye(3)
    np.testing.assert_allclose(got, np.linalg.det(stencil), atol=2e-5)
    np.testing.assert_allclose(got, folding.jacobian_determinant(u), atol=2e-5)


# --- leading axes ---


def test_leading_batch_axes():
    """Every function gives for a batch (2, 3, ...) what it gives for each of its members."""
    image, u, w = numbers(2, 3, 4, 6, 2, 2), numbers(2, 3, 4, 6, 2, 3, seed=1), numbers(2, 3, 4, 6, 2, 3, seed=2)
    functions = (
        lambda image, u, w: spatial.warp(image, u),
        lambda image, u, w: spatial.compose(u, w),
        lambda image, u, w: spatial.integrate(u, 2),
        lambda image, u, w: spatial.resize(image, (5, 3, 4)),
        lambda image, u, w: spatial.resize_displacement(u, (2, 3, 4)),
        lambda image, u, w: spatial.average(image),
        lambda image, u, w: spatial.jacobian_determinant(u),
    )
    every = jax.jit(lambda *operands: [function(*operands) for function in functions])
    batch = compiled(every, image, u, w)
    for i, j in np.ndindex(2, 3):
        for together, one in zip(batch, every(single(image[i, j]), single(u[i, j]), single(w[i, j])), strict=True):
            assert together.shape == (2, 3, *one.shape)
            np.testing.assert_allclose(together[i, j], one, atol=1e-5)
