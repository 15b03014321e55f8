"""The training step: what it keeps in memory, computes in and hands on; equal however it is cut."""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from dilformer_jax import models
from dilformer_jax.data.phantoms import phantom
from dilformer_jax.ops import platforms
from dilformer_jax.training import checkpoint, feeding, parallel, state

LOSS = {
    "finest": 0,
    "weights": (1.0, 0.5),
    "windows": (5, 3),
    "similarity": "lncc",
    "border": "cut",
    "regulariser": "diffusion",
    "regulariser_weight": 1.0,
}
SIZE = (16, 16, 16)
PAIRS = 8
OPTIONS = {"width": 4, "levels": 2}


@functools.cache
def module() -> Any:
    """Of a step that is compiled: with the blocks that are compiled soonest."""
    return models.create("dilformer", **OPTIONS, msr=False, dilformer="plain")


@functools.cache
def transformation() -> Any:
    return state.optimiser(learning_rate=1e-2, warmup_steps=0, total_steps=100, schedule="constant", clip=1.0)


@functools.cache
def brains() -> tuple[np.ndarray, np.ndarray]:
    """Fixed and moving images (PAIRS, *SIZE, 1): phantoms, averaged to the size."""
    images = [phantom(seed, (32, 32, 32))[0] for seed in range(PAIRS + 1)]
    small = [image.reshape(16, 2, 16, 2, 16, 2).mean((1, 3, 5)) for image in images]
    stacked = np.stack(small).astype(np.float32)[..., None]
    return stacked[:-1], stacked[1:]


@functools.cache
def mesh() -> jax.sharding.Mesh:
    return parallel.mesh()


def batch() -> dict[str, jax.Array]:
    return feeding.feeder(mesh())(dict(zip(("fixed", "moving"), brains(), strict=True)))


@functools.cache
def fresh() -> state.State:
    return jax.device_get(state.initial(module(), transformation(), 0))


def start() -> state.State:
    """A state whose network moves: heads of a fresh one give nearly nothing."""
    loud = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 3e3 if path[0].key.startswith("head") else x, fresh().params
    )
    return jax.device_put(fresh().replace(params=loud), parallel.replicated(mesh()))


@functools.cache
def compiled(**options: Any) -> Any:
    """The step's program for the whole batch: the compiler runs once for each set of options."""
    step = state.step_function(module(), transformation(), LOSS, bidirectional=True, mesh=mesh(), **options)
    return step.lower(start(), batch()).compile()


@functools.cache
def advanced(**options: Any) -> tuple[Any, dict[str, float]]:
    now, measured = compiled(**options)(start(), batch())
    return jax.device_get(now), {name: float(value) for name, value in measured.items()}


def close(found: Any, expected: Any, tolerance: float) -> None:
    for name, one, other in zip(
        (jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(expected)),
        jax.tree.leaves(found),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(np.abs(other).max(), 1e-6), err_msg=name)


# --- remat and accumulation: the same numbers ---


# Both at once, which is one compilation less.
CUT = {"remat": True, "accumulate": 2}


def test_a_step_does_not_depend_on_how_it_is_cut() -> None:
    """Adam's first moment is the gradient, clipped: it shows what a bias-corrected step, about ±1, would hide."""
    (now, measured), (expected, reference) = advanced(**CUT), advanced()
    # Rounding puts some points on the other side of a voxel, where the slope is another.
    close(now.opt_state[1][0].mu, expected.opt_state[1][0].mu, 5e-3)
    assert now.step == expected.step == 1
    assert measured.keys() == reference.keys()
    for name, value in reference.items():
        assert measured[name] == pytest.approx(value, rel=1e-4), name
    assert reference["gradient_norm"] > 1e-3


def test_parts_of_a_batch_stay_on_their_devices() -> None:
    """Each device takes its share of each part from its share of the batch: gradients alone are exchanged."""
    moving = ("all-gather", "all-to-all", "collective-permute")
    programs = [compiled(**options).as_text() for options in ({}, CUT)]
    assert all("all-reduce" in text for text in programs)
    assert [name for name in moving for text in programs if name in text] == []


def test_remat_and_accumulation_save_memory() -> None:
    """Each about half, together about a quarter: either alone would not do."""
    whole, cut = (compiled(**options).memory_analysis().temp_size_in_bytes for options in ({}, CUT))
    assert cut <= 0.42 * whole


@pytest.mark.parametrize("name", ["dilformer", "voxelmorph"])
def test_remat_names_the_same_parameters(name: str, one_form: None) -> None:
    options = (
        OPTIONS | {"recursions": 2, "dilformer": "fused"} if name == "dilformer" else {"down": (4, 4), "up": (4, 4)}
    )
    network = models.create(name, **options)
    image = jax.ShapeDtypeStruct((1, *SIZE, 1), jnp.float32)
    params = jax.eval_shape(network.init, jax.random.key(0), image, image)
    gradient = jax.grad(lambda params: network.apply(params, image_of(1), image_of(2), remat=True)[0].sum())
    found = jax.eval_shape(gradient, params)
    assert jax.tree.map(lambda x: x.shape, found) == jax.tree.map(lambda x: x.shape, params)


