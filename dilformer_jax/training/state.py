"""The state of a run and the step that advances it."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from dilformer_jax.io.volumes import BadInput
from dilformer_jax.ops import losses, slabs
from dilformer_jax.ops.slabs import Slabs
from dilformer_jax.training import turns

# What a batch may bring: the images that the network sees; what their similarity is measured on, where that is not
# them; and their labels.
ROLES = tuple(f"{role}{kind}" for kind in ("", "_clean", "_labels") for role in ("fixed", "moving"))
Metrics = dict[str, Float[Array, ""]]


@flax.struct.dataclass
class State:
    """All that a checkpoint holds: steps done, parameters, the optimiser's moments and, where a run keeps it, the
    running mean of the parameters."""

    step: Any  # an int32 scalar; JAX and orbax also build this class around shapes and None
    params: Any
    opt_state: Any
    average: Any = None

    @property
    def trained(self) -> Any:
        """The parameters that are validated and used: their running mean where there is one."""
        return self.params if self.average is None else self.average


KINDS = ("adam", "amsgrad", "adamw")


def optimiser(
    *,
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    schedule: str,
    clip: float,
    kind: str = "adam",
    decay: float = 0.0,
) -> optax.GradientTransformation:
    """Adam on gradients clipped to the global norm `clip`; the rate rises linearly, then follows 'cosine' to zero or
    stays 'constant'. Of the kind 'amsgrad' (Reddi et al., ICLR 2018) second moments do not shrink; of the kind 'adamw'
    (Loshchilov and Hutter, ICLR 2019) parameters lose `decay` times the rate of themselves at each step.

    Raises:
      BadInput: an unknown schedule or kind, a warm-up as long as the run, a rate or norm that is not positive, a
        decay that is negative or not of 'adamw'.
    """
    if not 0 <= warmup_steps < total_steps:
        raise BadInput(
            f"optimiser.warmup_steps is {warmup_steps} of {total_steps} steps; make it 0 or more, and shorter than the "
            "run."
        )
    for name, value in (("learning_rate", learning_rate), ("clip", clip)):
        if not value > 0:
            raise BadInput(f"optimiser.{name} is {value}; make it positive.")
    if schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, total_steps)
    elif schedule == "constant":
        rate = optax.join_schedules(
            [optax.linear_schedule(0.0, learning_rate, warmup_steps), optax.constant_schedule(learning_rate)],
            [warmup_steps],
        )
    else:
        raise BadInput(f"optimiser.schedule is {schedule!r}; give 'cosine' or 'constant'.")
    if kind not in KINDS:
        raise BadInput(f"optimiser.kind is {kind!r}; give one of {', '.join(KINDS)}.")
    if not decay >= 0 or (decay and kind != "adamw"):
        raise BadInput(f"optimiser.decay is {decay} with {kind}; make it 0, or positive with 'adamw'.")
    moments = {
        "adam": optax.adam,
        "amsgrad": optax.amsgrad,
        "adamw": functools.partial(optax.adamw, weight_decay=decay),
    }
    return optax.chain(optax.clip_by_global_norm(clip), moments[kind](rate))


def fresh(module: Any, key: Array) -> Any:
    """Random parameters of a network, which do not depend on the volume's shape, so that a tiny one makes them."""
    size = 2 * module.downsampling
    image = jnp.zeros((1, size, size, size, 1))
    return module.init(key, image, image)["params"]


def initial(
    module: Any, transformation: optax.GradientTransformation, seed: int, *, params: Any = None, average: float = 0.0
) -> State:
    """The state before the first step, with `params` or, without them, fresh ones; with a running mean of them where
    `average` is not 0.

    Raises BadInput for an average that is not at least 0 and less than 1, and, naming one of them, for `params` that
    are not this network's.
    """
    if not 0 <= average < 1:
        raise BadInput(f"average is {average}; make it 0, for none, or less than 1, 0.999 for example.")
    make = functools.partial(fresh, module)
    if params is None:
        # Optimised, this program of random numbers would take a CPU over a minute to compile, and it runs once.
        little = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        params = jax.jit(make, compiler_options=little)(jax.random.key(seed))
    else:
        _check_same(params, jax.eval_shape(make, jax.random.key(seed)))
        params = jax.tree.map(jnp.asarray, params)
    # A copy, for the step takes the buffers of both for its own.
    mean = jax.tree.map(jnp.copy, params) if average else None
    return State(jnp.zeros((), jnp.int32), params, transformation.init(params), mean)


