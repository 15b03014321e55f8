"""Images of one or several frames (4-D), and where an image lies without its voxels."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Num

from dilformer_jax.io.headers import ASKING, BadInput, Reading, by, load, read_voxels, settled
from dilformer_jax.io.volumes import Volume, finite, nifti, read_volume, replacing_nifti, write_image

TIME = 0b111000  # of xyzt_units: the unit of the fourth dimension


@dataclass(frozen=True, eq=False)
class Series:
    """The frames of an image, and where they lie: `place` has the header of the file, and no voxels of its own."""

    frames: Num[np.ndarray, "d h w t"]
    place: Volume


def read_place(path: str | Path, reading: Reading = ASKING) -> Volume:
    """Where an image of three or more dimensions lies, from its header: a volume of zeros. Raises BadInput."""
    path = Path(path)
    image, notes = settled(load(path), path, reading)
    if len(image.shape) < 3 or 0 in image.shape:
        raise BadInput(f"{path} is {len(image.shape)}-D ({by(image.shape)}); give an image of three dimensions.")
    return Volume(np.broadcast_to(np.uint8(0), image.shape[:3]), image.affine, path, image.header, notes)


def read_series(path: str | Path, reading: Reading = ASKING) -> Series:
    """All frames of an image, or the one that `reading` names. Raises BadInput, also for NaN or infinite voxels."""
    path = Path(path)
    image, notes = settled(load(path), path, reading)
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 4 or 0 in shape or reading.frame is not None:
        volume = finite(read_volume(path, reading), reading)
        return Series(volume.array[..., None], replace(volume, array=np.broadcast_to(np.uint8(0), volume.array.shape)))
    # Frame behind frame along the third axis, to be checked as one volume; in the file's order, so that none is copied.
    stacked = read_voxels(image, path).reshape((*shape[:2], -1), order="F")
    volume = finite(Volume(stacked, image.affine, path, image.header, notes), reading)
    place = replace(volume, array=np.broadcast_to(np.uint8(0), shape[:3]))
    return Series(volume.array.reshape(shape, order="F"), place)


def write_series(path: str | Path, frames: Float32[np.ndarray, "d h w t"], like: Volume, source: Volume) -> None:
    """Writes frames that lie where `like` does; several keep what the header of `source` says of the fourth dimension.

    Raises BadInput where the file cannot be written.
    """
    if frames.shape[3] == 1:
        write_image(path, frames[..., 0], like)
        return
    base = nifti(np.broadcast_to(np.float32(0), frames.shape[:3]), like)
    header = base.header.copy()
    header.set_data_shape(frames.shape)
    header["pixdim"][4], header["toffset"] = source.header["pixdim"][4], source.header["toffset"]
    header["xyzt_units"] = (int(header["xyzt_units"]) & ~TIME) | (int(source.header["xyzt_units"]) & TIME)
    with replacing_nifti(Path(path)) as partial:
        type(base)(frames, header.get_best_affine(), header).to_filename(partial)