def image_of(seed: int) -> jax.Array:
    return jnp.asarray(brains()[0][seed : seed + 1])


# --- donation, and one program for the whole run ---


def test_the_state_is_updated_in_place() -> None:
    now = start()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(now))
    assert compiled().memory_analysis().alias_size_in_bytes == size
    compiled()(now, batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(now))


def test_a_run_traces_its_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of `train`, before and after a restart: restored numbers have the types and places of fresh ones."""
    traces = []
    multi_resolution = state.losses.multi_resolution

    def counted(*arguments, **options):
        traces.append(None)
        return multi_resolution(*arguments, **options)

    monkeypatch.setattr(state.losses, "multi_resolution", counted)
    replicated = parallel.replicated(mesh())
    step = state.step_function(module(), transformation(), LOSS, bidirectional=True, mesh=mesh())
    now = jax.device_put(fresh(), replicated)
    for _ in range(2):
        now, _ = step(now, batch())
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, now)
        checkpoints.wait()
        now = checkpoints.restore(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), now)
        )
    for _ in range(2):
        now, _ = step(now, batch())
    assert int(now.step) == 4
    assert len(traces) == step._cache_size() == 1


# --- bfloat16 ---


def equations(jaxpr: core.Jaxpr):
    """Every equation of a program, those of its parts included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(part, "jaxpr", part)
                if isinstance(inner, core.Jaxpr):
                    yield from equations(inner)


NETWORKS = {
    "dilformer": OPTIONS,
    "windows": OPTIONS | {"attention": "windows", "window": (2, 2, 2), "srf": False, "finest": 1},
    "voxelmorph": {"down": (4, 4), "up": (4, 4), "final": (4,)},
}


