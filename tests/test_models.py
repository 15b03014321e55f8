"""The networks: sizes, a fresh network's identity, both directions at once, shared weights, no dead parameter."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage  # type: ignore[import-untyped]

from dilformer_jax import models
from dilformer_jax.io import bundle
from dilformer_jax.models import blocks, correlation
from dilformer_jax.ops import folding, spatial

# A quarter of the time to compile; nothing here is large enough for the difference in speed.
FAST = {"xla_backend_optimization_level": 0}
# Together they have every option at another value than its default.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("dilformer", {}),
    "recursive": (
        "dilformer",
        dict(recursions=2, diffeomorphic=True, dilformer="fused", attention="windows", heads=2, window=(2, 3, 2))
        | dict(dilations=(3, 1, 2), smoothness=(0.5, 2.0)),
    ),
    "ablated": (
        "dilformer",
        dict(msr=False, dilformer="plain", srf=False, correlation=False, separate_encoders=True, finest=1),
    ),
    "voxelmorph": ("voxelmorph", dict(down=(4, 4), up=(4, 4), final=(4,))),
}
SMALL = {"dilformer": dict(width=4, levels=2), "voxelmorph": {}}


def network(name: str) -> Any:
    kind, options = NETWORKS[name]
    return models.create(kind, **SMALL[kind], **options)


def compiled(function):
    return jax.jit(function, compiler_options=FAST)


def images(module: Any, batch: int = 2) -> tuple[jax.Array, jax.Array]:
    """Two smooth random pairs (batch, D, H, W, 1) on a grid of three different sizes."""
    shape = tuple(n * module.downsampling for n in (3, 4, 2))
    random = np.random.default_rng(0)
    smooth = lambda: ndimage.gaussian_filter(random.random((batch, *shape)), (0, 1, 1, 1))
    fixed, moving = (jnp.asarray(smooth() / 0.7, jnp.float32)[..., None] for _ in range(2))
    return fixed, moving


def shapes(module: Any, **options: Any) -> Any:
    """The shapes of the parameters, without computing or compiling any."""
    image = jax.ShapeDtypeStruct((1, *3 * (2 * module.downsampling,), 1), jnp.float32)
    return jax.eval_shape(functools.partial(module.init, **options), jax.random.key(0), image, image)["params"]


def trained(name: str) -> dict[str, Any]:
    """Parameters as after a training: none is 0 or 1, and the displacements are around a voxel."""
    random = np.random.default_rng(1)

    def drawn(path, leaf):
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        values = random.normal(size=leaf.shape) / np.sqrt(fan_in)
        if path[-1].key in ("scale", "temperature"):
            values = 1 + 0.2 * random.normal(size=leaf.shape)
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(drawn, shapes(network(name)))


@functools.cache
def computed(name: str) -> Any:
    """What a network with `trained` parameters gives, in one compilation: (single, both, gradients).

    `single` registers moving 0 to fixed 0, fixed 0 to moving 0, moving 1 to fixed 1 and so on, each as a pair of its
    own; `gradients` are those of a random mean of its finest displacement.
    """
    module, params = network(name), trained(name)
    fixed, moving = images(module)
    told = {"smoothness": 1.5} if getattr(module, "smoothness", ()) else {}

    def apply(params, fixed, moving):
        stack = lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])

        def mean(params):
            single = module.apply({"params": params}, stack(fixed, moving), stack(moving, fixed), **told)
            return (single[0] * np.random.default_rng(2).normal(size=single[0].shape)).mean(), single

        gradients, single = jax.grad(mean, has_aux=True)(params)
        return single, module.apply({"params": params}, fixed, moving, both=True, **told), gradients

    return jax.device_get(compiled(apply)(params, fixed, moving))


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("voxelmorph", {}, 301_411),
        ("dilformer", {}, 1_323_464),
        ("dilformer", {"finest": 1}, 1_328_856),
        ("dilformer", {"msr": False}, 1_500_872),
        ("dilformer", {"dilformer": "plain"}, 1_978_428),
        ("dilformer", {"srf": False}, 3_373_592),
        ("dilformer", {"correlation": False}, 1_317_416),
        ("dilformer", {"dilformer": "fused"}, 1_323_464),
        ("dilformer", {"attention": "windows"}, 1_334_144),
        ("dilformer", {"dilformer": "fused", "attention": "windows"}, 1_334_144),
        ("dilformer", {"recursions": 3}, 1_323_464),
        ("dilformer", {"diffeomorphic": True}, 1_323_464),
        ("dilformer", {"separate_encoders": True}, 2_153_476),
    ],
    ids=str,
)
def test_parameters_are_as_many_as_published(name: str, options: dict[str, Any], count: int, one_form: None) -> None:
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(models.create(name, **options)))) == count


def test_voxelmorph_has_the_layers_of_voxelmorph_2() -> None:
    """TransMorph's `CONFIGS_VxM`: (input, output) channels of each 3³ convolution, counted by hand."""
    layers = [(2, 16), (16, 32), (32, 32), (32, 32), (32, 32), (64, 32), (64, 32), (48, 32), (34, 32), (32, 16)]
    layers += [(16, 16), (16, 3)]
    assert sum(27 * a * b + b for a, b in layers) == 301_411
    kernels = [leaf.shape for leaf in jax.tree.leaves(shapes(models.create("voxelmorph"))) if len(leaf.shape) == 5]
    assert sorted(kernels) == sorted((3, 3, 3, a, b) for a, b in layers)


