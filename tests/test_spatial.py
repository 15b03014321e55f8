"""Warps and displacements against SciPy's map_coordinates, PyTorch's grid_sample, and fields known in closed form."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax import lax
from scipy import linalg, ndimage  # type: ignore[import-untyped]

from dilformer_jax.ops import metrics, sampling, spatial

SHAPE = (7, 6, 5)
# With zeros, points less than one voxel outside still see the border: SciPy's 'grid-constant', not its 'constant'.
SCIPY_MODE = {"border": "nearest", "zeros": "grid-constant"}
ENGINES, PADDINGS = ("gather", "map_coordinates"), ("border", "zeros")


@pytest.fixture
def unchecked():
    """The functions as users have them, without the test run's shape checks in front of their own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def single(array: Any) -> jax.Array:
    return jnp.asarray(array, jnp.float32)


def compiled(function: Callable, *operands: Any) -> Any:
    """What one program gives for float32 operands, as NumPy arrays."""
    return jax.tree.map(np.asarray, jax.jit(function)(*jax.tree.map(single, operands)))


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Random float32 numbers, as float64."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(np.float64)


def points(shape: tuple[int, ...]) -> np.ndarray:
    return np.moveaxis(np.indices(shape, np.float64), 0, -1)


def off_the_voxels(shape: tuple[int, ...], volume: tuple[int, ...], seed: int = 1) -> np.ndarray:
    """Displacements to places in and around the volume, all at least a tenth of a voxel from where a slope jumps."""
    rng = np.random.default_rng(seed)
    places = np.stack([rng.integers(-3, n + 2, shape[:-1]) for n in volume], -1) + rng.uniform(0.1, 0.9, shape)
    return (places - points(shape[-4:-1])).astype(np.float32).astype(np.float64)


def warp_by_scipy(image: np.ndarray, u: np.ndarray, order: int = 1, padding: str = "border") -> np.ndarray:
    """The image (d, h, w, c) warped by u (e, f, g, 3)."""
    coordinates = np.moveaxis(points(u.shape[:3]) + u, -1, 0)
    sampled = [
        ndimage.map_coordinates(image[..., c], coordinates, order=order, mode=SCIPY_MODE[padding], prefilter=False)
        for c in range(image.shape[-1])
    ]
    return np.stack(sampled, axis=-1)


def warp_by_torch(torch, image, u, order, padding):
    """The same of tensors, by grid_sample."""
    # To its own coordinates: -1 and 1 are the centres of the first and last voxels, the last axis comes first.
    places = torch.tensor(points(tuple(u.shape[:3]))) + u
    span = torch.tensor([n - 1 for n in image.shape[:3]], dtype=torch.float64)
    moved = torch.nn.functional.grid_sample(
        image.permute(3, 0, 1, 2)[None],
        (2 * places / span - 1).flip(-1)[None],
        mode=("nearest", "bilinear")[order],
        padding_mode=padding,
        align_corners=True,
    )
    return moved[0].permute(1, 2, 3, 0)


