"""What is computed on slabs is what is computed on whole volumes: values and gradients, over four simulated devices."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from dilformer_jax import models
from dilformer_jax.models import blocks, correlation
from dilformer_jax.ops import conv, regularisers, ring, similarities, slabs, spatial
from dilformer_jax.training import parallel, state, turns

# Not to be divided among four devices: 22 planes, the last of four slabs of 6 being two thirds full; at the next level
# 11 planes in slabs of 3, of which a reach of 4 or more is beyond the next neighbour.
FINE, COARSE = (22, 10, 8), (11, 5, 4)


def layers(fine, coarse, u, parameters):
    """What looks beyond its own voxel: volumes at (b, d, ...) and scalars."""
    k3, k5, k2, k4, channelwise, temperature = parameters
    return {
        "conv": conv.conv(fine, k3),
        "conv, 5x1x1": conv.conv(fine, k5),
        "conv, dilation 2": conv.conv(coarse, k3, dilation=2),
        "stride 2, 2³": conv.conv(fine, k2, stride=2),
        "stride 2, 3³": conv.conv(fine, k3, stride=2),
        "stride 2, 4³": conv.conv(fine, k4, stride=2),
        "depthwise, dilation 3": conv.depthwise(coarse, channelwise, dilation=3),
        "instance norm": blocks.instance_norm(fine),
        "channel attention": blocks.channel_attention(fine, jnp.sin(fine), fine**2, temperature),
        "correlation": correlation.correlation(fine, jnp.cos(fine)),
        "average": spatial.average(fine),
        "resize": spatial.resize(coarse, FINE if slabs.current() is None else (6, 10, 8)),
        "reduced": spatial.resize(fine, COARSE if slabs.current() is None else (3, 5, 4)),
        "finer displacement": spatial.resize_displacement(
            spatial.average(u), FINE if slabs.current() is None else (6, 10, 8)
        ),
        "Jacobian": spatial.jacobian_determinant(u)[..., None],
    }


def terms(fine, coarse, u, parameters):
    first, second = fine[..., :1], jnp.sin(fine[..., 1:])
    labels = [jnp.minimum(jnp.abs(2 * x), 3).astype(jnp.uint8) for x in (first, fine[..., 1:])]
    return {
        "LNCC": similarities.lncc(first, second, 7),
        "LNCC, zeros": similarities.lncc(first, second, 3, border="zeros"),
        "LNCC, beyond the next slab": similarities.lncc(coarse[..., :1], coarse[..., 1:], 9),
        "LNCC of some voxels": similarities.lncc(first, second, 7, where=first > 0.3),
        "MSE": similarities.mse(first, second),
        "Dice": similarities.soft_dice(first, second),
        "label overlap": similarities.label_overlap(*labels, spatial.average(u), 3),
        "diffusion": regularisers.diffusion(u),
        "bending": regularisers.bending(u),
        "inverse inconsistency": regularisers.inverse_inconsistency(u),
    }


def warps(fine, coarse, u, parameters):
    return {
        "beyond every slab": spatial.warp(fine, 12 * u),
        "near": spatial.warp(fine, u),
        "composed": spatial.compose(u, 2 * u),
        "integrated": spatial.integrate(u, 3),
    }


@pytest.mark.parametrize("program", [layers, terms, warps])
def test_slabs_are_the_whole(program):
    key = iter(jax.random.split(jax.random.key(0), 10))
    volumes = tuple(jax.random.normal(next(key), (2, *shape, c)) for shape, c in ((FINE, 2), (COARSE, 2), (FINE, 3)))
    shapes = ((3, 3, 3, 2, 3), (5, 1, 1, 2, 2), (2, 2, 2, 2, 3), (4, 4, 4, 2, 2), (3, 3, 3, 2), (2, 1, 1))
    parameters = [jax.random.normal(next(key), shape) for shape in shapes]
    outputs = jax.eval_shape(program, *volumes, parameters)
    cotangents = {name: jax.random.normal(jax.random.key(7), kind.shape) for name, kind in outputs.items()}

    def measured(volumes, parameters, cotangents):
        """Values, and gradients of their products with the cotangents: of a volume the device's own part of it, of a
        scalar, which all devices have, its share."""
        devices = 1 if slabs.current() is None else slabs.current().count

        def objective(volumes, parameters):
            values = program(*volumes, parameters)
            parts = {name: (value * cotangents[name]).sum() for name, value in values.items()}
            return sum(part if values[name].ndim else part / devices for name, part in parts.items()), values

        return jax.grad(objective, (0, 1), has_aux=True)(volumes, parameters)[::-1]

    expected, expected_gradients = jax.jit(measured)(volumes, parameters, cotangents)

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(1, 4), ("data", "space"))
    split = parallel.slabs(mesh, FINE[0], 2)
    assert (split.count, split.planes, split.depth) == (4, 6, 22)
    place = lambda tree: jax.tree.map(lambda x: jax.P(None, "space") if x.ndim == 5 else jax.P(), tree)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(place(volumes), jax.P(), place(cotangents)),
        out_specs=(place(outputs), (place(volumes), jax.P())),
        check_vma=False,
    )
    @turns.in_turn
    def on_slabs(volumes, parameters, cotangents):
        with slabs.split(split):
            values, (to_volumes, to_parameters) = measured(volumes, parameters, cotangents)
        return values, (to_volumes, lax.psum(to_parameters, "space"))

    def padded(tree, value):
        """With planes that nothing may look at."""
        margin = lambda x: ((0, 0), (0, (24 if x.shape[1] == 22 else 12) - x.shape[1]), (0, 0), (0, 0), (0, 0))
        return jax.tree.map(lambda x: jnp.pad(x, margin(x), constant_values=value) if x.ndim == 5 else x, tree)

    found, gradients = on_slabs(padded(volumes, 9.0), parameters, padded(cotangents, 0.0))
    for name, value in expected.items():
        ours = found[name] if value.ndim == 0 else found[name][:, : value.shape[1]]
        np.testing.assert_allclose(ours, value, rtol=1e-5, atol=2e-5, err_msg=name)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        if theirs.ndim == 5 and theirs.shape[1] in (22, 11):
            np.testing.assert_array_equal(ours[:, theirs.shape[1] :], 0)
            ours = ours[:, : theirs.shape[1]]
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(("reach", "hops"), [(0.0, 0), (3.5, 0), (9.0, 1)])
def test_slabs_travel_only_as_far_as_points_of_the_volume_lie(reach, hops):
    """Not for what stands in padding planes, here those of the last two of four devices."""
    split = slabs.Slabs("space", ("data", "space"), 4, depth=10, planes=5)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(1, 4), ("data", "space"))
    u = np.full((1, 20, 3, 3, 3), 1e3, np.float32)
    u[:, :10] = 0
    u[0, 0, 1, 1, 0] = reach
    image = np.random.default_rng(0).random((1, 20, 3, 3, 2), np.float32)

    def local(image, u):
        with slabs.split(split):
            place = slabs.first_plane(u) + jnp.arange(5, dtype=jnp.float32)[:, None, None]
            coordinates = jnp.clip(u.at[..., 0].add(place), 0, jnp.array([9.0, 2.0, 2.0]))
            return spatial.warp(image, u), ring.hops(image, coordinates)[None]

    spec = jax.P(None, "space")
    on_slabs = jax.shard_map(
        turns.in_turn(local), mesh=mesh, in_specs=spec, out_specs=(spec, jax.P("space")), check_vma=False
    )
    moved, found = jax.jit(on_slabs)(image, u)
    np.testing.assert_array_equal(found, hops)
    np.testing.assert_allclose(moved[:, :10], spatial.warp(image[:, :10], u[:, :10]), atol=1e-6)


def test_a_volume_of_odd_depth_is_not_halved_because_its_slabs_are_even():
    split = slabs.Slabs("space", ("data", "space"), 4, depth=11, planes=4)
    with slabs.split(split), pytest.raises(ValueError, match=r"even axes, got a volume of \(11, 4, 4\) voxels"):
        spatial.average(jnp.zeros((4, 4, 4, 1)))


def test_a_step_exchanges_halos_and_gathers_nothing(one_form):
    """In the program that JAX hands to the compiler, which divides nothing itself any more: `experiments/scaling.py`
    looks at the compiled ones."""
    module = models.create("dilformer", width=4, levels=2)
    transformation = optax.sgd(1.0)
    image = jnp.zeros((1, 8, 8, 8, 1))
    params = jax.eval_shape(module.init, jax.random.key(0), image, image)["params"]
    loss = {
        "similarity": "lncc", "border": "cut", "finest": 0, "weights": (1.0, 0.5), "windows": (5, 3),
        "regulariser": "diffusion", "regulariser_weight": 1.0,
    }  # fmt: skip
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(1, 4), ("data", "space"))
    split = parallel.slabs(mesh, 22, module.downsampling)
    step = state.step_function(module, transformation, loss, bidirectional=True, mesh=mesh, split=split)
    volumes = jax.ShapeDtypeStruct((1, 24, 16, 12, 1), jnp.float32, sharding=parallel.sharded(mesh))
    now = state.State(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(transformation.init, params))
    text = step.lower(now, {"fixed": volumes, "moving": volumes}).as_text()
    assert not re.search("all_gather|all_to_all|reduce_scatter", text)
    sizes = {
        kind: [math.prod(map(int, re.findall(r"\d+(?=x)", shape))) for shape in re.findall(result, text, re.DOTALL)]
        for kind in ("collective_permute", "all_reduce")
        if (result := rf'stablehlo\.{kind}".*?\) -> tensor<((?:\d+x)*)\w+>')
    }
    assert len(sizes["collective_permute"]) > 50
    # What is added up: parameters, statistics, planes at a border; never a volume of features.
    assert max(sizes["all_reduce"]) <= 2 * 16 * 12 * 8
