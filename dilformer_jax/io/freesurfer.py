"""Transforms in FreeSurfer's files: warps in .mgz and affines in .lta.

A warp is FreeSurfer's volume format with intent 3 in its version number, (X, Y, Z, 3) on the fixed grid ("target",
"atlas"), and two tags behind the voxels: the grids of moving ("source", "image") and fixed image, and what the vectors
are. It is written as displacements in RAS mm ('disp-ras'): p of the fixed image matches p + warp(p) of the moving one.
FreeSurfer 8 reads it (mri_warp_convert --inmgzwarp, mri_vol2vol --gcam), and surfa, FreeSurfer's Python package; older
versions know only .m3z, to which FreeSurfer 8 converts it by `mri_warp_convert --inmgzwarp W.mgz --outm3z W.m3z`.

An LTA takes points of the moving image ("src") to points of the fixed image ("dst"), in voxels or RAS mm.
"""

import gzip
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from dilformer_jax.io.geometry import is_sheared, is_singular, reframed, spacing
from dilformer_jax.io.headers import BadInput
from dilformer_jax.io.text import check_affine, numbers, read_text
from dilformer_jax.io.transforms import (
    Field,
    Grid,
    Transform,
    check_agreement,
    grid_of,
    right_angled,
    total_displacement,
)
from dilformer_jax.io.volumes import Volume, replacing

WARP = 3 << 8 | 1  # the version of an MGH file whose intent is a warp
HEADER = 284  # bytes before the voxels
FLOAT = 3  # MRI_FLOAT
GEOMETRY, META = 10, 13  # TAG_GCAMORPH_GEOM, which has no length, and TAG_GCAMORPH_META
GEOMETRY_BYTES = 588
LENGTHLESS = (1, 2, 10, 11, 12, 20)
FRAMES = ("abs-crs", "disp-crs", "abs-ras", "disp-ras")


def write_warp(path: str | Path, transform: Transform, fixed: Volume | Grid, moving: Volume | Grid) -> str:
    """Writes a transform as a warp of displacements in RAS mm, and reads it back before it takes its name.

    FreeSurfer knows no sheared grid: what is returned is a sentence on that, as from itk.write_field, or empty. Raises
    BadInput where the file cannot be written or is not named .mgz.
    """
    path = Path(path)
    if not path.name.endswith((".mgz", ".mgh.gz")):
        raise BadInput(f"{path} is no name for a FreeSurfer warp; let it end in .mgz.")
    place, note = right_angled(grid_of(fixed))
    source = grid_of(moving)
    notes = [note] if note else []
    if is_sheared(source.affine):
        notes.append("the moving image is sheared, which FreeSurfer cannot hold; resample it first.")
    vectors = total_displacement(transform, place)
    version = struct.pack(">7i", WARP, *place.shape, 3, FLOAT, 1)
    content = [
        (version + struct.pack(">h", 1) + _placed(place)).ljust(HEADER, b"\0"),
        vectors.astype(">f4").tobytes("F"),
        struct.pack(">5f", 0, 0, 0, 0, 0),  # of the scan, and the field of view, which nothing reads
        struct.pack(">i", GEOMETRY) + _geometry(source) + _geometry(place),
        struct.pack(">iqiif", META, 12, FRAMES.index("disp-ras"), 1, 0),
    ]
    with replacing(path) as partial:
        with gzip.open(partial, "wb", compresslevel=6) as file:
            file.writelines(content)
        check_agreement(path, (read_warp(partial),), transform, place)
    return " ".join(f"{path}: {note}" for note in notes)


def read_warp(path: str | Path) -> Field:
    """A warp of any of the four kinds as a field on its own grid, RAS mm. Raises BadInput where the file is none."""
    path = Path(path)
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        version, *shape, frames, kind, _ = struct.unpack_from(">7i", content)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise BadInput(f"{path} cannot be read or is cut short ({error}); copy it again.") from error
    if version != WARP or frames not in (3, 4) or kind != FLOAT:
        raise BadInput(
            f"{path} is no FreeSurfer warp (version {version}, {frames} frames of type {kind}, where a warp has "
            f"{WARP}, 3 or 4, and {FLOAT}); give one."
        )
    try:
        affine = _affine(tuple(shape), struct.unpack_from(">15f", content, 30))
        voxels = np.frombuffer(content, ">f4", int(np.prod([*shape, frames])), HEADER)
        tags = _tags(io.BytesIO(content[HEADER + voxels.nbytes + 20 :]))
        form = FRAMES[struct.unpack(">i", tags[META][:4])[0]]
        geometry = struct.unpack_from(">4i15f", tags[GEOMETRY]) if form.endswith("crs") else None
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise BadInput(f"{path} is cut short, or does not say what its vectors are; convert it again.") from error
    vectors = voxels.reshape((*shape, frames), order="F")[..., :3].astype(np.float32)
    bad = np.count_nonzero(~np.isfinite(vectors))
    if bad or is_singular(affine):
        found = f"has {bad} NaN or infinite values" if bad else f"lies nowhere, by {affine.tolist()}"
        raise BadInput(f"{path} {found}; write it again.")
    ends = np.eye(4) if geometry is None else _affine(geometry[1:4], geometry[4:])
    starts = np.eye(4) if form == "disp-crs" else affine if form == "disp-ras" else np.diag([0, 0, 0, 1])
    return Field(reframed(vectors, starts, ends, affine), affine)


