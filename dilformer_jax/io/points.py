"""Points in CSV files: three columns of coordinates, in a space that is stated; all other columns are kept."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from dilformer_jax.io.geometry import apply_affine
from dilformer_jax.io.headers import BadInput
from dilformer_jax.io.volumes import Volume, replacing

SPACES = ("RAS", "LPS", "voxel")
FLIP = np.array([-1.0, -1.0, 1.0])
Coordinates = Float64[np.ndarray, "n 3"]


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of a CSV file as text, those of `columns` being x, y and z in `space`; no header where it has none."""

    path: Path
    header: tuple[str, ...] | None
    rows: tuple[tuple[str, ...], ...]
    columns: tuple[int, int, int]
    space: str


def read_table(path: str | Path, space: str | None = None) -> tuple[Table, Coordinates]:
    """The table, and its coordinates (n, 3) in its own space.

    The header states the space: columns x_ras, y_ras, z_ras or likewise lps or voxel, or i, j, k for voxels. Columns
    x, y, z, or no header (coordinates are then the first three columns), need `space`. Raises BadInput.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [(number, tuple(row)) for number, row in enumerate(csv.reader(file), 1) if any(map(str.strip, row))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path} cannot be read as CSV ({error}); give a table of points.") from error
    if not lines:
        raise BadInput(f"{path} is empty; give a table of points.")
    header: tuple[str, ...] | None = lines[0][1]
    if all(_number(word) is not None for word in lines[0][1][:3]) and len(lines[0][1]) >= 3:
        header, columns, stated = None, (0, 1, 2), None
    else:
        columns, stated = _columns(path, lines.pop(0)[1])
    if stated and space and stated != space:
        raise BadInput(f"{path} says in its header that it is in {stated}, not in {space}; leave out --space.")
    if not (stated or space):
        found = "has no header" if header is None else "does not say in which space its x, y, z are"
        raise BadInput(f"{path} {found}; give --space RAS, LPS or voxel (ANTs and ITK write LPS, nibabel RAS).")
    if not lines:
        raise BadInput(f"{path} has no points; give a table with a row for each.")
    found_points = np.empty((len(lines), 3))
    for point, (number, row) in zip(found_points, lines, strict=True):
        words = [row[column] if column < len(row) else "" for column in columns]
        values = [_number(word) for word in words]
        if None in values:
            raise BadInput(f"{path} has {','.join(words)!r} for a point in row {number}; give three finite numbers.")
        point[:] = values
    table = Table(path, header, tuple(row for _, row in lines), columns, stated or space or "")
    return table, found_points


def write_table(path: str | Path, table: Table, coordinates: Coordinates) -> None:
    """Writes the table with other coordinates in its space, to six decimals; all else is kept. Raises BadInput."""
    with replacing(Path(path)) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if table.header is not None:
            writer.writerow(table.header)
        for row, point in zip(table.rows, coordinates, strict=True):
            words = list(row)
            for column, value in zip(table.columns, point, strict=True):
                words[column] = f"{value:.6f}"
            writer.writerow(words)


def to_ras(coordinates: Coordinates, space: str, image: Volume | None) -> Coordinates:
    """RAS mm of coordinates in a space; `image` is whose voxels they are, if they are."""
    if space == "voxel":
        if image is None:
            raise ValueError("voxels need an image")
        return apply_affine(image.affine, coordinates)
    return coordinates * FLIP if space == "LPS" else coordinates


def from_ras(points: Coordinates, space: str, image: Volume | None) -> Coordinates:
    """The inverse of `to_ras`."""
    if space == "voxel":
        if image is None:
            raise ValueError("voxels need an image")
        return apply_affine(np.linalg.inv(image.affine), points)
    return points * FLIP if space == "LPS" else points


def _columns(path: Path, header: tuple[str, ...]) -> tuple[tuple[int, int, int], str | None]:
    """Where the coordinates stand, and their space where the header states it."""
    names = [name.strip().lower() for name in header]
    known: dict[tuple[str, str, str], str | None] = {("x", "y", "z"): None, ("i", "j", "k"): "voxel"}
    known.update({(f"x_{s}".lower(), f"y_{s}".lower(), f"z_{s}".lower()): s for s in SPACES})
    found = [(triple, space) for triple, space in known.items() if all(names.count(name) == 1 for name in triple)]
    if len(found) != 1:
        raise BadInput(
            f"{path} has columns {', '.join(header)[:80]}, of which {'several' if found else 'none'} are coordinates; "
            "name them x_ras, y_ras, z_ras (or lps, or voxel), or x, y, z and give --space."
        )
    (x, y, z), space = found[0]
    return (names.index(x), names.index(y), names.index(z)), space


def _number(word: str) -> float | None:
    """The finite number that a word is, or None."""
    try:
        value = float(word)
    except ValueError:
        return None
    return value if np.isfinite(value) else None
