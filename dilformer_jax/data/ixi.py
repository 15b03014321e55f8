"""IXI, as TransMorph distributes it and as twelve brains at 2 mm."""

from pathlib import Path

from dilformer_jax.data import structures
from dilformer_jax.data.prepared import recognised
from dilformer_jax.data.subjects import Dataset, Pair, Subject, described, named, numbered, ordered_pairs
from dilformer_jax.data.volumes import label_ids
from dilformer_jax.io.volumes import BadInput

# TransMorph's "VOI-30", as the FreeSurfer ids that its pickles hold.
IXI_LABELS = (
    2, 3, 4, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 24, 28, 31, 41, 42, 43, 46, 47, 49, 50, 51, 52, 53, 54, 60, 63,
)  # fmt: skip


def ixi(directory: Path | str) -> Dataset:
    """IXI as TransMorph distributes it: atlas.pkl and Train/, Val/, Test/ with subject_<id>.pkl, each (image, labels),
    in the folder or in IXI_data/ below it; or what `prepare` made of it.

    The atlas is the moving image of every pair. The pickles hold FreeSurfer ids; the 30 structures that TransMorph
    scores are named by those ids here, so that nothing is renumbered. Raises BadInput without an atlas or any subject.
    """
    directory = Path(directory)
    if (dataset := recognised(directory, "ixi")) is not None:
        return dataset
    if not (directory / "atlas.pkl").is_file() and (directory / "IXI_data" / "atlas.pkl").is_file():
        directory = directory / "IXI_data"
    wanted = "give the folder IXI_data of TransMorph's IXI archive (atlas.pkl, Train/, Val/, Test/)."
    if not (directory / "atlas.pkl").is_file():
        raise BadInput(f"{directory} {described(directory)}, but no atlas.pkl; {wanted}")
    atlas = Subject("atlas", directory / "atlas.pkl", directory / "atlas.pkl")

    def pairs(folder: str) -> tuple[Pair, ...]:
        paths = sorted((directory / folder).glob("subject_*.pkl"), key=numbered)
        return tuple(Pair(Subject(path.stem, path, path), atlas) for path in paths)

    train, validation, test = pairs("Train"), pairs("Val"), pairs("Test")
    if not train + validation + test:
        raise BadInput(f"{directory} has an atlas.pkl, but no subject_<id>.pkl in Train/, Val/ or Test/; {wanted}")
    licence = "IXI, brain-development.org, preprocessed by the authors of TransMorph: CC BY-SA 3.0."
    names = structures.of(structures.FREESURFER, IXI_LABELS)
    return Dataset(train, validation, test, IXI_LABELS, licence, names=names)


def ixi_2mm(directory: Path | str) -> Dataset:
    """Twelve IXI brains at 2 mm, NAME_t1.nii.gz and NAME_seg.nii.gz: by name, the first eight train, four choose."""
    directory = Path(directory)
    if (dataset := recognised(directory, "ixi_2mm")) is not None:
        return dataset
    subjects = named(directory, sorted(path.name.removesuffix("_t1.nii.gz") for path in directory.glob("*_t1.nii.gz")))
    if not subjects:
        raise BadInput(
            f"{directory} {described(directory)}, but no NAME_t1.nii.gz; give the folder of 2 mm IXI brains."
        )
    licence = "IXI, brain-development.org: CC BY-SA 3.0."
    return Dataset(ordered_pairs(subjects[:8]), ordered_pairs(subjects[8:]), (), label_ids(subjects), licence)
