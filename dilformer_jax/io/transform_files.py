"""Transform files of every kind that is known here, told apart by what they hold."""

from pathlib import Path

from dilformer_jax.io import itk
from dilformer_jax.io.transforms import Transform
from dilformer_jax.io.volumes import BadInput, Volume


def read_transform(path: Path, fixed: Volume | None = None, moving: Volume | None = None) -> Transform:
    """The transform, fixed RAS mm to moving RAS mm, of a file. Raises BadInput where it is none."""
    if not path.is_file():
        raise BadInput(f"{path} does not exist; give a transform file.")
    if path.name.endswith((".nii", ".nii.gz")):
        return (itk.read_field(path),)
    return (itk.read_affine(path),)


def write_transform(path: Path, transform: Transform, form: str, fixed: Volume, moving: Volume) -> str:
    """Writes a transform in a form; returns what is to be said of it, if anything."""
    if form == "itk":
        return itk.write_field(path, transform, fixed)
    raise ValueError(form)
