"""What the benchmark's cases are made of."""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import peers

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
Shape = tuple[int, int, int]
Run = Callable[[], Any]
Row = dict[str, Any]


@dataclasses.dataclass
class Case:
    """One thing, done by this package in some ways and by its peers in others; each way returns when asked to block.

    Attributes:
      name, size, dtype: what is done, to what.
      ours: this package's ways, by name; a row is printed for each, against each peer.
      theirs: the peers' ways.
      target: the largest ratio aimed at, against the first peer; by the name of our way where these have their own.
      rounds: at most, where a round is slow.
      extra: what else the rows show, by the name of our way.
    """

    name: str
    size: str
    ours: dict[str, Run]
    theirs: dict[str, Run] = dataclasses.field(default_factory=dict)
    target: float | dict[str, float] | None = None
    dtype: str = "float32"
    rounds: int | None = None
    extra: dict[str, Row] = dataclasses.field(default_factory=dict)


def noise(seed: int, *shape: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), shape)


def with_gradients(function: Callable, variables: tuple[int, ...] = (0, 1)) -> Callable:
    """Value and gradients of the sum of squares, so that no cotangent is a constant that the compiler could use."""
    return jax.value_and_grad(lambda *operands: jnp.square(function(*operands)).sum(), variables)


def compiled(program: Callable, *operands: jax.Array) -> Run:
    # A function of its own: what JAX traced for another form must not be taken for this one.
    return functools.partial(jax.jit(lambda *operands: program(*operands)).lower(*operands).compile(), *operands)


def torch_run(make: Callable[..., Run], *operands: Any, **options: Any) -> dict[str, Run]:
    """PyTorch's way, where it is installed."""
    return {"PyTorch": make(*operands, **options)} if peers.available() else {}


def clones(arguments: argparse.Namespace) -> list[tuple[str, Path]]:
    given = [(name, getattr(arguments, name)) for name in peers.NETWORKS]
    return [(name, clone) for name, clone in given if clone and peers.available()]


def problems(arguments: argparse.Namespace, on_cpu: Shape) -> list[tuple[Shape, str]]:
    """Sizes and types of whole networks: one on the CPU, the published ones on an accelerator."""
    if arguments.quick:
        return [((32, 32, 32), "float32")]
    if jax.default_backend() == "cpu":
        return [(on_cpu, "float32")]
    sizes = [tuple(arguments.size)] if arguments.size else [(160, 192, 160), (160, 192, 224)]
    return [(shape, dtype) for shape in sizes for dtype in arguments.dtypes]


def by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def work(executable: Any) -> Row:
    """XLA's count of a program's operations and bytes moved; a loop's body counts once."""
    analysis = executable.cost_analysis() or {}
    memory = executable.memory_analysis()
    return {
        "operations": analysis.get("flops"),
        "bytes": analysis.get("bytes accessed"),
        "temporary_gib": memory and memory.temp_size_in_bytes / 2**30,
    }