@pytest.mark.parametrize("name", ["default", "voxelmorph"])
def test_a_fresh_network_is_the_identity(name: str) -> None:
    module = network(name)
    fixed, moving = images(module, batch=1)
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles in a fraction of the time of the default
    found, _ = jax.device_get(compiled(module.init_with_output)(key, fixed, moving))
    assert all(0 < np.linalg.norm(u, axis=-1).max() < 0.05 for u in found)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_level_has_a_displacement_in_its_own_voxels(name: str) -> None:
    module = network(name)
    single, both, _ = computed(name)
    levels = 1 if name == "voxelmorph" else 2
    finest = 1 if name == "ablated" else 0
    assert module.downsampling == {"ablated": 4, "voxelmorph": 4}.get(name, 2)
    full = [n * module.downsampling for n in (3, 4, 2)]
    expected = [(4, *(n // 2 ** (finest + level) for n in full), 3) for level in range(levels)]
    assert [u.shape for u in single] == [u.shape for u in both] == expected
    assert all(u.dtype == np.float32 for u in both)
    if levels == 2:
        # Twice the vectors on twice the voxels: what the fine level adds does not hide it (by chance: 0.02).
        doubled = np.asarray(spatial.resize(jnp.asarray(single[1]), single[0].shape[1:4])) * 2
        assert np.corrcoef(doubled.ravel(), single[0].ravel())[0, 1] > 0.2


@pytest.mark.parametrize("name", NETWORKS)
def test_both_directions_are_the_two_single_ones(name: str) -> None:
    """2i registers moving i to fixed i, 2i + 1 fixed i to moving i."""
    single, both, _ = computed(name)
    for one, other in zip(single, both, strict=True):
        size = np.abs(one).max()
        assert 0.05 < size < 50
        np.testing.assert_allclose(other, one, atol=1e-4 * size)
        # The four differ, so that no other order could pass.
        apart = [np.abs(one[a] - one[b]).max() for a in range(4) for b in range(a)]
        assert min(apart) > 1e-2 * size


def test_both_streams_have_one_encoder_unless_it_is_asked_for(one_form: None) -> None:
    shared = shapes(models.create("dilformer", width=4, levels=2))
    separate = shapes(models.create("dilformer", width=4, levels=2, separate_encoders=True))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert {name for name in shared if "encoder" in name} == {"encoder"}
    assert {name for name in separate if "encoder" in name} == {"fixed_encoder", "moving_encoder"}
    for stream in ("fixed_encoder", "moving_encoder"):
        assert jax.tree.map(lambda leaf: leaf.shape, separate[stream]) == jax.tree.map(
            lambda leaf: leaf.shape, shared["encoder"]
        )
    assert count(separate) - count(shared) == count(shared["encoder"])


@pytest.mark.parametrize("name", NETWORKS)
def test_no_parameter_is_dead(name: str) -> None:
    """The finest displacement alone reaches every array, and none only by rounding."""
    gradients = bundle.flatten(computed(name)[2])
    assert len(gradients) == len(jax.tree.leaves(shapes(network(name))))
    largest = {path: float(np.abs(gradient).max()) for path, gradient in gradients.items()}
    whole = max(largest.values())
    assert np.isfinite(whole)
    assert {path: value for path, value in largest.items() if not value > 1e-5 * whole} == {}


def test_correlation_has_the_gradient_of_its_definition() -> None:
    def by_definition(fixed, moved):
        padded = jnp.pad(moved, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)), mode="edge")
        d, h, w = fixed.shape[1:4]
        places = itertools.product(range(3), repeat=3)
        return jnp.stack([(fixed * padded[:, i : i + d, j : j + h, k : k + w]).mean(-1) for i, j, k in places], -1)

    fixed, moved, cotangent = (jax.random.normal(jax.random.key(n), (2, 3, 4, 2, c)) for n, c in enumerate((5, 5, 27)))
    ours, theirs = (jax.vjp(f, fixed, moved)[1](cotangent) for f in (correlation.correlation, by_definition))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_correlation_is_the_mean_product_at_each_of_the_27_places() -> None:
    random = np.random.default_rng(4)
    fixed, moved = random.normal(size=(2, 2, 3, 4, 5, 6))
    found = np.asarray(correlation.correlation(jnp.asarray(fixed, jnp.float32), jnp.asarray(moved, jnp.float32)))
    assert found.shape == (2, 3, 4, 5, 27)
    for b, *place in np.ndindex(2, 3, 4, 5):
        for n, offset in enumerate(np.ndindex(3, 3, 3)):
            i, j, k = np.clip(np.array(place) + offset - 1, 0, (2, 3, 4))  # beyond the border: its nearest voxel
            expected = np.dot(fixed[b, *place], moved[b, i, j, k]) / 6
            np.testing.assert_allclose(found[b, *place, n], expected, atol=1e-5)


def test_conditioning_scales_and_shifts_each_channel() -> None:
    random = np.random.default_rng(0)
    x, block = jnp.asarray(random.normal(size=(2, 2, 3, 2, 4)), jnp.float32), blocks.Conditioning()
    params = block.init(jax.random.key(0), x, jnp.float32(0.7))["params"]
    np.testing.assert_array_equal(block.apply({"params": params}, x, jnp.float32(0.7)), x)  # a fresh one
    params = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32), params)
    widen, film = ({name: np.asarray(leaf) for name, leaf in params[part].items()} for part in ("widen", "film"))
    for number in (0.7, -1.2):
        hidden = number * widen["kernel"][0] + widen["bias"]
        scale, shift = np.split(np.where(hidden > 0, hidden, 0.1 * hidden) @ film["kernel"] + film["bias"], 2)
        found = block.apply({"params": params}, x, jnp.float32(number))
        np.testing.assert_allclose(found, np.asarray(x) * (1 + scale) + shift, rtol=1e-4, atol=1e-4)


