"""Surface elements of a mask on the grid of voxel corners: where they are, and how large.

Around a voxel corner lie eight voxels, a cube of centres of which some are inside the mask. Marching cubes (Lorensen
and Cline, SIGGRAPH 1987) cuts that cube by polygons through the middles of the edges between inside and outside, and
the area of the polygons is the corner's share of the surface.
"""

import functools
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, UInt8

Corner = tuple[int, ...]
CORNERS: tuple[Corner, ...] = tuple(itertools.product((0, 1), repeat=3))


def codes(mask: Bool[np.ndarray, "D H W"]) -> UInt8[np.ndarray, "D+1 H+1 W+1"]:
    """Which of the eight voxels around each corner are inside, as bits: voxel (i, j, k) of the 2x2x2 cube, lower voxels
    first, is worth 2^(7 - 4i - 2j - k). Corner (d, h, w) is the lower one of voxel (d, h, w). Outside the array is
    outside the mask."""
    bits = np.pad(mask, 1).view(np.uint8)
    fours = bits[:-1] << np.uint8(4) | bits[1:]
    twos = fours[:, :-1] << np.uint8(2) | fours[:, 1:]
    return twos[:, :, :-1] << np.uint8(1) | twos[:, :, 1:]


def areas(spacing: Sequence[float | int]) -> Float64[np.ndarray, "256"]:
    """Area, in mm², of the polygons of each code of `codes`; `spacing` is mm per voxel along each array axis."""
    x, y, z = (float(s) for s in spacing)
    lengths = np.linalg.norm(_vectors() * np.array([y * z, x * z, x * y]), axis=2)
    return lengths.sum(axis=1)


@functools.cache
def _vectors() -> Float64[np.ndarray, "256 4 3"]:
    """The area vectors of each code's triangles at unit spacing, at most four of them, the others zero."""
    found = np.zeros((256, 4, 3))
    for code in range(1, 255):
        inside = {corner for bit, corner in enumerate(CORNERS) if code >> (7 - bit) & 1}
        # Where a face has inside and outside corners crosswise, the fewer corners are cut off one by one.
        cut = inside if len(inside) <= 4 else set(CORNERS) - inside
        vectors = np.concatenate([_triangles(_polygon(group)) for group in _groups(cut)])
        found[code, : len(vectors)] = vectors
    return found


def _groups(corners: set[Corner]) -> list[set[Corner]]:
    """The corners that edges of the cube join."""
    groups: list[set[Corner]] = []
    for corner in corners:
        joined = [group for group in groups if any(_distance(corner, other) == 1 for other in group)]
        groups = [group for group in groups if group not in joined] + [{corner}.union(*joined)]
    return groups


def _polygon(group: set[Corner]) -> Float64[np.ndarray, "vertices 3"]:
    """The middles of the edges that leave a group of corners, each next to the one that it shares a face with."""
    edges = [(a, b) for a in group for b in CORNERS if b not in group and _distance(a, b) == 1]
    middles = np.array([np.add(a, b) / 2 for a, b in edges])
    order = [0]
    while len(order) < len(middles):
        here = middles[order[-1]]
        faces = (middles == here) & ((here == 0) | (here == 1))
        order.append(next(i for i, shared in enumerate(faces.any(axis=1)) if shared and i not in order))
    return middles[order]


def _triangles(polygon: Float64[np.ndarray, "vertices 3"]) -> Float64[np.ndarray, "vertices-2 3"]:
    """The area vectors of a polygon's triangles. One that is not flat is divided so that its area is the largest."""
    first, second, third = np.moveaxis(polygon[np.array(_divisions(0, len(polygon) - 1))], -2, 0)
    choices = np.cross(second - first, third - first) / 2
    return choices[np.argmax(np.linalg.norm(choices, axis=2).sum(axis=1).round(6))]


def _divisions(first: int, last: int) -> list[list[tuple[int, int, int]]]:
    """All ways to divide the polygon of the vertices from first to last into triangles."""
    if last - first < 2:
        return [[]]
    return [
        [*left, *right, (first, apex, last)]
        for apex in range(first + 1, last)
        for left in _divisions(first, apex)
        for right in _divisions(apex, last)
    ]


def _distance(a: Corner, b: Corner) -> int:
    return sum(i != j for i, j in zip(a, b, strict=True))
