"""Collectives one after the other: the same numbers, in a program that leaves no two of them free to meet."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dilformer_jax.training import turns

DEVICES = 4
ONWARDS = [(device, device + 1) for device in range(DEVICES - 1)]


def onwards(x):
    return lax.ppermute(x, "space", ONWARDS)


def program(x, hops):
    """A loop of as many hops as it is told, one inside of a call, one that is differentiated and computed anew, and
    beside them collectives that none of these needs."""

    def travelling(x):
        hop = lambda _, carried: (carried[0] + onwards(carried[1]), onwards(carried[1]))
        return lax.fori_loop(0, hops, hop, (x, x))

    @jax.checkpoint
    def remembered(x):
        steps, _ = lax.scan(lambda x, _: (jnp.sin(onwards(x)) + lax.psum(x, "space"), None), x, length=2)
        return steps

    return {
        "loop": travelling(x)[0],
        "another": jax.jit(travelling)(3 * x)[0],
        "gradient": jax.grad(lambda x: (remembered(x) * x).sum())(x),
        "beside": onwards(2 * x) + lax.psum({"a": x, "b": x**2}, "space")["b"],
    }


def expected(x, hops):
    """The same on all slabs (devices, n) at once."""

    def shifted(x, hops=1):
        return np.concatenate([np.zeros_like(x[:hops]), x[: len(x) - hops]])

    def back(x):
        return np.concatenate([x[1:], np.zeros_like(x[:1])])

    travelled = sum(shifted(x, hop) for hop in range(hops + 1))
    first = np.sin(shifted(x)) + x.sum(0)
    second = np.sin(shifted(first)) + first.sum(0)
    # Backwards, x being the sum's weights: each device's objective also counts in what the others summed.
    to_first = back(np.cos(shifted(first)) * x) + x.sum(0)
    to_x = back(np.cos(shifted(x)) * to_first) + to_first.sum(0)
    return {
        "loop": travelled,
        "another": 3 * travelled,
        "gradient": second + to_x,
        "beside": shifted(2 * x) + (x**2).sum(0),
    }


@functools.cache
def compiled(ordered):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("space",))
    every = jax.shard_map(
        turns.in_turn(program) if ordered else program,
        mesh=mesh,
        in_specs=(jax.P("space"), jax.P()),
        out_specs=jax.P("space"),
        check_vma=False,
    )
    shapes = jax.ShapeDtypeStruct((DEVICES, 5), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    return jax.jit(every).lower(*shapes).compile()


@pytest.mark.parametrize("hops", [0, 2])
def test_it_computes_what_is_written(hops):
    x = np.random.default_rng(0).normal(size=(DEVICES, 5)).astype(np.float32)
    found = compiled(True)(x, np.int32(hops))
    for name, value in expected(x, hops).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def strangers(text):
    """Pairs of collectives, or of loops with collectives, of a compiled program's entry of which neither needs what
    the other gives."""
    bodies, body = {}, None
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            body = "entry" if line.startswith("ENTRY") else header[1]
            bodies[body] = []
        elif step := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)", line):
            bodies[body].append((step[1], step[2]))

    def communicates(step):
        called = re.findall(r"(?:body|to_apply|calls)=%([\w.\-]+)", step)
        return bool(re.search(r" (collective-permute|all-reduce)\(", step)) or any(
            communicates(inner) for name in called for _, inner in bodies[name]
        )

    needs, communicators = {}, []
    for name, step in bodies["entry"]:
        operands = re.findall(r"%([\w.\-]+)", step.partition("(")[2])
        needs[name] = set().union(*({x} | needs[x] for x in operands if x in needs))
        if communicates(step):
            communicators.append(name)
    pairs = list(itertools.combinations(communicators, 2))
    assert len(pairs) > 20
    return [(a, b) for a, b in pairs if a not in needs[b] and b not in needs[a]]


def test_no_two_collectives_can_be_under_way_at_once():
    assert strangers(compiled(False).as_text())
    assert not strangers(compiled(True).as_text())


def test_collectives_in_a_conditional_are_refused():
    either = turns.in_turn(lambda x: lax.cond(x[0, 0] > 0, onwards, jnp.sin, x))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("space",))
    every = jax.shard_map(either, mesh=mesh, in_specs=jax.P("space"), out_specs=jax.P("space"), check_vma=False)
    with pytest.raises(NotImplementedError, match="in a cond cannot be put in order"):
        jax.eval_shape(every, jnp.ones((DEVICES, 5)))
