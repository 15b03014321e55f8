"""Instance optimisation finds known deformations, improves what it is given, and does not depend on how the voxels
are stored."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from dilformer_jax import cli, models
from dilformer_jax.data.phantoms import LABELS, phantom
from dilformer_jax.io.volumes import BadInput, Volume
from dilformer_jax.models import blocks
from dilformer_jax.ops import folding, overlap
from dilformer_jax.registration import methods, refine
from dilformer_jax.registration.pipeline import warp_labels
from dilformer_jax.registration.refine import Refinement

SHAPE = (27, 33, 30)  # odd, and not a multiple of any level
QUICK = Refinement(steps=20)


@pytest.fixture(scope="module")
def brain() -> tuple[np.ndarray, np.ndarray]:
    image, labels = phantom(3, (32, 40, 32))
    middle = tuple(slice((n - size) // 2, (n - size) // 2 + size) for n, size in zip(image.shape, SHAPE, strict=True))
    return image[middle].astype(np.float32), labels[middle].astype(np.int32)


def bent(amplitude: float) -> np.ndarray:
    """A smooth displacement of the grid, zero at its faces."""
    x, y, z = np.meshgrid(*(np.linspace(0, np.pi, n) for n in SHAPE), indexing="ij")
    bump = np.sin(x) * np.sin(y) * np.sin(z)
    return np.stack([bump * np.cos(y), -bump, bump * np.sin(x)], -1).astype(np.float32) * amplitude


def pulled(array: np.ndarray, u: np.ndarray, order: int = 1) -> np.ndarray:
    """array(x + u(x)), by SciPy."""
    points = np.indices(u.shape[:3]) + np.moveaxis(u, -1, 0)
    return ndimage.map_coordinates(array, points, order=order, mode="nearest").astype(array.dtype)


def residual(u: np.ndarray, inverse: np.ndarray) -> float:
    """How far the two are from undoing each other, in mean: u(x + inverse(x)) + inverse(x)."""
    there = np.stack([pulled(u[..., a], inverse) for a in range(3)], -1)
    return np.linalg.norm(there + inverse, axis=-1).mean()


def inverted(u: np.ndarray) -> np.ndarray:
    inverse = np.zeros_like(u)
    for _ in range(30):
        inverse = -np.stack([pulled(u[..., a], inverse) for a in range(3)], -1)
    return inverse


@pytest.mark.parametrize("diffeomorphic", [False, True])
def test_a_known_deformation_is_found(brain, diffeomorphic):
    image, labels = brain
    true = bent(3.0)
    fixed, fixed_labels = pulled(image, true), pulled(labels, true, order=0)
    found = refine.refine(fixed, image, Refinement(20, diffeomorphic))
    u = found.displacement
    seen = fixed_labels > 0
    before, error = (np.linalg.norm(x, axis=-1)[seen].mean() for x in (true, u - true))
    assert before > 1.0 and error < 0.4 * before
    ids = [label for label in LABELS if (labels == label).sum() > 50]
    dice = lambda moved: np.nanmean(overlap.dice(fixed_labels, moved, ids, labels))
    assert dice(warp_labels(labels, u)) > dice(labels) + 0.15
    assert folding.folding_percent(u) <= (0 if diffeomorphic else 0.5)
    if diffeomorphic:
        assert residual(u, found.inverse) < 0.05 * np.linalg.norm(u, axis=-1).mean()
    else:
        assert found.inverse is None


@pytest.mark.parametrize("how", [Refinement(20, True, "mind"), Refinement(20, False, "nmi")])
def test_images_of_two_contrasts(brain, how):
    """Tissues in the opposite order, on the same dark background: LNCC goes astray."""
    image, _ = brain
    true = bent(3.0)
    fixed = pulled(image, true)
    scaled = np.clip(image / np.percentile(image, 99), 0, 1)
    other = np.where(scaled > 0.05, 1.1 - scaled, 0).astype(np.float32)
    inside = fixed > 0.1
    error = lambda u: np.linalg.norm(u - true, axis=-1)[inside].mean()
    found, by_lncc = (refine.refine(fixed, other, by).displacement for by in (how, QUICK))
    assert error(found) < 0.75 * error(0 * true) < error(0 * true) < error(by_lncc)


def test_by_bending_too(brain):
    true = bent(3.0)
    fixed = pulled(brain[0], true)
    found = refine.refine(fixed, brain[0], Refinement(20, False, "lncc", "bending")).displacement
    before, error = (np.linalg.norm(x, axis=-1)[fixed > 0.1].mean() for x in (true, found - true))
    assert error < 0.5 * before


def test_an_image_stays_on_itself(brain):
    """But for what the kinks of trilinear interpolation at the voxels leave."""
    u = refine.refine(brain[0], brain[0], QUICK).displacement
    assert np.abs(u).mean() < 0.05 and np.percentile(np.abs(u), 99) < 0.25


def test_a_velocity_does_not_fold_where_a_displacement_does(brain):
    image, _ = brain
    other = phantom(8, (32, 40, 32))[0].astype(np.float32)[2:29, 3:36, 1:31]
    folds = [
        (folding.jacobian_determinant(refine.refine(image, other, Refinement(20, form)).displacement) <= 0).sum()
        for form in (False, True)
    ]
    assert folds[0] > 20 and folds[1] == 0, folds


@pytest.mark.parametrize("diffeomorphic", [False, True])
def test_what_it_is_given_is_improved(brain, diffeomorphic):
    """From most of the way it goes the rest; where the way back is known it is still known."""
    image, _ = brain
    true = bent(3.0)
    fixed, initial = pulled(image, true), 0.6 * true
    back = inverted(initial) if diffeomorphic else None
    found = refine.refine(fixed, image, Refinement(20, diffeomorphic), initial, initial_inverse=back)
    inside = fixed > 0.1
    error = lambda u: np.linalg.norm(u - true, axis=-1)[inside].mean()
    assert error(found.displacement) < 0.7 * error(initial)
    if diffeomorphic:
        assert residual(found.displacement, found.inverse) < 0.05 < residual(found.displacement, back) / 5
    else:
        assert found.inverse is None


@pytest.mark.parametrize("diffeomorphic", [False, True])
def test_what_a_network_found_is_not_smoothed(diffeomorphic):
    """Images without contrast say nothing against it, however rough it is."""
    blank, initial = jnp.full((16, 16, 16, 1), 0.5), np.random.default_rng(0).normal(0, 2, (16, 16, 16, 3))
    how = Refinement(5, diffeomorphic, weight=10.0)
    u, _ = refine.found(blank, blank, jnp.ones(3), how, 0, 0, jnp.asarray(initial, jnp.float32))
    np.testing.assert_allclose(u, initial, rtol=0, atol=1e-5)


def test_no_step_leaves_a_displacement_as_it_is(brain):
    image, initial = brain[0], bent(2.0)
    found = refine.refine(image, image, Refinement(0, True), initial)
    np.testing.assert_allclose(found.displacement, initial, atol=1e-5)
    assert found.inverse is None


def test_a_network_knows_its_inverse():
    """Two levels, each twice, whose heads give known smooth velocities of several voxels in place of their own."""
    module = models.create("dilformer", width=4, levels=2, recursions=2, diffeomorphic=True)
    random = np.random.default_rng(0)

    def given(head, args, options, context):
        out = head(*args, **options)
        if not isinstance(context.module, blocks.Head) or context.method_name != "__call__":
            return out
        x, y, z = np.meshgrid(*(np.linspace(0, np.pi, n) for n in out.shape[1:4]), indexing="ij")
        bump = np.sin(x) * np.sin(y) * np.sin(z)
        waves = [bump * np.cos(random.integers(0, 2) * x + random.uniform(0, 6)) for _ in range(3)]
        return jnp.asarray(np.stack(waves, -1)[None] * out.shape[1] / 10, jnp.float32)

    image = jnp.zeros((1, 20, 24, 22, 1))
    params = jax.eval_shape(module.init, jax.random.key(0), image, image)["params"]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    with nn.intercept_methods(given):
        levels, inverse = jax.jit(lambda p: module.apply({"params": p}, image, image, inverse=True))(params)
    u, v = (np.asarray(field[0]) for field in (levels[0], inverse))
    assert [level.shape[1] for level in levels] == [20, 10] and v.shape == u.shape and np.abs(u).max() > 2
    assert residual(u, v) < 0.05 * np.linalg.norm(u, axis=-1).mean() and residual(u, v) < 0.2 * residual(u, -u)
    with pytest.raises(ValueError, match="Only a diffeomorphic network knows its inverse"):
        models.create("dilformer", width=4, levels=2).apply({"params": params}, image, image, inverse=True)


def test_storage_and_units_of_intensity_do_not_matter(brain):
    """Axes that are stored the other way round, or in another order, and intensities a thousand times as large."""
    image, _ = brain
    fixed = pulled(image, bent(3.0))
    u = refine.refine(fixed, image, QUICK).displacement
    assert np.abs(refine.refine(1000 * fixed, 7 * image, QUICK).displacement - u).mean() < 1e-3
    swapped = [np.ascontiguousarray(x.transpose(2, 0, 1)) for x in (fixed, image)]
    swapped = refine.refine(*swapped, QUICK).displacement
    # As (D, H, W) it was stored, axis 2 first: its components and axes back in their order.
    assert np.abs(swapped[..., [1, 2, 0]].transpose(1, 2, 0, 3) - u).mean() < 1e-3 < np.abs(u).mean() / 100


def test_the_size_of_the_world_does_not_matter_but_the_shape_of_voxels_does(brain):
    image, _ = brain
    fixed = pulled(image, bent(3.0))
    found = [
        refine.refine(fixed, image, QUICK, spacing=s).displacement
        for s in ((1.0, 1.0, 1.0), (1e3, 1e3, 1e3), (1.0, 1.0, 4.0))
    ]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 0.1


def test_the_descent_is_one_rolled_loop():
    shapes = [jax.ShapeDtypeStruct((16, 16, 16, 1), jnp.float32)] * 2
    sizes = [
        len(str(jax.make_jaxpr(lambda f, m, n=n: refine.found(f, m, jnp.ones(3), Refinement(n), 0, 0))(*shapes)))
        for n in (3, 300)
    ]
    assert abs(sizes[0] - sizes[1]) < 20


@pytest.mark.parametrize(
    ("shape", "finest", "coarsest"),
    [
        ((160, 192, 160), 1, 4),
        ((80, 96, 112), 0, 3),
        ((8, 9, 200), 0, 0),
        ((256, 256, 256), 1, 4),
        ((20, 400, 400), 1, 1),
    ],
)
def test_levels(shape, finest, coarsest):
    assert refine.levels(shape) == (finest, coarsest)


def test_what_cannot_be_refined(brain):
    thin = brain[0][:, :, :5]
    with pytest.raises(BadInput, match=r"a.nii is 27x33x5, too small to be refined, which takes 8 voxels"):
        refine.refine(thin, thin, QUICK, names=("a.nii", "b.nii"))
    with pytest.raises(BadInput, match=r"b.nii: intensities from 0 to 0 cannot be scaled"):
        refine.refine(brain[0], np.zeros(SHAPE, np.float32), QUICK, names=("a.nii", "b.nii"))
    with pytest.raises(ValueError, match="both lie on one grid"):
        refine.refine(brain[0], thin, QUICK)
    with pytest.raises(ValueError, match="give both"):
        refine.refine(brain[0], brain[0], QUICK, initial_inverse=bent(1.0))
    for unknown in ({"similarity": "ssd"}, {"regulariser": "tv"}):
        with pytest.raises(
            ValueError, match="A refinement is by one of .*'lncc', 'mind', 'nmi'.*'diffusion', 'bending'"
        ):
            Refinement(**unknown)
    for wrong in ({"steps": -1}, {"window": 4}, {"weight": -1.0}, {"rate": 0.0}):
        with pytest.raises(ValueError, match="A refinement has"):
            Refinement(**wrong)


def test_a_method_says_that_it_is_refined(brain):
    method = methods.refined(methods.identity(), None, QUICK)
    assert method.name == "identity, 20 steps of refinement of a displacement"
    assert method.settings["refinement"]["steps"] == 20
    fixed = pulled(brain[0], bent(3.0))
    method.compile(SHAPE, "a.nii")
    place = np.diag([2.0, 2.0, 2.0, 1.0])
    volumes = [Volume(array, place, Path("a.nii"), nib.Nifti1Header()) for array in (fixed, brain[0])]
    np.testing.assert_array_equal(method.displacement(*volumes), refine.refine(fixed, brain[0], QUICK).displacement)
    with pytest.raises(BadInput, match=r"a.nii is 5x33x30, too small"):
        method.check_shape((5, 33, 30), "a.nii")


@pytest.mark.parametrize(
    ("said", "network", "how"),
    [
        ("", True, None),
        ("--refine 9", False, Refinement(9)),
        ("--refine 9", True, Refinement(9, True)),
        ("--refine 9 --no-diffeomorphic", True, Refinement(9)),
        ("--refine 9 --diffeomorphic --similarity mind", False, Refinement(9, True, "mind")),
        ("--refine 9 --similarity nmi --regulariser bending", False, Refinement(9, False, "nmi", "bending")),
        ("--similarity mind", True, "--similarity says how to refine; give --refine N with it"),
        ("--no-diffeomorphic", True, "--no-diffeomorphic says how to refine; give --refine N with it"),
        ("--refine 9 --regulariser tv", True, "invalid choice: 'tv'"),
    ],
)
def test_the_command_line_says_how(said, network, how):
    parser = cli.Arguments(prog="register")
    cli.add_refinement(parser, "50")
    read = lambda: cli.refinement(parser.parse_args(said.split()), network=network)
    if isinstance(how, str):
        with pytest.raises(BadInput, match=how):
            read()
    else:
        assert read() == how
