"""Read the pickled volumes in which the field passes its data sets around, without running what a pickle may carry.

A pickle is a program, and NumPy's own classes would take from it whatever state it gives them. So nothing in it is
believed: it builds descriptions of arrays from classes of this module alone, and arrays are made of those afterwards.
"""

import math
import pickle
import pickletools
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from dilformer_jax.io.headers import BadInput

MOST_STEPS = 10_000  # of the program that a pickle is: four arrays take about a hundred


def read_arrays(path: Path) -> tuple[np.ndarray, ...]:
    """The arrays of a pickle that holds a tuple or list of them, with the types that they have there.

    Raises BadInput, with the name of what it asks for where that is anything but an array of numbers.
    """
    try:
        content = Path(path).read_bytes()
        _check_steps(content)
        found = ArrayUnpickler(content).load()
        if not isinstance(found, tuple | list):
            what = "one array" if isinstance(found, Described) else f"a {type(found).__name__}"
            raise pickle.UnpicklingError(f"it holds {what}")
        if odd := [item for item in found if not isinstance(item, Described)]:
            raise pickle.UnpicklingError(f"it holds a {type(odd[0]).__name__}")
        return tuple(item.array() for item in found)
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist; check the path.") from None
    except Exception as fault:  # an unpickler fed with junk raises nearly anything
        raise BadInput(
            f"{path} is no whole pickle of plain NumPy arrays ({str(fault) or type(fault).__name__}); "
            "give an (image, labels) pickle."
        ) from fault


class Described:
    """An array as a pickle describes it: `numpy.ndarray` without its voxels, until it is given its state."""

    __slots__ = ("_state",)

    def __init__(self, *state: Any) -> None:
        # Bytes, type, shape, order, and which of the array's axes that shape has where, if not all in order.
        self._state = state

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        self._state = (data, kind, shape, "F" if fortran else "C")

    def array(self) -> np.ndarray:
        data, kind, shape, order, axes = (*self._state, None, None, None, None, None)[:5]
        if not isinstance(kind, Kind):
            raise pickle.UnpicklingError("an array in it has no type")
        if not isinstance(data, bytes | bytearray | memoryview):
            raise pickle.UnpicklingError("an array in it does not consist of numbers")
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise pickle.UnpicklingError("an array in it has no shape")
        if math.prod(shape) * kind.dtype().itemsize != len(data):
            raise pickle.UnpicklingError(f"an array in it of shape {shape} has {len(data)} bytes")
        array = np.frombuffer(data, kind.dtype()).reshape(shape, order="F" if order == "F" else "C")
        return array if axes is None else array.transpose(axes)


class Kind:
    """A type of numbers as a pickle describes it: `numpy.dtype`."""

    __slots__ = ("_code", "_order")

    def __init__(self, code: str, align: object = False, copy: object = False) -> None:
        # Of objects too, which are refused in the end: until then they may ask for what is worth to be named.
        if not isinstance(code, str) or not re.fullmatch(r"[biuf]\d{1,2}|O8?", code):
            raise pickle.UnpicklingError(f"it asks for an array of type {code!r}")
        self._code, self._order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError(f"it asks for an array of {self._code} with fields")
        self._order = state[1]

    def dtype(self) -> np.dtype:
        if self._code.startswith("O"):
            raise pickle.UnpicklingError("it asks for an array of objects")
        return np.dtype(self._order + self._code)


class Admitted:
    """What a pickle may call: it can neither be looked into nor be changed."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it changes what it was given")


def _latin(text: str, encoding: str) -> bytes:
    """Bytes as protocols 0 to 2 write them."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin-1")


_UNMADE = Admitted(lambda *_: Described())
_RECONSTRUCT = Admitted(lambda cls, shape, code: Described())
_FROM_BUFFER = Admitted(Described)
# All that a pickled array needs. NumPy 1 wrote `numpy.core`, NumPy 2 `numpy._core`; protocols 0-2 need `_codecs`.
ADMITTED = {
    ("numpy", "ndarray"): _UNMADE,
    ("numpy", "dtype"): Admitted(Kind),
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("numpy._core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("_codecs", "encode"): Admitted(_latin),
}


class ArrayUnpickler(pickle.Unpickler):
    """Admits arrays of numbers and the plain containers, and nothing that could run code or be changed."""

    def __init__(self, content: bytes) -> None:
        super().__init__(BytesIO(content))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return ADMITTED[module, name]


def _check_steps(content: bytes) -> None:
    """Raises for what would be truncated, or take memory out of proportion to the file."""
    for step, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if step >= MOST_STEPS:
            raise pickle.UnpicklingError(f"it has more than {MOST_STEPS} steps")
        # The unpickler's table of what it remembers is as long as the largest index into it.
        if "PUT" in opcode.name and int(argument or 0) > MOST_STEPS:
            raise pickle.UnpicklingError(f"it remembers {argument} things")
