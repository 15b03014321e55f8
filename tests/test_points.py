"""Points in CSV files, and where apply takes them: by the image they are points of, against SimpleITK."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from orientations import volume, wavy

from dilformer_jax import apply
from dilformer_jax.io import itk, points
from dilformer_jax.io.geometry import apply_affine
from dilformer_jax.io.transforms import Grid
from dilformer_jax.io.volumes import BadInput

RAS = np.array([[3.0, -2, 5], [4.5, 0, 7.25], [-1, -5, 4]])


@pytest.fixture
def folder(tmp_path) -> Path:
    volume(tmp_path / "fixed.nii", "LAS anisotropic")
    volume(tmp_path / "moving.nii", "oblique anisotropic LIA", "moving")
    field, matrix = wavy(1)
    itk.write_field(tmp_path / "warp.nii.gz", (field,), Grid(field.displacement.shape[:3], field.affine))
    itk.write_affine(tmp_path / "affine.txt", matrix)
    return tmp_path


def run(folder: Path, table: str, *words: str) -> tuple[list[str], list[list[str]]]:
    (folder / "points.csv").write_text(table)
    chain = [str(folder / name) for name in ("warp.nii.gz", "affine.txt")]
    images = [str(folder / word) if word.endswith(".nii") else word for word in words]
    output = ["--points", str(folder / "points.csv"), "--output", str(folder / "out.csv")]
    apply.main(["apply", "--transform", *chain, *output, *images])
    first, *rows = csv.reader((folder / "out.csv").read_text().splitlines())
    return first, rows


def expected(folder: Path, lps: np.ndarray) -> np.ndarray:
    """Points of the fixed image in the moving image, LPS, by SimpleITK."""
    warp = sitk.DisplacementFieldTransform(sitk.ReadImage(str(folder / "warp.nii.gz"), sitk.sitkVectorFloat64))
    affine = sitk.ReadTransform(str(folder / "affine.txt"))
    return np.array([affine.TransformPoint(warp.TransformPoint(point)) for point in lps.tolist()])


def test_points_of_the_fixed_image_go_by_the_transform_and_back_by_its_inverse(folder):
    flip = np.array([-1, -1, 1])
    table = "name,x_lps,y_lps,z_lps,note\n" + "".join(
        f'p{i},{x},{y},{z},"a, b"\n' for i, (x, y, z) in enumerate(RAS * flip)
    )
    header, rows = run(folder, table, "--from", "fixed")
    assert header == ["name", "x_lps", "y_lps", "z_lps", "note"]
    assert [(row[0], row[4]) for row in rows] == [(f"p{i}", "a, b") for i in range(3)]
    there = np.array([row[1:4] for row in rows], float)
    np.testing.assert_allclose(there, expected(folder, RAS * flip), atol=1e-4)
    assert np.linalg.norm(there - RAS * flip, axis=1).min() > 0.5
    # They are points of the moving image now.
    _, rows = run(folder, (folder / "out.csv").read_text(), "--from", "moving")
    np.testing.assert_allclose(np.array([row[1:4] for row in rows], float), RAS * flip, atol=5e-3)


def test_the_space_is_stated_by_the_header_or_the_option(folder):
    flip = np.array([-1, -1, 1])
    wanted = expected(folder, RAS * flip) * flip
    body = "".join(f"{x},{y},{z}\n" for x, y, z in RAS)
    header, *_ = found = run(folder, "x_ras,y_ras,z_ras\n" + body, "--from", "fixed")
    np.testing.assert_allclose(np.array(found[1], float), wanted, atol=1e-4)
    header, rows = run(folder, "X, Y, Z\n" + body, "--from", "fixed", "--space", "RAS")
    assert header == ["X", " Y", " Z"]
    np.testing.assert_allclose(np.array(rows, float), wanted, atol=1e-4)
    first, rows = run(folder, body, "--from", "fixed", "--space", "RAS")  # no header
    np.testing.assert_allclose(np.array([first, *rows], float), wanted, atol=1e-4)
    # Voxels of the one image become voxels of the other.
    affines = [volume(folder / f"{role}.nii", name, role).affine for role, name in
               (("fixed", "LAS anisotropic"), ("moving", "oblique anisotropic LIA"))]  # fmt: skip
    voxels = apply_affine(np.linalg.inv(affines[0]), RAS)
    body = "i,j,k\n" + "".join(f"{x},{y},{z}\n" for x, y, z in voxels)
    images = ("--fixed", "fixed.nii", "--moving", "moving.nii")
    _, rows = run(folder, body, "--from", "fixed", *images)
    np.testing.assert_allclose(apply_affine(affines[1], np.array(rows, float)), wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("table", "words", "found"),
    [
        ("x_ras,y_ras,z_ras\n1,2,3\n", "", "say which with --from fixed or --from moving"),
        ("1,2,3\n", "--from fixed", "has no header; give --space RAS, LPS or voxel"),
        ("x,y,z\n1,2,3\n", "--from fixed", "does not say in which space its x, y, z are; give --space"),
        ("x_ras,y_ras,z_ras\n1,2,3\n", "--from fixed --space LPS", "header that it is in RAS, not in LPS"),
        ("a,b,c\n1,2,3\n", "--from fixed --space RAS", "has columns a, b, c, of which none are coordinates"),
        ("x,y,z,i,j,k\n1,2,3,1,1,1\n", "--from fixed --space RAS", "of which several are coordinates"),
        ("x;y;z\n1;2;3\n", "--from fixed --space RAS", "has columns x;y;z"),
        (
            "x_ras,y_ras,z_ras\n1,2,3\n1,nan,3\n",
            "--from fixed",
            "has '1,nan,3' for a point in row 3; give three finite",
        ),
        ("x_ras,y_ras,z_ras\n1,2\n", "--from fixed", "has '1,2,' for a point in row 2"),
        ("x_ras,y_ras,z_ras\n", "--from fixed", "has no points"),
        ("", "--from fixed", "is empty"),
        ("i,j,k\n1,2,3\n", "--from fixed --fixed fixed.nii", "to become those of the other; give --moving"),
        ("x_ras,y_ras,z_ras\n1,2,3\n", "--from fixed --inverse", "points go by --from, so leave it out"),
    ],
)
def test_bad_tables_end_in_one_sentence_and_leave_nothing(folder, capsys, table, words, found):
    before = {*folder.iterdir(), folder / "points.csv"}
    with pytest.raises(SystemExit) as end:
        run(folder, table, *words.split())
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.count("\n") == 1 and found in told, told
    assert re.search(r"[.]\n$", told) and set(folder.iterdir()) == before


def test_tables_that_cannot_be_read(tmp_path):
    (tmp_path / "p.csv").write_bytes(b"x_ras,y_ras,z_ras\n\xff,1,2\n")
    with pytest.raises(BadInput, match=r"p.csv cannot be read as CSV .*; .*\.$"):
        points.read_table(tmp_path / "p.csv")
    with pytest.raises(BadInput, match=r"none.csv cannot be read"):
        points.read_table(tmp_path / "none.csv")
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbfx_ras,y_ras,z_ras\r\n1,2,3\r\n\r\n")
    table, found = points.read_table(tmp_path / "bom.csv")
    assert table.space == "RAS"
    np.testing.assert_array_equal(found, [[1, 2, 3]])