def test_queries_keys_and_values_see_their_own_distances() -> None:
    """The features of one voxel come to lie as far apart as the dilations say, and nowhere else."""
    x = jnp.zeros((1, 11, 11, 11, 4)).at[0, 5, 5, 5].set(jnp.arange(1.0, 5.0))
    block = blocks.Dilformer(heads=2, dilations=(1, 4, 2))
    params = block.init(jax.random.key(0), x)["params"]
    ranges = lambda layer, method: (layer.name or "").endswith("_range")
    _, seen = block.apply({"params": params}, x, capture_intermediates=ranges)
    for name, dilation in (("query", 1), ("key", 4), ("value", 2)):
        (y,) = seen["intermediates"][f"{name}_range"]["__call__"]
        offsets = np.argwhere(np.abs(np.asarray(y[0])).max(-1) > 1e-6) - 5
        assert {*offsets.ravel()} == {-dilation, 0, dilation} and len(offsets) == 27


def test_srf_tells_a_small_difference_from_a_large_one() -> None:
    """A norm of every path would make twice the input the same output."""
    x = jnp.asarray(np.random.default_rng(5).normal(size=(1, 4, 4, 4, 6)), jnp.float32)
    block = blocks.SRF(8)
    params = block.init(jax.random.key(0), x)
    once, twice = block.apply(params, x), block.apply(params, 2 * x)
    assert float(jnp.abs(twice - once).mean()) > 0.2 * float(jnp.abs(once).mean())