def _check_same(params: Any, wanted: Any) -> None:
    shapes = lambda tree: {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    found, needed = shapes(params), shapes(wanted)
    for name in sorted(found.keys() | needed.keys()):
        if found.get(name) != needed.get(name):
            raise BadInput(
                f"the parameters to start from have {name} {_shape(found.get(name))} where this network has "
                f"{_shape(needed.get(name))}; give those of a network with the same config.model."
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "not at all" if shape is None else f"of {'x'.join(map(str, shape)) or 'one number'}"


def step_function(
    module: Any,
    transformation: optax.GradientTransformation,
    loss: Mapping[str, Any],
    *,
    bidirectional: bool,
    mesh: Mesh,
    split: Slabs | None = None,
    remat: bool = False,
    accumulate: int = 1,
    average: float = 0.0,
    total_steps: int = 1,
) -> Callable[[State, Mapping[str, Any]], tuple[State, Metrics]]:
    """The compiled step: (state, batch) to (state, metrics). The state given is used up.

    The batch is split over the 'data' axis of the mesh, its volumes over the 'space' axis as `split` says (from
    `parallel.slabs`), and everything else replicated. A step is a function of its arguments alone.

    Neither of two options changes what is computed, but by rounding: `remat` keeps no features for the gradient but
    computes them anew; `accumulate` cuts the batch in so many parts, of whole pairs for each device, one after the
    other. `average` is how much of the running mean of the parameters, where the state has one, is left after a step
    (less in the first steps, whose parameters it should forget); `total_steps` are what a loss that changes in the
    course of a run counts from.
    """
    everywhere = ("data", "space")

    def cut(batch):
        # Every `accumulate`-th of the pairs that a device has.
        every = lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1)
        return jax.tree.map(every, batch)

    asked = getattr(module, "smoothness", ())

    def objective(params, batch, now):
        given = {"smoothness": now["smoothness"]} if asked else {}
        displacements = module.apply(
            {"params": params}, batch["fixed"], batch["moving"], both=bidirectional, remat=remat, **given
        )

        def ordered(kind):
            fixed, moving = batch[f"fixed{kind}"], batch[f"moving{kind}"]
            if not bidirectional:
                return fixed, moving
            # As the network orders them: pair by pair, both directions beside each other.
            beside = lambda first, second: jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])
            return beside(fixed, moving), beside(moving, fixed)

        # Made images come with what they show in one contrast, the same for both: that is what can be compared.
        fixed, moving = ordered("_clean" if "fixed_clean" in batch else "")
        names = ("fixed_labels", "moving_labels") if "fixed_labels" in batch else ()
        labels = dict(zip(names, ordered("_labels") if names else (), strict=True))
        weight = loss["regulariser_weight"] * now["smoothness"]
        how = {**loss, "regulariser_weight": weight, "progress": now["progress"]}
        value, parts = losses.multi_resolution(fixed, moving, displacements, **how, **labels)
        # Each device's part of the mean over all of them: differentiated by one, it gives what its own copy of the
        # parameters contributes.
        return value / mesh.size, parts | {"loss": value}

    def differentiated(params, batch, now):
        return jax.grad(objective, has_aux=True)(params, batch, now)

    def accumulated(params, batch, now):
        add = lambda total, part: (jax.tree.map(jnp.add, total, differentiated(params, part, now)), None)
        parts = cut(batch)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(differentiated, params, first, now)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = lax.scan(add, zeros, parts)
        return jax.tree.map(lambda x: x / accumulate, total)

    def summed(params, batch, now):
        with slabs.split(split):
            gradients, parts = (accumulated if accumulate > 1 else differentiated)(params, batch, now)
        return lax.psum(gradients, everywhere), lax.pmean(parts, everywhere)

    platform = mesh.devices.flat[0].platform
    simulated = split is not None and platform == "cpu"
    # Every device works on what it holds, by the same program as one device alone, and says itself what it needs of
    # the others: `ops.slabs` what neighbouring slabs share, `summed` the sums.
    measured = jax.shard_map(
        turns.in_turn(summed) if simulated else summed,
        mesh=mesh,
        in_specs=(jax.P(), jax.P(*everywhere), jax.P()),
        out_specs=jax.P(),
        check_vma=False,
    )

    options = _compiler_options(platform)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=NamedSharding(mesh, jax.P()), compiler_options=options)
    def step(state: State, batch: dict[str, Array]) -> tuple[State, Metrics]:
        now = {"progress": state.step / total_steps, "smoothness": jnp.float32(1)}
        if asked:
            # Another one at each step, the same on every device: a function of the step alone.
            low, high = np.log(asked)
            drawn = jax.random.uniform(jax.random.fold_in(jax.random.key(0), state.step))
            now["smoothness"] = jnp.exp(low + (high - low) * drawn)
        gradients, parts = measured(state.params, {name: batch[name] for name in batch if name in ROLES}, now)
        updates, opt_state = transformation.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        mean = None
        if state.average is not None:
            kept = jnp.minimum(average, (1 + state.step) / (10 + state.step))
            mean = jax.tree.map(lambda old, new: new + kept * (old - new), state.average, params)
        advanced = State(state.step + 1, params, opt_state, mean)
        share = parts["regulariser"] / (jnp.abs(parts["similarity"]) + parts["regulariser"])
        return advanced, parts | {"regulariser_share": share, "gradient_norm": optax.tree.norm(gradients)}

    return step


def _compiler_options(platform: str) -> dict[str, Any] | None:
    """Of a training step, as it runs on 'cpu', 'gpu' or 'tpu'."""
    if platform == "gpu":
        # XLA would bring the channels of 3-D convolutions to the front for cuDNN, which brings most of them back.
        return {"xla_gpu_force_conv_nhwc": True}
    level = "xla_backend_optimization_level"
    if platform == "cpu" and level not in os.environ.get("XLA_FLAGS", ""):
        # Four fifths of the time of compiling. Products of matrices are not LLVM's, and the rest runs no slower
        # (`experiments/benchmark.py --only compiling`).
        return {level: 1}
    return None
