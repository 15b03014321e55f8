"""Collectives one after the other, on devices that XLA simulates on the CPU.

There a collective waits only until a loop with collectives of its own has begun, not until it has ended, and all bear
one number: a device that is still in the loop and one that is beyond it take each other's data for what they wait for.
Gradients were wrong by that, now and then. (jaxlib 0.10.2: XLA's thunk executor has 'scheduling' edges between
collectives, JAX numbers all of them 1.) Accelerators execute collectives in the program's order.

So here each collective takes an operand that is known only after the last one.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxpr_as_fun, jaxprs_in_params
from jaxtyping import Array, Int

COLLECTIVES = ("all_gather", "all_to_all", "pmax", "pmin", "ppermute", "psum", "reduce_scatter")
# Calls of a program that may as well stand in their place, and the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
LOOPS = {"scan": "jaxpr", "while": "body_jaxpr"}
Turn = Int[Array, ""] | None


def in_turn(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, of arrays in trees, with its collectives executed in the order in which they are traced.

    Raises:
      NotImplementedError: collectives in a conditional.
    """

    def ordered(*arguments: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        results, _ = _run(program.jaxpr, program.consts, jax.tree.leaves(arguments), None)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return ordered


def _run(program: Jaxpr, constants: Sequence[Any], arguments: Sequence[Any], turn: Turn) -> tuple[list[Any], Turn]:
    """What the program gives, and the turn after its last collective."""
    values = dict(zip((*program.constvars, *program.invars), (*constants, *arguments), strict=True))

    def read(atoms: Iterable[Any]) -> list[Any]:
        return [atom.val if isinstance(atom, Literal) else values[atom] for atom in atoms]

    for step in program.eqns:
        name, params = step.primitive.name, step.params
        if not _communicates(step):
            results = _done(program, step, values)
        elif name in CALLS:
            inner = params[CALLS[name]]
            results, turn = _run(inner.jaxpr, inner.consts, read(step.invars), turn)
        elif name in ("checkpoint", "remat2"):
            # What is computed anew must not be taken from what was computed before: JAX lowers it to just this.
            operands = read(step.invars)
            if params["differentiated"]:
                operands = lax.optimization_barrier(operands)
            results, turn = _run(params["jaxpr"], (), operands, turn)
        elif name in COLLECTIVES or name in LOOPS:
            if body := LOOPS.get(name):
                inner = jax.make_jaxpr(in_turn(jaxpr_as_fun(params[body])))(*params[body].in_avals)
                step = step.replace(params=params | {body: inner})
            waiting = {} if turn is None else _waiting(turn, step, values)
            results = _done(program, step, values | waiting)
            turn = _known_after(results)
        else:
            raise NotImplementedError(f"Collectives in a {name} cannot be put in order.")
        values.update(zip(step.outvars, results, strict=True))
    return read(program.outvars), turn


def _done(program: Jaxpr, step: JaxprEqn, values: dict[Any, Any]) -> list[Any]:
    """What this one step of the program gives."""
    inputs = list(dict.fromkeys(atom for atom in step.invars if not isinstance(atom, Literal)))
    alone = program.replace(constvars=inputs, invars=[], outvars=step.outvars, eqns=[step])
    return jax.core.eval_jaxpr(alone, [values[atom] for atom in inputs])


def _waiting(turn: Array, step: JaxprEqn, values: dict[Any, Any]) -> dict[Any, Any]:
    """The step's operands, known only when it is its turn."""
    operands = {atom: values[atom] for atom in step.invars if not isinstance(atom, Literal)}
    numbers = {atom: x for atom, x in operands.items() if jnp.issubdtype(x.dtype, jnp.number)}
    if step.primitive.name not in COLLECTIVES:
        # A loop waits for all of its operands; but each operand of one collective may be sent by itself.
        smallest = min(numbers, key=lambda atom: numbers[atom].size)
        numbers = {smallest: numbers[smallest]}
    return {atom: x + turn.astype(x.dtype) for atom, x in numbers.items()}


def _known_after(results: Sequence[Array]) -> Array:
    """A zero that is known only when the results are: numbers of set bits are never negative, but the compiler does not
    know that."""
    firsts = [x[tuple(slice(0, 1) for _ in x.shape)].astype(jnp.float32).reshape(()) for x in results]
    bits = [lax.population_count(lax.bitcast_convert_type(first, jnp.int32)) for first in firsts]
    return jnp.minimum(sum(bits, jnp.int32(0)), 0)


def _communicates(step: JaxprEqn) -> bool:
    return step.primitive.name in COLLECTIVES or any(
        _communicates(inner) for program in jaxprs_in_params(step.params) for inner in program.eqns
    )