def network(name: str) -> Any:
    return models.create("voxelmorph" if name == "voxelmorph" else "dilformer", dtype="bfloat16", **NETWORKS[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_computed_in_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All convolutions but the heads', and all matrix products but those of the resizing, which are exact; no sum, no
    norm and no softmax."""
    image = jax.ShapeDtypeStruct((1, *SIZE, 1), jnp.float32)
    params = jax.eval_shape(network(name).init, jax.random.key(0), image, image)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}

    def displacements(params, fixed, moving):
        found = network(name).apply(params, fixed, moving)
        assert {u.dtype for u in found} == {jnp.dtype("float32")}
        return found

    # As accelerators have it; the CPU's convolutions of three depths compute in float32 what is bfloat16 around them.
    monkeypatch.setattr(platforms, "by_platform", lambda *operands, default, **_: default(*operands))
    found = list(equations(jax.make_jaxpr(displacements)(params, image, image).jaxpr))
    types = lambda equation: {var.aval.dtype.name for var in equation.invars if var.aval.ndim > 1}
    convolutions = [equation for equation in found if equation.primitive.name == "conv_general_dilated"]
    heads = [equation for equation in convolutions if types(equation) == {"float32"}]
    assert len(convolutions) > 2 * len(heads) > 0
    assert all(types(equation) == {"bfloat16"} for equation in convolutions if equation not in heads)
    assert {equation.outvars[0].aval.shape[-1] for equation in heads} == {8}  # of which three are the displacement's
    products = [equation for equation in found if equation.primitive.name == "dot_general"]
    exact = [equation for equation in products if str(equation.params["precision"]).count("HIGHEST")]
    assert all(types(equation) == {"float32"} for equation in exact)
    rough = [equation for equation in products if equation not in exact]
    assert rough or name == "voxelmorph"
    assert {kind for equation in rough for kind in types(equation)} <= {"bfloat16"}
    for kind in ("rsqrt", "exp", "reduce_sum", "floor", "gather"):
        operands = {types(equation).pop() for equation in found if equation.primitive.name == kind and types(equation)}
        assert operands <= {"float32", "int32"}, kind


def test_bfloat16_registers_as_float32_does() -> None:
    """Within a tenth of the largest displacement, and 3 % on average; with gradients in float32."""
    fixed, moving = (jnp.asarray(images[:1]) for images in brains())
    whole = {dtype: models.create("dilformer", dtype=dtype, **OPTIONS) for dtype in ("bfloat16", "float32")}
    generator, kinds = np.random.default_rng(0), jax.eval_shape(whole["float32"].init, jax.random.key(0), fixed, moving)
    # As large as fresh ones, the heads' too.
    drawn = lambda kind: generator.normal(scale=math.prod(kind.shape[:-1]) ** -0.5, size=kind.shape).astype(np.float32)
    params = jax.tree.map(drawn, kinds)
    found, expected = (jax.device_get(jax.jit(network.apply)(params, fixed, moving)) for network in whole.values())
    for u, reference in zip(found, expected, strict=True):
        assert u.dtype == np.float32
        size = np.linalg.norm(reference, axis=-1)
        assert size.max() > 0.3
        error = np.linalg.norm(u - reference, axis=-1)
        assert 0 < error.max() < 0.1 * size.max() and error.mean() < 0.03 * size.mean()
    total = lambda params: sum(u.sum() for u in whole["bfloat16"].apply(params, fixed, moving))
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(jax.grad(total), params))} == {np.dtype(np.float32)}


# --- Every platform ---


def test_a_step_and_an_inference_lower_for_every_platform() -> None:
    """On a machine that has only a CPU; the step on volumes that are split."""
    everywhere = ("cpu", "cuda", "tpu")
    whole, two = models.create("dilformer", **OPTIONS), parallel.mesh(2)
    split = parallel.slabs(two, SIZE[0], whole.downsampling)
    step = state.step_function(whole, transformation(), LOSS, bidirectional=True, mesh=two, split=split)
    image = jax.ShapeDtypeStruct((2, *SIZE, 1), jnp.float32, sharding=parallel.sharded(two))
    params = jax.eval_shape(whole.init, jax.random.key(0), image, image)["params"]
    now = state.State(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(transformation().init, params))
    one = models.create("dilformer", width=4, levels=1)  # whatever it computes, the step does too
    one_params = jax.eval_shape(one.init, jax.random.key(0), image, image)["params"]
    predict = jax.jit(lambda params, fixed, moving: one.apply({"params": params}, fixed, moving))
    with platforms.every():
        exported_step = jax.export.export(step, platforms=everywhere)(now, {"fixed": image, "moving": image})
        pair = [jax.ShapeDtypeStruct((1, *SIZE, 1), jnp.float32)] * 2
        exported_predict = jax.export.export(predict, platforms=everywhere)(one_params, *pair)
    for exported, devices in ((exported_step, 4), (exported_predict, 1)):
        assert exported.platforms == everywhere and exported.nr_devices == devices
        # Native convolutions of volumes for the accelerators, those of planes for the CPU.
        text = exported.mlir_module()
        assert "dim_numbers = [b, 0, 1, 2, f]" in text and "dim_numbers = [b, 0, 1, f]" in text


# --- what a state may keep, and a network be told ---


class Shift:
    """u = params['shift'] everywhere, or a ramp times the smoothness that it is told."""

    downsampling = 2

    def __init__(self, smoothness: tuple[float, ...] = (), power: int = 0) -> None:
        self.smoothness, self.power = smoothness, power

    def apply(self, variables: Any, fixed: Any, moving: Any, *, both: bool, remat: bool, smoothness: Any = 1.0) -> Any:
        ramp = jnp.broadcast_to(jnp.arange(16.0)[:, None, None, None], (*fixed.shape[1:4], 3))
        u = variables["params"]["shift"] + (0.1 * ramp * smoothness**self.power if self.smoothness else 0)
        return (jnp.broadcast_to(u, (2 * len(fixed), *fixed.shape[1:4], 3)),)


# At one level, by what is compiled soonest.
SIMPLE = LOSS | {"weights": (1.0,), "windows": (3,), "similarity": "mse"}


def steps_of(network: Any, count: int, average: float = 0.0, rate: float = 0.05) -> tuple[list[Any], list[Any]]:
    """The states after each step, and what was measured."""
    how = state.optimiser(learning_rate=rate, warmup_steps=0, total_steps=100, schedule="constant", clip=1.0)
    params = {"shift": jnp.float32([0.3, -0.2, 0.1])}
    now = state.State(jnp.int32(0), params, how.init(params), jax.tree.map(jnp.copy, params) if average else None)
    step = state.step_function(network, how, SIMPLE, bidirectional=True, mesh=mesh(), average=average, total_steps=100)
    states, seen = [], []
    now = jax.device_put(now, parallel.replicated(mesh()))
    for _ in range(count):
        now, measured = step(now, batch())
        states.append(jax.device_get(now))
        seen.append({name: float(value) for name, value in measured.items()})
    return states, seen


def test_the_running_mean_forgets_where_it_began() -> None:
    """By the recursion, whose first steps keep less than `average`: 1/10, 2/11, 3/12 ..."""
    states, _ = steps_of(Shift(), 6, average=0.3)
    mean = np.float64([0.3, -0.2, 0.1])
    for number, now in enumerate(states):
        kept = min(0.3, (1 + number) / (10 + number))
        mean = kept * mean + (1 - kept) * now.params["shift"]
        np.testing.assert_allclose(now.average["shift"], mean, rtol=1e-5)
        assert now.trained is now.average
    assert np.abs(states[-1].average["shift"] - states[-1].params["shift"]).max() > 1e-3
    assert steps_of(Shift(), 1)[0][0].trained["shift"] is not None


def test_a_network_is_told_the_smoothness_that_it_is_trained_for() -> None:
    """The ramp's roughness is known: times the weight drawn, and, where the ramp follows what is told, its square."""
    plain, told = (
        np.array([line["regulariser"] for line in steps_of(Shift((0.5, 2.0), power), 40, rate=1e-9)[1]])
        for power in (0, 1)
    )
    # The components change by 0.1 a voxel, along one of three axes.
    drawn = plain / (0.1**2 / 3)
    assert 0.5 <= drawn.min() < 0.7 and 1.4 < drawn.max() <= 2.0 and abs(np.log(drawn).mean()) < 0.25
    np.testing.assert_allclose(told / plain, drawn**2, rtol=1e-3)
