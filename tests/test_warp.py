"""Warps against SciPy's map_coordinates, PyTorch's grid_sample, and finite differences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from warps import SHAPE, compiled, equations, numbers, off_the_voxels, points, single, warp_by_scipy

from dilformer_jax.ops import sampling, spatial

ENGINES, PADDINGS = ("gather", "map_coordinates"), ("border", "zeros")


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
