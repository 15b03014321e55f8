"""An operation in the form that the platform likes it runs on.

`jax.lax.platform_dependent` traces every form of an operation and lowers one. Where JAX finds no devices but CPUs the
others are for nothing, and tracing a step with them takes half as long again (`experiments/benchmark.py`): there the
CPU's form alone is traced.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

from jax import lax
from jax.extend import backend

_asked: contextvars.ContextVar[bool] = contextvars.ContextVar("every platform is asked for", default=False)


@contextlib.contextmanager
def every() -> Iterator[None]:
    """Within it all forms are traced, as `jax.export` needs it for platforms that this machine does not have.

    What was traced before, `jax.jit` may keep as it was: make the functions that are exported within, too.
    """
    before = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(before)


def by_platform(*operands: Any, default: Callable, **forms: Callable) -> Any:
    """`default(*operands)`, or on a platform that is named (cpu, cuda, rocm, tpu) its form of it."""
    if not _asked.get() and set(backend.backends()) == {"cpu"}:
        return forms.get("cpu", default)(*operands)
    return lax.platform_dependent(*operands, default=default, **forms)
