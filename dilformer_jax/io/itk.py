"""Transforms in ITK's files, as ANTs, SimpleITK and 3D Slicer read them: displacement fields and affines.

A field is a NIfTI file (X, Y, Z, 1, 3) of vectors in LPS mm on the fixed grid: a point p of the fixed image, in mm,
matches p + field(p) of the moving image, so that affines are included. An affine is a text file (or a MATLAB file, as
ANTs writes) of x -> M (x - c) + c + t, likewise from fixed to moving points in LPS mm.
"""

from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Float64, Real
from scipy.io import loadmat  # type: ignore[import-untyped]
from scipy.spatial.transform import Rotation  # type: ignore[import-untyped]

from dilformer_jax.io.geometry import apply_affine
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
from dilformer_jax.io.volumes import (
    BadInput,
    Volume,
    open_nifti,
    read_voxels,
    replacing,
    replacing_nifti,
)

RAS_TO_LPS = np.array([-1, -1, 1], np.float32)
VECTOR = 1007  # NIFTI_INTENT_VECTOR: ITK reads the last axis as the components of one voxel
DISPLACEMENT = 1006  # NIFTI_INTENT_DISPVECT: in RAS mm, as ITK and FreeSurfer read it
HEADLINE = "#Insight Transform File V1.0"
# How many parameters each kind of transform has.
KINDS = {
    "AffineTransform": 12,
    "MatrixOffsetTransformBase": 12,
    "Euler3DTransform": 6,
    "VersorRigid3DTransform": 6,
    "Similarity3DTransform": 7,
    "TranslationTransform": 3,
    "IdentityTransform": 0,
}


def write_field(path: str | Path, transform: Transform, grid: Volume | Grid) -> str:
    """Writes a transform as an ITK displacement field on a grid, and reads it back before it takes its name.

    ITK knows no sheared grid: instead of one the field gets the nearest grid of right angles that covers it, and the
    sentence that is returned says so; otherwise it is empty. Raises BadInput where the file cannot be written.
    """
    path = Path(path)
    place, note = right_angled(grid_of(grid))
    header = nib.nifti1.Nifti1Header()
    header.set_qform(place.affine, code=1)
    header.set_sform(place.affine, code=1)
    header.set_xyzt_units("mm")
    header.set_intent("vector")
    vectors = total_displacement(transform, place) * RAS_TO_LPS
    with replacing_nifti(path) as partial:
        nib.nifti1.Nifti1Image(vectors[:, :, :, None], None, header).to_filename(partial)
        check_agreement(path, (read_field(partial),), transform, place)
    return note and f"{path}: {note}"


def read_field(path: str | Path) -> Field:
    """An ITK or ANTs displacement field, on its own grid. Raises BadInput where the file is none or not finite."""
    path = Path(path)
    image = open_nifti(path)
    code = int(image.header["intent_code"])
    if len(image.shape) != 5 or image.shape[3:] != (1, 3) or code not in (VECTOR, DISPLACEMENT):
        found = f"has shape {image.shape} and intent code {code}"
        raise BadInput(f"{path} {found} and is no ITK displacement field (X, Y, Z, 1, 3) of intent {VECTOR}; give one.")
    if image.header.get_intent()[2] == "Mapping":
        raise BadInput(f"{path} is a deformation by SPM, of positions; convert it to ITK's displacements first.")
    vectors = np.asarray(read_voxels(image, path)[:, :, :, 0], np.float32)
    bad = np.count_nonzero(~np.isfinite(vectors))
    if bad:
        raise BadInput(f"{path} has {bad} NaN or infinite values; write it again.")
    return Field(vectors * RAS_TO_LPS if code == VECTOR else vectors, image.affine)


def write_affine(path: str | Path, matrix: Real[np.ndarray, "4 4"]) -> None:
    """Writes an affine, RAS mm of the fixed image to RAS mm of the moving image, as ITK's text file.

    Read back before it takes its name. Raises BadInput where it cannot be inverted or written.
    """
    path = Path(path)
    check_affine(path, matrix)
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    lps = flip @ matrix @ flip
    words = [f"{x:.17g}" for x in (*lps[:3, :3].ravel(), *lps[:3, 3])]
    with replacing(path) as partial:
        partial.write_text(
            f"{HEADLINE}\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
            f"Parameters: {' '.join(words)}\nFixedParameters: 0 0 0\n"
        )
        points = np.random.default_rng(0).normal(size=(1000, 3)) * (np.abs(matrix[:3, 3]).max() or 1.0)
        expected = apply_affine(matrix, points)
        if not np.allclose(apply_affine(read_affine(partial), points), expected, 0, 1e-9 * np.abs(expected).max()):
            raise RuntimeError(f"{path} does not read back as what was written")


