"""Text files that hold matrices, and the numbers in them."""

from pathlib import Path

import numpy as np
from jaxtyping import Float64, Real

from dilformer_jax.io.geometry import is_singular
from dilformer_jax.io.volumes import BadInput

LARGEST = 1 << 20  # bytes: what is larger holds more than matrices


def read_text(path: Path) -> str:
    """The text of a small file. Raises BadInput where it cannot be read, is binary or too large for a matrix."""
    try:
        if path.stat().st_size > LARGEST:
            raise BadInput(f"{path} has {path.stat().st_size} bytes, too many for an affine; give a transform file.")
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is no text file; give an affine in the text form of its program.") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); check its name and permissions.") from error


def numbers(path: Path, text: str) -> Float64[np.ndarray, " n"]:
    """The numbers of a line or several. Raises BadInput where there is anything else, or one that is not finite."""
    try:
        found = np.array(text.split(), np.float64)
    except ValueError as error:
        raise BadInput(
            f"{path} has '{' '.join(text.split())[:60]}' where numbers should be; write it again."
        ) from error
    if not np.isfinite(found).all():
        raise BadInput(f"{path} has NaN or infinite numbers; write it again.")
    return found


def check_affine(path: Path, matrix: Real[np.ndarray, "4 4"]) -> None:
    """Raises BadInput where a matrix from a file has no inverse or is no affine map."""
    if is_singular(matrix) or not np.allclose(matrix[3], [0, 0, 0, 1], atol=1e-6):
        raise BadInput(f"{path} holds {matrix.tolist()}, no affine map that can be inverted; give another.")
