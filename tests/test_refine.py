"""Instance optimisation finds known deformations, improves what it is given, and does not depend on how the voxels
are stored."""

import dataclasses
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
QUICK = Refinement(steps=20, similarity="lncc")


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


def test_a_known_deformation_is_found(brain):
    image, labels = brain
    true = bent(3.0)
    fixed, fixed_labels = pulled(image, true), pulled(labels, true, order=0)
    u = refine.refine(fixed, image, QUICK)
    seen = fixed_labels > 0
    before, error = (np.linalg.norm(x, axis=-1)[seen].mean() for x in (true, u - true))
    assert before > 1.0 and error < 0.4 * before
    ids = [label for label in LABELS if (labels == label).sum() > 50]
    dice = lambda moved: np.nanmean(overlap.dice(fixed_labels, moved, ids, labels))
    assert dice(warp_labels(labels, u)) > dice(labels) + 0.15
    assert folding.folding_percent(u) == 0


def inverted(image: np.ndarray) -> np.ndarray:
    """Tissues in the opposite order, on the same dark background."""
    scaled = np.clip(image / np.percentile(image, 99), 0, 1)
    return np.where(scaled > 0.05, 1.1 - scaled, 0).astype(np.float32)


@pytest.mark.parametrize("similarity", ["mind", "nmi"])
def test_images_of_two_contrasts(brain, similarity):
    """LNCC goes astray."""
    true = bent(3.0)
    fixed, other = pulled(brain[0], true), inverted(brain[0])
    inside = fixed > 0.1
    error = lambda u: np.linalg.norm(u - true, axis=-1)[inside].mean()
    found, by_lncc = (refine.refine(fixed, other, Refinement(20, by)) for by in (similarity, "lncc"))
    assert error(found) < 0.75 * error(0 * true) < error(0 * true) < error(by_lncc)


def test_an_image_stays_on_itself(brain):
    """But for what the kinks of trilinear interpolation at the voxels leave."""
    u = refine.refine(brain[0], brain[0], QUICK)
    assert np.abs(u).mean() < 0.06 and np.percentile(np.abs(u), 99) < 0.5


def test_two_brains_are_matched_without_folds(brain):
    other, other_labels = (x[2:29, 3:36, 1:31] for x in phantom(8, (32, 40, 32)))
    u = refine.refine(brain[0], other.astype(np.float32), QUICK)
    ids = [label for label in LABELS if min((brain[1] == label).sum(), (other_labels == label).sum()) > 50]
    dice = lambda moved: np.nanmean(overlap.dice(brain[1], moved, ids, other_labels))
    assert dice(warp_labels(other_labels.astype(np.int32), u)) > dice(other_labels) + 0.05
    assert folding.folding_percent(u) == 0


def test_what_it_is_given_is_improved(brain):
    """From most of the way it goes the rest."""
    true = bent(3.0)
    fixed, initial = pulled(brain[0], true), 0.6 * true
    u = refine.refine(fixed, brain[0], QUICK, initial)
    inside = fixed > 0.1
    error = lambda u: np.linalg.norm(u - true, axis=-1)[inside].mean()
    assert error(u) < 0.7 * error(initial)


def test_noise_without_structure_moves_little():
    """The damping: where a force is small beside that of an edge, Adam alone would take whole steps."""
    x = np.linspace(-1, 1, 32)
    ball = (np.sqrt(sum(np.square(g) for g in np.meshgrid(x, x, x, indexing="ij"))) < 0.5).astype(np.float32)
    random = np.random.default_rng(0)
    fixed, moving = (ball + random.normal(0, 1e-4, ball.shape).astype(np.float32) for _ in range(2))
    far = np.abs(np.stack(np.meshgrid(x, x, x, indexing="ij"))).max(0) > 0.8
    u = refine.refine(fixed, moving, QUICK)
    assert np.linalg.norm(u, axis=-1)[far].max() < 1.0