def _tags(file: io.BytesIO) -> dict[int, bytes]:
    """The tags behind the voxels, up to the first that is not followed by a length of its own."""
    found: dict[int, bytes] = {}
    while len(word := file.read(4)) == 4:
        (tag,) = struct.unpack(">i", word)
        if tag == GEOMETRY:
            found[tag] = file.read(2 * GEOMETRY_BYTES)
        elif tag == 0 or tag in LENGTHLESS:
            break
        else:
            found[tag] = file.read(max(struct.unpack(">q", file.read(8))[0], 0))
    return found


def _placed(grid: Grid) -> bytes:
    """Voxel sizes, directions and middle of a grid, where FreeSurfer takes index n / 2 for the middle of n voxels."""
    sizes = np.array(spacing(grid.affine))
    middle = grid.affine[:3, :3] @ np.array(grid.shape) / 2 + grid.affine[:3, 3]
    return struct.pack(">15f", *sizes, *(grid.affine[:3, :3] / sizes).ravel("F"), *middle)


def _geometry(grid: Grid) -> bytes:
    """A grid as the tag has it: that it is valid, its size and place, and a file name, which is left empty."""
    return (struct.pack(">4i", 1, *grid.shape) + _placed(grid)).ljust(GEOMETRY_BYTES, b"\0")


def _affine(shape: tuple[int, ...], words: tuple[float, ...]) -> Float64[np.ndarray, "4 4"]:
    """Voxels to RAS mm, of voxel sizes, directions and middle."""
    sizes, directions, middle = np.array(words[:3]), np.array(words[3:12]).reshape(3, 3).T, np.array(words[12:15])
    affine = np.eye(4)
    affine[:3, :3] = directions * sizes
    affine[:3, 3] = middle - affine[:3, :3] @ np.array(shape) / 2
    return affine


def read_lta(path: str | Path) -> Float64[np.ndarray, "4 4"]:
    """An affine, RAS mm of the fixed image to RAS mm of the moving image, from an LTA of voxels (type 0) or RAS mm (1).

    Raises BadInput where the file holds anything else, or more than one affine.
    """
    path = Path(path)
    lines = [line.split("#")[0].strip() for line in read_text(path).splitlines()]
    lines = [line for line in lines if line]
    values = dict(reversed([_entry(line) for line in lines]))  # of what is there twice, the source's
    try:
        kind, count = values["type"], values["nxforms"]
        first = lines.index("1 4 4") + 1
        matrix = numbers(path, " ".join(lines[first : first + 4])).reshape(4, 4)
        ends = [lines.index(f"{name} volume info") for name in ("src", "dst")]
        grids = [_lta_grid(path, dict(map(_entry, lines[end + 1 : end + 9]))) for end in ends]
    except (KeyError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path} is cut short or no LTA of one affine; write it again.") from error
    if kind not in ("0", "1") or count != "1":
        found = f"holds {count} transforms of type {kind}"
        raise BadInput(f"{path} {found}; give an LTA of one, of type 0 or 1, e.g. by `lta_convert --outlta`.")
    if kind == "0":
        source, target = grids
        if source is None or target is None:
            raise BadInput(f"{path} is in voxels and says not of which images; convert it to RAS by `lta_convert`.")
        matrix = target @ matrix @ np.linalg.inv(source)
    check_affine(path, matrix)
    return np.linalg.inv(matrix)


def _entry(line: str) -> tuple[str, str]:
    key, _, value = line.partition("=")
    return key.strip(), value.strip()


def _lta_grid(path: Path, entries: dict[str, str]) -> Float64[np.ndarray, "4 4"] | None:
    """Voxels to RAS mm of an image in an LTA; None where that says it is not valid."""
    if entries["valid"] != "1":
        return None
    rows = [numbers(path, entries[name]) for name in ("volume", "voxelsize", "xras", "yras", "zras", "cras")]
    if any(len(row) != 3 for row in rows):
        raise ValueError("three numbers each")
    affine = _affine(tuple(int(n) for n in rows[0]), tuple(np.concatenate(rows[1:]).tolist()))
    check_affine(path, affine)
    return affine
