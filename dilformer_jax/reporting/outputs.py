"""The folder of a registered pair: moved volumes, transforms in the formats of other programs, record and report."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dilformer_jax.data.subjects import Pair
from dilformer_jax.io import itk, transform_files
from dilformer_jax.io.volumes import Volume, write_image, write_labels
from dilformer_jax.registration import batch
from dilformer_jax.registration.checks import checks, verdict
from dilformer_jax.registration.warps import warped
from dilformer_jax.reporting import batch_index, measures, pair_report, provenance, tables
from dilformer_jax.reporting.shown import Shown

if TYPE_CHECKING:
    from dilformer_jax.registration.pipeline import Registration

CONVENTION = """\
field.nii.gz takes a point p of the fixed image, in mm, to p + field(p) of the moving image: ANTs and ITK resample the
moving image onto the fixed grid with it as it is (LPS mm, both headers and the affine included). inverse_field.nii.gz
goes back."""
# Beside ITK's, which are always written: what the files of a transform are called.
FORMATS = {
    "fsl": "{}_fsl.nii.gz",
    "freesurfer": "{}_freesurfer.mgz",
    "voxel": "{}_voxel.nii.gz",
}
# Written now and then: where they were not, those of an earlier run go.
INDEXED = ("dice_before", "dice", "folding_percent", "inverse_mean_mm")
OPTIONAL = (
    "moved_labels.nii.gz",
    "report.html",
    "thumbnail.webp",
    *(name.format(kind) for name in FORMATS.values() for kind in ("field", "inverse_field")),
    *(f"{kind}_voxel.json" for kind in ("field", "inverse_field")),
)


def write(
    folder: Path,
    result: "Registration",
    *,
    formats: Sequence[str] = (),
    labels: tuple[Volume | None, Volume | None] = (None, None),
    report: bool = False,
    record: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes into an empty folder, and returns what run.json says: `record`, and what is known of every result.

    Raises BadInput where a file cannot be written, RuntimeError where a transform does not read back as it was.
    """
    fixed, moving = result.fixed, result.moving
    write_image(folder / "moved.nii.gz", result.moved, fixed)
    if result.moved_labels is not None:
        write_labels(folder / "moved_labels.nii.gz", result.moved_labels, fixed)
    ways = (("field", result.transform, fixed, moving), ("inverse_field", result.inverse_transform, moving, fixed))
    notes: list[str] = []
    for name, transform, here, there in ways:
        for form, pattern in {"itk": "{}.nii.gz", **{form: FORMATS[form] for form in formats}}.items():
            note = transform_files.write_transform(folder / pattern.format(name), transform, form, here, there)
            notes += [note] if note else []
    itk.write_affine(folder / "affine.txt", result.affine)
    found = checks(result.metrics)
    told: dict[str, Any] = {
        **(record or {}),
        "versions": provenance.versions(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(("XLA_", "JAX_"))},
        "affine": np.asarray(result.affine).tolist(),
        "grid": {"shape": list(result.grid.shape), "affine": result.grid.affine.tolist()},
        "convention": CONVENTION.replace("\n", " "),
        "similarity": None if result.refinement is None else result.refinement.similarity,
        "warnings": [*result.warnings, *notes],
        "verdict": verdict(found),
        "metrics": result.metrics,
    }
    if report:
        pair = shown(result, *labels)
        headers = {"fixed": provenance.header(fixed), "moving": provenance.header(moving)}
        facts = pair_report.Facts(
            measures.rows(result.metrics),
            found,
            structures(result.metrics),
            headers,
            told["warnings"],
            told["versions"],
            told.get("command", ""),
            method(told) if "settings" in told else "",
        )
        title = f"{moving.path.name} to {fixed.path.name}"
        pair_report.write(folder / "report.html", title, pair, facts)
        (folder / "thumbnail.webp").write_bytes(pair_report.thumbnail(pair))
    told["outputs"] = sorted([path.name for path in folder.iterdir()] + ["run.json"])
    tables.write_json(folder / "run.json", told)
    return told


def method(told: Mapping[str, Any]) -> str:
    """Returns a sentence that names what registered the pair: the network with its SHA-256, and the refinement with its
    steps and similarity. `told` is the content of run.json."""
    settings, similarity = told["settings"], told["similarity"]
    steps = ""
    if similarity is not None:
        steps = f"refinement by {similarity.upper()}, {settings['refinement']['steps']} steps at the finest level"
    if settings["network"] is None:
        return f"No network: {steps}."
    smooth = f", asked for smoothness {settings['smoothness']:g}" if settings.get("smoothness", 1) != 1 else ""
    refined = f", then {steps}" if steps else ""
    return f"Network: {settings['network']} (SHA-256 {settings['parameters_sha256']}){smooth}{refined}."


def write_index(output: Path, pairs: Sequence[Pair]) -> None:
    """Writes index.html over the pairs' folders in `output`, with what each has so far."""
    entries = []
    for pair in pairs:
        folder, failure = output / pair.name, output / batch.FAILURES / f"{pair.name}.txt"
        found = batch.record(folder)
        if found is None:
            told = failure.read_text(encoding="utf-8").strip().splitlines()[-1] if failure.is_file() else "not yet"
            entries.append(batch_index.Entry(pair.name, failure=told))
            continue
        picture = folder / "thumbnail.webp"
        numbers = {key: found["metrics"].get(key) for key in INDEXED}
        entries.append(
            batch_index.Entry(
                pair.name,
                found["verdict"],
                report=f"{pair.name}/report.html" if (folder / "report.html").is_file() else "",
                thumbnail=picture.read_bytes() if picture.is_file() else None,
                seconds=sum(found["metrics"]["seconds"].values()),
                **numbers,
            )
        )
    batch_index.write(output / "index.html", entries)


def shown(result: "Registration", fixed_labels: Volume | None = None, moving_labels: Volume | None = None) -> Shown:
    """The pair on the grid that it was registered on, as its report shows it."""
    grid, images = result.grid, result.images
    maps = [
        None if labels is None else warped(labels, steps, grid.shape, grid.affine, "nearest")
        for labels, steps in (
            (fixed_labels, ()),
            (moving_labels, ()),
            (moving_labels, result.transform),
        )
    ]
    return Shown(
        images["fixed"], images["moving"], images["aligned"], images["moved"], result.displacement, grid.affine, *maps
    )


def structures(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Dice and HD95 of each structure before and after, as `pair_report.Facts` takes them."""
    rows = []
    for label, dice in metrics.get("dice_per_label", {}).items():
        row = {"structure": str(label), "dice_after": dice}
        for key, name in (
            ("dice_before", "dice_before"),
            ("hd95_before", "hd95_before"),
            ("hd95_after", "hd95"),
        ):
            row[key] = metrics.get(f"{name}_per_label", {}).get(label)
        rows.append(row)
    return rows


def summary(metrics: Mapping[str, Any]) -> str:
    """The measures of a pair as lines to print."""
    rows = [{name: value for name, value in row.items() if name != "definition"} for row in measures.rows(metrics)]
    return tables.plain(rows, [name for name in rows[0]])
