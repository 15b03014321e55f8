"""The state of a run and the step that advances it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
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
    """All that a checkpoint holds: steps done, parameters, and the optimiser's moments."""

    step: Any  # an int32 scalar; JAX and orbax also build this class around shapes and None
    params: Any
    opt_state: Any


def optimiser(
    *, learning_rate: float, warmup_steps: int, total_steps: int, schedule: str, clip: float
) -> optax.GradientTransformation:
    """Adam on gradients clipped to the global norm `clip`; the rate rises linearly, then follows 'cosine' to zero or
    stays 'constant'.

    Raises:
      BadInput: an unknown schedule, a warm-up as long as the run, a rate or norm that is not positive.
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
    return optax.chain(optax.clip_by_global_norm(clip), optax.adam(rate))


def initial(module: Any, transformation: optax.GradientTransformation, seed: int) -> State:
    """The state before the first step. Parameters do not depend on the volume's shape, so a tiny one makes them."""
    size = 2 * module.downsampling
    image = jnp.zeros((1, size, size, size, 1))
    params = jax.jit(module.init)(jax.random.key(seed), image, image)["params"]
    return State(step=jnp.zeros((), jnp.int32), params=params, opt_state=transformation.init(params))


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
) -> Callable[[State, Mapping[str, Any]], tuple[State, Metrics]]:
    """The compiled step: (state, batch) to (state, metrics). The state given is used up.

    The batch is split over the 'data' axis of the mesh, its volumes over the 'space' axis as `split` says (from
    `parallel.slabs`), and everything else replicated. A step is a function of its arguments alone.

    Neither option changes what is computed, but by rounding: `remat` keeps no features for the gradient but computes
    them anew; `accumulate` cuts the batch in so many parts, of whole pairs for each device, one after the other.
    """
    everywhere = ("data", "space")

    def cut(batch):
        # Every `accumulate`-th of the pairs that a device has.
        every = lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1)
        return jax.tree.map(every, batch)

    def objective(params, batch):
        displacements = module.apply(
            {"params": params}, batch["fixed"], batch["moving"], both=bidirectional, remat=remat
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
        value, parts = losses.multi_resolution(fixed, moving, displacements, **loss, **labels)
        # Each device's part of the mean over all of them: differentiated by one, it gives what its own copy of the
        # parameters contributes.
        return value / mesh.size, parts | {"loss": value}

    def differentiated(params, batch):
        return jax.grad(objective, has_aux=True)(params, batch)

    def accumulated(params, batch):
        add = lambda total, part: (jax.tree.map(jnp.add, total, differentiated(params, part)), None)
        parts = cut(batch)
        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(differentiated, params, first))
        total, _ = lax.scan(add, zeros, parts)
        return jax.tree.map(lambda x: x / accumulate, total)

    def summed(params, batch):
        with slabs.split(split):
            gradients, parts = (accumulated if accumulate > 1 else differentiated)(params, batch)
        return lax.psum(gradients, everywhere), lax.pmean(parts, everywhere)

    platform = mesh.devices.flat[0].platform
    simulated = split is not None and platform == "cpu"
    # Every device works on what it holds, by the same program as one device alone, and says itself what it needs of
    # the others: `ops.slabs` what neighbouring slabs share, `summed` the sums.
    measured = jax.shard_map(
        turns.in_turn(summed) if simulated else summed,
        mesh=mesh,
        in_specs=(jax.P(), jax.P(*everywhere)),
        out_specs=jax.P(),
        check_vma=False,
    )

    # XLA would bring the channels of 3-D convolutions to the front for cuDNN, which brings most of them back.
    layout = {"xla_gpu_force_conv_nhwc": True} if platform == "gpu" else None

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=NamedSharding(mesh, jax.P()), compiler_options=layout)
    def step(state: State, batch: dict[str, Array]) -> tuple[State, Metrics]:
        gradients, parts = measured(state.params, {name: batch[name] for name in batch if name in ROLES})
        updates, opt_state = transformation.update(gradients, state.opt_state, state.params)
        advanced = State(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        share = parts["regulariser"] / (jnp.abs(parts["similarity"]) + parts["regulariser"])
        return advanced, parts | {"regulariser_share": share, "gradient_norm": optax.tree.norm(gradients)}

    return step