def test_a_level_ends_where_nothing_more_is_gained(brain):
    """No further step changes what a level has that ended early; with a tolerance of 0 it would go on."""
    true = bent(2.0)
    fixed = pulled(brain[0], true)
    few, many = (refine.refine(fixed, brain[0], Refinement(n, "lncc", tolerance=0.05)) for n in (60, 90))
    np.testing.assert_array_equal(few, many)
    further = refine.refine(fixed, brain[0], Refinement(90, "lncc", tolerance=0.0))
    assert np.abs(further - many).max() > 0


def test_the_similarity_follows_the_pair(brain):
    fixed = pulled(brain[0], bent(2.0))
    assert refine.choose_similarity(Refinement(5), fixed, 7 * brain[0]).similarity == "lncc"
    assert refine.choose_similarity(Refinement(5), fixed, inverted(brain[0])).similarity != "lncc"
    assert refine.choose_similarity(Refinement(5, "nmi"), fixed, brain[0]).similarity == "nmi"
    chosen, said = (refine.refine(fixed, brain[0], Refinement(5, by)) for by in ("auto", "lncc"))
    np.testing.assert_array_equal(chosen, said)


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
    residual = lambda v: np.linalg.norm(np.stack([pulled(u[..., a], v) for a in range(3)], -1) + v, axis=-1).mean()
    assert residual(v) < 0.05 * np.linalg.norm(u, axis=-1).mean() and residual(v) < 0.2 * residual(-u)
    with pytest.raises(ValueError, match="Only a diffeomorphic network knows its inverse"):
        models.create("dilformer", width=4, levels=2).apply({"params": params}, image, image, inverse=True)


def test_storage_and_units_of_intensity_do_not_matter(brain):
    """Axes that are stored the other way round, or in another order, and intensities a thousand times as large."""
    image, _ = brain
    fixed = pulled(image, bent(3.0))
    u = refine.refine(fixed, image, QUICK)
    assert np.abs(refine.refine(1000 * fixed, 7 * image, QUICK) - u).mean() < 1e-3
    swapped = [np.ascontiguousarray(x.transpose(2, 0, 1)) for x in (fixed, image)]
    swapped = refine.refine(*swapped, QUICK)
    # As (D, H, W) it was stored, axis 2 first: its components and axes back in their order.
    assert np.abs(swapped[..., [1, 2, 0]].transpose(1, 2, 0, 3) - u).mean() < 1e-3 < np.abs(u).mean() / 100


def test_the_size_of_the_world_does_not_matter_but_the_shape_of_voxels_does(brain):
    image, _ = brain
    fixed = pulled(image, bent(3.0))
    found = [refine.refine(fixed, image, QUICK, spacing=s) for s in ((1.0, 1.0, 1.0), (1e3, 1e3, 1e3), (1.0, 1.0, 4.0))]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 0.1


def test_the_descent_is_one_rolled_loop():
    shapes = [jax.ShapeDtypeStruct((16, 16, 16, 1), jnp.float32)] * 2
    sizes = [
        len(
            str(
                jax.make_jaxpr(lambda f, m, n=n: refine.optimise(f, m, jnp.ones(3), Refinement(n, "lncc"), 0, 0))(
                    *shapes
                )
            )
        )
        for n in (3, 300)
    ]
    assert abs(sizes[0] - sizes[1]) < 20


@pytest.mark.parametrize(
    ("shape", "asked", "finest", "coarsest"),
    [
        ((160, 192, 160), 0, 0, 3),
        ((160, 192, 160), 1, 1, 4),
        ((80, 96, 112), 0, 0, 3),
        ((8, 9, 200), 0, 0, 0),
        ((8, 9, 200), 1, 0, 0),
        ((256, 256, 256), 0, 0, 3),
        ((512, 512, 300), 0, 1, 4),
        ((20, 400, 400), 0, 0, 1),
    ],
)
def test_levels(shape, asked, finest, coarsest):
    assert refine.levels(shape, asked) == (finest, coarsest)