def read_affine(path: str | Path) -> Float64[np.ndarray, "4 4"]:
    """An affine, RAS mm of the fixed image to RAS mm of the moving image, from ITK's text or ANTs' MATLAB file.

    Affine, Euler, versor, similarity and translation transforms. Raises BadInput where the file holds anything else.
    """
    path = Path(path)
    kind, parameters, fixed = _matlab(path) if is_matlab(path) else _text(path)
    name = kind.split("_")[0]
    if KINDS.get(name) != len(parameters) or len(fixed) not in ((0, 3, 4) if name == "Euler3DTransform" else (0, 3)):
        found = f"holds a {kind} of {len(parameters)} and {len(fixed)} parameters"
        raise BadInput(f"{path} {found}; give an affine, rigid or similarity transform in 3-D.")
    linear, shift = _decoded(name, parameters, bool(fixed[3:].any()))
    centre = fixed[:3] if len(fixed) else np.zeros(3)
    lps = np.eye(4)
    lps[:3, :3] = linear
    lps[:3, 3] = shift + centre - linear @ centre
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    matrix = flip @ lps @ flip
    check_affine(path, matrix)
    return matrix


def is_matlab(path: Path) -> bool:
    """Whether a file begins as a MATLAB 4 file of real numbers does, in which ANTs stores affines."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(4)
    return start in (b"\0\0\0\0", b"\x0a\0\0\0")  # doubles and floats


def _matlab(path: Path) -> tuple[str, np.ndarray, np.ndarray]:
    try:
        content = {name: np.asarray(value, np.float64).ravel() for name, value in loadmat(path).items()}
        fixed = content.pop("fixed")
        ((kind, parameters),) = content.items()
    except Exception as error:  # of any class: loadmat does not say what damage makes it raise
        raise BadInput(f"{path} is no affine in MATLAB's form as ANTs writes it; give one, or a text file.") from error
    if not np.isfinite([*parameters, *fixed]).all():
        raise BadInput(f"{path} has NaN or infinite numbers; write it again.")
    return kind, parameters, fixed


def _text(path: Path) -> tuple[str, np.ndarray, np.ndarray]:
    text = read_text(path)
    if not text.startswith("#Insight Transform File"):
        raise BadInput(f"{path} does not begin with '{HEADLINE}' and is no ITK transform; give one.")
    lines = [line.split(":", 1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if [line[0] for line in lines] != ["Transform", "Parameters", "FixedParameters"]:
        count = sum(line[0] == "Transform" for line in lines)
        found = f"holds {count} transforms" if count > 1 else "is cut short or damaged"
        raise BadInput(f"{path} {found}; give a file of one affine transform, several as several files.")
    kind, parameters, fixed = (line[-1].strip() for line in lines)
    return kind, numbers(path, parameters), numbers(path, fixed)


def _decoded(name: str, p: np.ndarray, zyx: bool) -> tuple[np.ndarray, np.ndarray]:
    """Linear part and translation, after ITK's class documentation."""
    if name in ("AffineTransform", "MatrixOffsetTransformBase"):
        return p[:9].reshape(3, 3), p[9:]
    if name == "Euler3DTransform":
        x, y, z = p[:3]
        turn = Rotation.from_euler("ZYX", [z, y, x]) if zyx else Rotation.from_euler("ZXY", [z, x, y])
        return turn.as_matrix(), p[3:]
    if name in ("VersorRigid3DTransform", "Similarity3DTransform"):
        scale = p[6] if len(p) > 6 else 1.0
        turn = Rotation.from_quat([*p[:3], np.sqrt(max(1 - p[:3] @ p[:3], 0))])
        return scale * turn.as_matrix(), p[3:6]
    return np.eye(3), p if len(p) else np.zeros(3)