def test_diffeomorphic_levels_integrate_what_their_heads_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the head's output caught on its way: by the definition, u = exp(velocity) at the coarsest level."""
    module = models.create("dilformer", width=4, levels=2, diffeomorphic=True)
    params = trained("default")  # the option adds none
    params["head1"] = jax.tree.map(lambda leaf: leaf / 2, params["head1"])
    fixed, moving = images(module, batch=1)
    caught = lambda variables, filtering: compiled(
        lambda variables: module.apply(variables, fixed, moving, capture_intermediates=filtering)
    )(variables)
    heads = lambda layer, method: method == "__call__" and (layer.name or "").startswith("head")
    found, state = jax.device_get(caught({"params": params}, heads))
    (velocity,) = state["intermediates"]["head1"]["__call__"]
    assert 0.5 < np.abs(velocity).max() < 20
    # Points carried along the velocity in 512 small steps, by SciPy.
    points = np.moveaxis(np.indices(velocity.shape[1:4]), 0, -1).astype(float)
    for _ in range(512):
        carried = [ndimage.map_coordinates(velocity[0, ..., a], np.moveaxis(points, -1, 0), order=1, mode="nearest")
                   for a in range(3)]  # fmt: skip
        points = points + np.stack(carried, axis=-1) / 512
    flow = points - np.moveaxis(np.indices(velocity.shape[1:4]), 0, -1)
    inner = (slice(1, -1),) * 2
    assert np.abs(found[1][0] - velocity[0]).max() > 0.1
    np.testing.assert_allclose(
        found[1][0][inner], np.asarray(spatial.integrate(jnp.asarray(velocity)))[0][inner], atol=1e-5
    )
    assert np.corrcoef(found[1][0].ravel(), flow.ravel())[0, 1] > 0.95
    # Integrated, even a rough velocity of several voxels hardly folds; as a displacement, it does.
    assert folding.folding_percent(velocity[0]) > 2 * folding.folding_percent(found[1][0])


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("transmorph", {}, "There is no network 'transmorph'; there are dilformer, voxelmorph"),
        ("dilformer", {"widht": 4}, "The network dilformer has no option 'widht'; it has .*, width, window"),
        ("voxelmorph", {"width": 4}, "The network voxelmorph has no option 'width'; it has down, dtype, final, up"),
        ("dilformer", {"parent": None}, "has no option 'parent'"),
    ],
)
def test_unknown_networks_and_options_are_named(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        models.create(name, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dilformer": "both"}, "one of \\('streams', 'fused', 'plain'\\), got 'both'"),
        ({"attention": "global"}, "attention is one of \\('channels', 'windows'\\), got 'global'"),
        ({"heads": 3}, "3 attention heads do not divide a width of 8 channels"),
        ({"width": 0}, "width is 1 or more, got 0"),
        ({"levels": 0}, "levels is 1 or more, got 0"),
        ({"finest": -1}, "finest is 0 or more, got -1"),
        ({"recursions": 0}, "recursions is 1 or more, got 0"),
        ({"dilations": (1, 2, 0)}, r"dilations are three of 1 or more, got \(1, 2, 0\)"),
        ({"smoothness": (2.0, 4.0)}, r"smoothness is \(\) or two factors around 1, got \(2.0, 4.0\)"),
    ],
)
def test_options_that_do_not_exist_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        shapes(models.create("dilformer", **{"width": 4, "levels": 2, **options}))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"down": (4,), "up": (4, 4)}, r"up as often as down, or less often, got \(4, 4\) after \(4,\)"),
        ({"down": ()}, "as often as down"),
        ({"final": (0,)}, "channels are 1 or more"),
    ],
)
def test_a_u_net_without_a_shape_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        models.create("voxelmorph", **options)


@pytest.mark.parametrize(("name", "multiple"), [("dilformer", 8), ("voxelmorph", 16)])
def test_axes_that_cannot_be_halved_are_named(name: str, multiple: int) -> None:
    module = models.create(name)
    image = jax.ShapeDtypeStruct((1, 32, 32, 36, 1), jnp.float32)
    with pytest.raises(ValueError, match=f"multiples of {multiple}, got \\(32, 32, 36\\)"):
        jax.eval_shape(module.init, jax.random.key(0), image, image)


def test_lists_of_json_become_tuples() -> None:
    assert models.create("voxelmorph", down=[2], up=[3], final=[]) == models.create(
        "voxelmorph", down=(2,), up=(3,), final=()
    )