def test_the_finest_level_can_be_a_coarser_one(brain):
    """Half the resolution and no step finer: a displacement that is linear between the larger voxels."""
    even = [np.ascontiguousarray(x[:26, :32, :30]) for x in (pulled(brain[0], bent(2.0)), brain[0])]
    u = refine.refine(*even, Refinement(20, "lncc", finest=1))
    # Between the centres of two larger voxels, half a voxel from each, the slope is the mean of the slopes around.
    slopes = np.diff(u, axis=0)
    np.testing.assert_allclose(slopes[2:-1:2], (slopes[1:-2:2] + slopes[3::2]) / 2, atol=1e-4)
    assert np.abs(u).max() > 1


def test_what_cannot_be_refined(brain):
    thin = brain[0][:, :, :5]
    with pytest.raises(BadInput, match=r"a.nii is 27x33x5, too small to be refined, which takes 8 voxels"):
        refine.refine(thin, thin, QUICK, names=("a.nii", "b.nii"))
    with pytest.raises(BadInput, match=r"b.nii: intensities from 0 to 0 cannot be scaled"):
        refine.refine(brain[0], np.zeros(SHAPE, np.float32), QUICK, names=("a.nii", "b.nii"))
    with pytest.raises(ValueError, match="both lie on one grid"):
        refine.refine(brain[0], thin, QUICK)
    for wrong in (
        {"similarity": "ssd"},
        {"steps": 0},
        {"window": 4},
        {"rate": 0.0},
        {"total_smoothing": -1.0},
        {"tolerance": float("nan")},
    ):
        with pytest.raises(ValueError, match="of a refinement"):
            Refinement(**wrong)


def test_a_method_says_that_it_is_refined(brain):
    method = methods.refined(methods.identity(), None, QUICK)
    assert method.name == "identity, 20 steps of refinement"
    assert method.settings["refinement"]["steps"] == 20
    fixed = pulled(brain[0], bent(3.0))
    method.compile(SHAPE, "a.nii")
    place = np.diag([2.0, 2.0, 2.0, 1.0])
    volumes = [Volume(array, place, Path("a.nii"), nib.Nifti1Header()) for array in (fixed, brain[0])]
    np.testing.assert_array_equal(method.displacement(*volumes), refine.refine(fixed, brain[0], QUICK))
    with pytest.raises(BadInput, match=r"a.nii is 5x33x30, too small"):
        method.check_shape((5, 33, 30), "a.nii")


@pytest.mark.parametrize(
    ("said", "network", "otherwise", "how"),
    [
        ("", True, None, None),
        ("", True, "fast", None),
        ("", False, None, None),
        ("", True, "default", Refinement()),
        ("", False, "default", Refinement()),
        ("--refine 9", False, None, Refinement(9)),
        ("--refine 9", True, "fast", Refinement(9)),
        ("--refine 0", True, "default", None),
        ("--preset fast", True, "default", None),
        ("--preset best", True, "fast", refine.PRESETS["best"]),
        ("--preset best --refine 9", True, None, dataclasses.replace(refine.PRESETS["best"], steps=9)),
        ("--preset default --similarity mind", False, None, Refinement(similarity="mind")),
        ("--similarity nmi", True, "default", Refinement(similarity="nmi")),
        ("--similarity mind", True, "fast", "--similarity says how to refine; give --preset default with it"),
        ("--refine -1", True, None, "--refine is -1; give 0 or more steps"),
        ("--preset fast --refine 3", True, None, "--preset fast is the network alone, --refine 3 says otherwise"),
        ("--preset best --refine 0", True, None, "--preset best refines, --refine 0 says otherwise"),
        ("--refine 0", False, "default", "Nothing would register this pair"),
        ("--preset fast", False, "default", "Nothing would register this pair"),
        ("--preset slow", True, None, "invalid choice: 'slow'"),
    ],
)
def test_the_command_line_says_how(said, network, otherwise, how):
    parser = cli.Arguments(prog="register")
    cli.add_refinement(parser, "default")
    read = lambda: cli.refinement(parser.parse_args(said.split()), network=network, default_preset=otherwise)
    if isinstance(how, str):
        with pytest.raises(BadInput, match=how):
            read()
    else:
        assert read() == how