def affine(matrix: np.ndarray, shift: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The field u(x) = matrix @ x + shift."""
    return points(shape) @ matrix.T + shift


def test_grid():
    got = np.asarray(spatial.grid((3, 4, 2)))
    assert got.shape == (3, 4, 2, 3) and got.dtype == jnp.float32
    for voxel in np.ndindex(3, 4, 2):
        np.testing.assert_array_equal(got[voxel], voxel)


# --- warp ---


@pytest.mark.parametrize("engine", ENGINES)
def test_warp_equals_scipy(engine):
    """Both orders and paddings, far outside too, onto a grid of another shape."""
    image, u = numbers(2, *SHAPE, 2), off_the_voxels((2, 4, 8, 6, 3), SHAPE)
    cases = list(itertools.product((0, 1), PADDINGS))
    warps = lambda image, u: [spatial.warp(image, u, order=o, padding=p, engine=engine) for o, p in cases]
    for (order, padding), got in zip(cases, compiled(warps, image, u), strict=True):
        expected = np.stack([warp_by_scipy(*pair, order, padding) for pair in zip(image, u, strict=True)])
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, atol=5e-6, err_msg=f"order {order}, {padding}")


def gradients_by_differences(image, u, cotangent, padding):
    """Of Σ moved · cotangent, which is linear in each voxel and in each coordinate, so that differences are exact."""
    to_image, to_u = np.zeros_like(image), np.zeros_like(u)
    for voxel in np.ndindex(image.shape):
        one = np.zeros_like(image)
        one[voxel] = 1
        to_image[voxel] = (warp_by_scipy(one, u, 1, padding) * cotangent).sum()
    for axis, step in enumerate(0.05 * np.eye(3)):
        rise = warp_by_scipy(image, u + step, 1, padding) - warp_by_scipy(image, u - step, 1, padding)
        to_u[..., axis] = (rise * cotangent).sum(-1) / 0.1
    return to_image, to_u


GRADIENT_OPERANDS = (numbers(4, 3, 5, 2), off_the_voxels((5, 4, 3, 3), (4, 3, 5)), numbers(5, 4, 3, 2, seed=2))


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_of_warp_equal_finite_differences(engine):
    def gradients(image, u, cotangent):
        pull = lambda padding: jax.vjp(
            lambda image, u: spatial.warp(image, u, padding=padding, engine=engine), image, u
        )[1]
        return [pull(padding)(cotangent) for padding in PADDINGS]

    for padding, got in zip(PADDINGS, compiled(gradients, *GRADIENT_OPERANDS), strict=True):
        for ours, expected in zip(got, gradients_by_differences(*GRADIENT_OPERANDS, padding), strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-4, err_msg=padding)


def test_scipys_warp_and_its_differences_are_pytorchs():
    """The answers that the tests above expect are also those of grid_sample(align_corners=True) and its gradients."""
    torch = pytest.importorskip("torch")
    image, u, cotangent = GRADIENT_OPERANDS
    for padding in PADDINGS:
        their_image, their_u = (torch.tensor(array, requires_grad=True) for array in (image, u))
        moved = warp_by_torch(torch, their_image, their_u, 1, padding)
        moved.backward(torch.tensor(cotangent))
        to_image, to_u = gradients_by_differences(*GRADIENT_OPERANDS, padding)
        nearest = warp_by_torch(torch, their_image, their_u, 0, padding)
        np.testing.assert_allclose(warp_by_scipy(image, u, 1, padding), moved.detach().numpy(), atol=1e-10)
        np.testing.assert_allclose(warp_by_scipy(image, u, 0, padding), nearest.detach().numpy(), atol=1e-10)
        np.testing.assert_allclose(to_image, their_image.grad.numpy(), atol=1e-10)
        np.testing.assert_allclose(to_u, their_u.grad.numpy(), atol=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
def test_warp_by_zero_is_the_identity(engine):
    image, still = numbers(*SHAPE, 2), np.zeros((*SHAPE, 3))
    cases = list(itertools.product((0, 1), PADDINGS))
    warps = lambda image, u: [spatial.warp(image, u, order=o, padding=p, engine=engine) for o, p in cases]
    for moved in compiled(warps, image, still):
        np.testing.assert_array_equal(moved, image)


def test_gradient_of_warp_at_the_identity_is_one_sided():
    """Training starts there: towards the next voxel; on the last face from the one before, or down to the zeros."""
    image, cotangent = numbers(*SHAPE, 2), numbers(*SHAPE, 2, seed=1)

    def slopes(image, u, cotangent):
        return [jax.vjp(lambda u, p=p: spatial.warp(image, u, padding=p), u)[1](cotangent)[0] for p in PADDINGS]

    border, zeros = compiled(slopes, image, np.zeros((*SHAPE, 3)), cotangent)
    for axis in range(3):
        last = [slice(None)] * 4
        last[axis] = slice(-1, None)
        forward = np.diff(image, axis=axis)
        expected = np.concatenate([forward, forward[tuple(last)]], axis=axis)
        np.testing.assert_allclose(border[..., axis], (expected * cotangent).sum(-1), atol=1e-5)
        expected = np.concatenate([forward, -image[tuple(last)]], axis=axis)
        np.testing.assert_allclose(zeros[..., axis], (expected * cotangent).sum(-1), atol=1e-5)
    # The same by hand, from the moved images themselves: half a voxel forward, and half a voxel backward at the end.
    moved = lambda by: warp_by_scipy(image, np.zeros((*SHAPE, 3)) + [0, 0, by])
    half = np.where(points(SHAPE)[..., 2:] < SHAPE[2] - 1, moved(0.5) - image, image - moved(-0.5)) / 0.5
    np.testing.assert_allclose(border[..., 2], (half * cotangent).sum(-1), atol=1e-5)


def test_gradient_of_warp_outside_the_volume_is_zero():
    image, outside = numbers(*SHAPE, 1), np.zeros((*SHAPE, 3)) + [0.25, 20, 0]
    to_u = compiled(jax.grad(lambda u, image: spatial.warp(image, u).sum()), outside, image)
    np.testing.assert_array_equal(to_u[..., 1], 0)
    assert np.abs(to_u[:-1, ..., 0]).min() > 0  # along the face it still is the image's


def test_warp_along_an_axis_of_one_voxel():
    image, u = numbers(1, 4, 5, 1), numbers(1, 4, 5, 3, seed=1)
    warp = lambda u, image: spatial.warp(image, u)
    moved, to_u = compiled(lambda u, image: (warp(u, image), jax.grad(lambda u: warp(u, image).sum())(u)), u, image)
    np.testing.assert_allclose(moved, warp_by_scipy(image, u), atol=1e-5)
    np.testing.assert_array_equal(to_u[..., 0], 0)
    assert np.abs(to_u[..., 1:]).max() > 0.1


def test_nearest_warp_keeps_labels_and_breaks_ties_as_pytorch():
    """Between two voxels the even one (as grid_sample; SciPy takes the upper one)."""
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 2**30, (6, 3, 2, 1)), jnp.int32)
    halves = single(np.zeros((6, 3, 2, 3)) + [0.5, 0, 0])
    moved = jax.jit(lambda labels, u: spatial.warp(labels, u, order=0))(labels, halves)
    assert moved.dtype == jnp.int32
    np.testing.assert_array_equal(moved, np.asarray(labels)[[0, 2, 2, 4, 4, 5]])
    # The same halves whatever the padding; the last one, 5.5, goes to 6, which is outside.
    moved = jax.jit(lambda labels, u: spatial.warp(labels, u, order=0, padding="zeros"))(labels, halves)
    np.testing.assert_array_equal(moved[:5], np.asarray(labels)[[0, 2, 2, 4, 4]])
    np.testing.assert_array_equal(moved[5], 0)


@pytest.mark.parametrize("order", [0, 1])
def test_warp_takes_numpys_arrays(order):
    """As volumes and displacements come out of files; by whole voxels, so that both orders take the same one."""
    image, u = np.asarray(numbers(*SHAPE, 1), np.float32), np.zeros((*SHAPE, 3), np.float32) + np.float32([1, 0, -1])
    moved = spatial.warp(image, u, order=order)
    places = np.ix_(np.minimum(np.arange(SHAPE[0]) + 1, SHAPE[0] - 1), range(SHAPE[1]), [0, *range(SHAPE[2] - 1)])
    np.testing.assert_array_equal(moved, image[places])


def test_warp_refuses_unknown_options():
    image, u = jnp.zeros((2, 2, 2, 1)), jnp.zeros((2, 2, 2, 3))
    for option in ({"order": 3}, {"padding": "wrap"}, {"engine": "fast"}):
        with pytest.raises(ValueError, match=f"got {next(iter(option.values()))!r}"):
            spatial.warp(image, u, **option)


@pytest.mark.parametrize("axis", [None, 0, 2])
def test_the_cpus_gradients_of_sampling_are_the_other_platforms(axis):
    """In two volumes of two channels, and where an axis has one voxel."""
    shape = [4, 3, 5] if axis is None else [n if a != axis else 1 for a, n in enumerate((4, 3, 5))]
    last, images = np.array(shape) - 1.0, numbers(2, *shape, 2)
    at = np.random.default_rng(1).uniform(0, last, (2, 3, 2, 4, 3))
    at[:, 0, 0] = last  # a face
    forms = [
        (sampling.slopes, sampling.slopes_by_planes),
        (sampling.spread, sampling.spread_by_planes),
    ]
    every = lambda *operands: [[form(*operands) for form in pair] for pair in forms]
    for default, cpu in compiled(every, images, at, last, numbers(2, 3, 2, 4, 2, seed=2)):
        assert np.abs(default).max() > 0.5
        np.testing.assert_allclose(cpu, default, atol=1e-5)


def test_the_scatter_to_the_image_runs_only_where_its_gradient_is_asked_for():
    image, u = jnp.ones((3, 4, 5, 1)), jnp.ones((3, 4, 5, 3))
    warped = lambda image, u: spatial.warp(image, u).sum()

    def along_a_loop(image, u):
        again = jax.checkpoint(lambda u: u + warped(image, u))
        return lax.scan(lambda u, _: (again(u), None), u, length=2)[0].sum()

    for function in (warped, jax.jit(warped), along_a_loop):
        primitives = [
            {equation.primitive.name for equation in equations(jax.make_jaxpr(jax.grad(function, argnums))(image, u))}
            for argnums in (0, 1, (0, 1))
        ]
        assert ["scatter-add" in names for names in primitives] == [True, False, True]
    # To the image alone, nothing is gathered but what the forward pass needs.
    names = [equation.primitive.name for equation in equations(jax.make_jaxpr(jax.grad(warped))(image, u))]
    assert names.count("gather") == 8


def test_second_derivatives_of_warp_equal_finite_differences():
    """Of moved², whose second derivatives along one axis are not zero; the gradient itself is differenced."""
    image, u = numbers(4, 3, 5, 2), off_the_voxels((5, 4, 3, 3), (4, 3, 5))
    direction = numbers(5, 4, 3, 3, seed=2)
    directions = numbers(4, 3, 5, 2, seed=3), direction

    def curvature(image, u, directions):
        energy = lambda image, u: 0.5 * (spatial.warp(image, u) ** 2).sum()
        along = lambda image, u: sum(
            (slope * way).sum() for slope, way in zip(jax.grad(energy, (0, 1))(image, u), directions, strict=True)
        )
        return jax.grad(along, (0, 1))(image, u)

    def slopes(image, u):
        return gradients_by_differences(image, u, warp_by_scipy(image, u), "border")

    step = 1e-3
    ahead, behind = (slopes(image + by * directions[0], u + by * directions[1]) for by in (step, -step))
    for ours, rise, drop in zip(compiled(curvature, image, u, directions), ahead, behind, strict=True):
        expected = (rise - drop) / (2 * step)
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(ours, expected, atol=2e-3)


def test_warp_of_bfloat16_and_of_integers():
    """A coarse image keeps its dtype, its interpolation is in float32; labels between voxels become float32."""
    image, u, cotangent = GRADIENT_OPERANDS
    coarse = jnp.asarray(image, jnp.bfloat16)

    @jax.jit
    def answers(image, u, cotangent):
        moved, pull = jax.vjp(spatial.warp, image, u)
        return moved, *pull(cotangent.astype(moved.dtype))

    got = answers(coarse, single(u), single(cotangent))
    assert [x.dtype for x in got] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    expected = answers(coarse.astype(jnp.float32), single(u), jnp.bfloat16(cotangent).astype(jnp.float32))
    for ours, theirs in zip(got, expected, strict=True):
        rounding = 2.0**-8 if ours.dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(np.float32(ours), theirs, rtol=rounding, atol=1e-5)
    whole = jnp.asarray(10 * image, jnp.int32)
    slope = jax.jit(jax.grad(lambda u, image: spatial.warp(image, u).sum()))
    assert spatial.warp(whole, single(u)).dtype == jnp.float32
    np.testing.assert_array_equal(slope(single(u), whole), slope(single(u), whole.astype(jnp.float32)))


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


def equations(jaxpr):
    """Every equation of a program, with those of its inner programs."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


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
    np.testing.assert_allclose(got, metrics.jacobian_determinant(u), atol=2e-5)


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
