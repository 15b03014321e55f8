"""Pictures compared with the arrays that they show."""

import itertools
import struct
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

from dilformer_jax.ops import folding
from dilformer_jax.reporting import figures


def png_size(data: bytes) -> tuple[int, int]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def brain(shape=(20, 26, 16), centre=(0.5, 0.55, 0.45)):
    """An ellipsoid with a shell and a core, and their labels; nothing about it is symmetric."""
    x = np.stack(np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij"), axis=-1) - np.array(centre)
    radius = np.linalg.norm(x / [0.36, 0.4, 0.34], axis=-1)
    labels = np.select([radius < 0.4, radius < 0.75, radius < 1], [3, 2, 1], 0).astype(np.int32)
    return (np.array([0, 0.5, 0.8, 0.3])[labels] * (1 + 0.3 * x[..., 0])).astype(np.float32), labels


@pytest.fixture(scope="module")
def example():
    fixed, fixed_labels = brain()
    moving, moving_labels = brain(centre=(0.45, 0.5, 0.5))
    noise = np.random.default_rng(0).normal(size=(3, *fixed.shape))
    u = np.stack([ndimage.gaussian_filter(n, 3) * 30 for n in noise], axis=-1).astype(np.float32)
    points = np.moveaxis(np.indices(fixed.shape), 0, -1) + u
    moved = ndimage.map_coordinates(moving, np.moveaxis(points, -1, 0), order=1, mode="nearest")
    moved_labels = ndimage.map_coordinates(moving_labels, np.moveaxis(points, -1, 0), order=0, mode="nearest")
    return fixed, moving, moved, u, fixed_labels, moved_labels


def panel(figure, row: int, column: str):
    return figure.axes[len(figures.COLUMNS) * row + figures.COLUMNS.index(column)]


def shown(ax, k: int = 0) -> np.ndarray:
    """What a panel's image shows, as [to the right, up], whatever way the image is stored."""
    image = ax.images[k]
    left, right, bottom, top = image.get_extent()
    assert image.origin == "lower" and right > left and top > bottom
    return np.ma.filled(image.get_array()).swapaxes(0, 1)


def test_each_panel_shows_the_slice_it_says(example):
    fixed, moving, moved, u, fixed_labels, moved_labels = example
    figure = figures.registration(fixed, moving, moved, u, fixed_labels=fixed_labels, moved_labels=moved_labels)
    assert len(figure.axes) == 3 * 7 + 2
    assert [ax.get_title() for ax in figure.axes[:7]] == list(figures.COLUMNS)
    centre = [round(c) for c in ndimage.center_of_mass(fixed)]
    determinant = folding.jacobian_determinant(u)
    scales = set()
    for row in range(3):
        for column, volume in (
            ("fixed", fixed),
            ("moving", moving),
            ("moved", moved),
            ("difference before", moving - fixed),
            ("difference after", moved - fixed),
            ("Jacobian determinant", determinant),
        ):
            ax = panel(figure, row, column)
            np.testing.assert_array_equal(shown(ax), volume.take(centre[row], row), err_msg=column)
            if "difference" in column:
                scales.add(ax.images[0].get_clim())
        assert f"axis {row}, index {centre[row]}" == panel(figure, row, "fixed").get_ylabel()
        low, high = panel(figure, row, "Jacobian determinant").images[0].get_clim()
        assert low + high == pytest.approx(2)
    ((low, high),) = scales
    assert high == -low > 0
    for column, labels in (("fixed", fixed_labels), ("moved", moved_labels)):
        for row in range(3):
            drawn = panel(figure, row, column).collections
            assert len(drawn) == len(set(np.unique(labels.take(centre[row], row))) - {0}) == 3
    assert not panel(figure, 0, "moving").collections
    # The same structure has the same colour in both.
    colours = [panel(figure, 0, column).collections[0].get_edgecolor() for column in ("fixed", "moved")]
    np.testing.assert_array_equal(*colours)


def test_unsigned_images_are_subtracted_without_wrapping(example):
    fixed, moving, moved, u = example[:4]
    bytes_ = [np.round(200 * volume).astype(np.uint8) for volume in (fixed, moving, moved)]
    figure = figures.registration(*bytes_, u)
    assert shown(panel(figure, 0, "difference after")).min() < 0


def test_folded_voxels_are_marked_and_no_others(example):
    fixed, moving, moved, u = example[:4]
    steep = 12 * u
    determinant = folding.jacobian_determinant(steep)
    assert 0.05 < np.mean(determinant <= 0) < 0.6
    figure = figures.registration(fixed, moving, moved, steep)
    centre = [round(c) for c in ndimage.center_of_mass(fixed)]
    for row in range(3):
        painted = shown(panel(figure, row, "Jacobian determinant"), 1)[..., 3] > 0
        np.testing.assert_array_equal(painted, determinant.take(centre[row], row) <= 0)
    assert f"{folding.folding_percent(steep):.2g} % folded" in figure.axes[-1].get_xlabel()


def test_spacing_gives_true_proportions(example):
    fixed, moving, moved, u = example[:4]
    spacing = (1.0, 0.5, 3.0)
    figure = figures.registration(fixed, moving, moved, u, spacing=spacing)
    size = np.array(fixed.shape) * spacing
    width, height = figure.get_size_inches()
    scale = set()
    for row, (right, up) in enumerate(((1, 2), (0, 2), (0, 1))):
        for ax in figure.axes[7 * row : 7 * row + 5]:
            left, right_end, bottom, top = ax.images[0].get_extent()
            np.testing.assert_allclose((right_end - left, top - bottom), (size[right], size[up]))
            box = ax.get_position()
            scale.add(round(box.width * width / np.ptp(ax.get_xlim()), 6))
            scale.add(round(box.height * height / np.ptp(ax.get_ylim()), 6))
    assert len(scale) == 1, "one scale, in inches per mm, across and up, in every panel"


@pytest.mark.parametrize(("axis", "shift"), [(0, 2.0), (1, -1.5)])
def test_the_grid_goes_where_the_image_goes(axis, shift):
    # moved(x) = moving(x + u): with u = +2 along the axis, the line at 0 of the moving grid is seen at -2.
    shape = (17, 17, 17)
    image = np.random.default_rng(0).random(shape).astype(np.float32)
    u = np.zeros((*shape, 3), np.float32)
    u[..., axis] = shift
    drawn = panel(figures.registration(image, image, image, u), 2, "warped grid").collections
    for k, contours in enumerate(drawn):
        points = np.concatenate([path.vertices for path in contours.get_paths()])
        lines = np.unique(np.round(points[:, k], 6))
        step = np.diff(lines).min()
        offset = (lines + (shift if k == axis else 0)) / step
        np.testing.assert_allclose(offset, np.round(offset), atol=1e-4)
        assert len(lines) > 5


def test_orientation_turns_every_array_the_same_way(example):
    """The figure of a brain stored another way round is the figure of the brain stored in RAS order."""
    fixed, moving, moved, u, fixed_labels, moved_labels = example
    upright = figures.registration(fixed, moving, moved, u, fixed_labels=fixed_labels, orientation="RAS")

    def store(volume):  # RAS array -> axes pointing to P, I, R
        return volume.transpose(1, 2, 0)[::-1, ::-1]

    stored = np.stack([store(u[..., 1]) * -1, store(u[..., 2]) * -1, store(u[..., 0])], axis=-1)
    other = figures.registration(
        *(store(volume) for volume in (fixed, moving, moved)),
        stored,
        fixed_labels=store(fixed_labels),
        orientation="PIR",
    )
    for row in range(3):
        for column in figures.COLUMNS:
            a, b = panel(upright, row, column), panel(other, row, column)
            np.testing.assert_allclose(shown(a), shown(b), atol=1e-5, err_msg=column)
            for line, same in zip(a.collections, b.collections, strict=True):
                ends = [np.concatenate([p.vertices for p in c.get_paths()]) for c in (line, same)]
                np.testing.assert_allclose(ends[0].min(0), ends[1].min(0), atol=1e-3)
                np.testing.assert_allclose(ends[0].max(0), ends[1].max(0), atol=1e-3)
    letters = [[text.get_text() for text in panel(other, row, "fixed").texts] for row in range(3)]
    assert letters == [list("PAIS"), list("LRIS"), list("LRPA")]
    middle = round(ndimage.center_of_mass(fixed)[1])
    assert panel(other, 1, "fixed").get_ylabel() == f"coronal, index {fixed.shape[1] - 1 - middle}"


@pytest.mark.parametrize("orientation", ["RA", "RAL", "XYZ", "RASI"])
def test_an_orientation_that_is_none_is_refused(example, orientation):
    with pytest.raises(ValueError, match=orientation):
        figures.registration(*example[:4], orientation=orientation)


def test_volumes_of_different_shapes_are_refused(example):
    fixed, moving, moved, u = example[:4]
    with pytest.raises(ValueError, match=r"moving is \(19, 26, 16\)"):
        figures.registration(fixed, moving[1:], moved, u)
    with pytest.raises(ValueError, match=r"moved labels is \(20, 26, 15\)"):
        figures.registration(fixed, moving, moved, u, moved_labels=np.zeros((20, 26, 15), np.int32))


def test_a_blank_pair_is_still_drawn():
    blank, u = np.zeros((6, 7, 8), np.float32), np.zeros((6, 7, 8, 3), np.float32)
    figure = figures.registration(blank, blank, blank, u)
    assert png_size(figures.png(figure, dpi=20))[0] > 100


def test_training_draws_what_is_there():
    records = [{"step": k, "loss": -0.1 * k, "similarity": -0.2 * k} for k in range(5)]
    records.append({"step": 3, "loss": None})
    records += [{"step": 2 * k, "dice": d, "dice_identity": 0.5} for k, d in enumerate((0.5, 0.7, 0.6))]
    figure = figures.training(records)
    assert [ax.get_ylabel() for ax in figure.axes] == ["loss", "Dice"]
    curves = {line.get_label(): line for ax in figure.axes for line in ax.get_lines()}
    np.testing.assert_allclose(curves["loss"].get_xydata(), [(k, -0.1 * k) for k in range(5)])
    np.testing.assert_allclose(curves["similarity"].get_ydata(), [-0.2 * k for k in range(5)])
    np.testing.assert_allclose(curves["before registration"].get_ydata(), [0.5] * 3)
    np.testing.assert_allclose(curves["dice, best 0.700 at 2"].get_xydata(), [(0, 0.5), (2, 0.7), (4, 0.6)])
    assert len(figures.training([{"step": 0, "folding_percent": 0.1, "displacement_p95": 1.0}]).axes) == 2
    empty = figures.training([])
    assert empty.axes == [] and empty.texts[0].get_text() == "no records yet"


def test_a_long_curve_is_smoothed_without_moving_it():
    records = [{"step": 10 * k, "loss": 3.0 - 0.01 * k} for k in range(90)]
    raw, smooth = figures.training(records).axes[0].get_lines()
    assert len(raw.get_xdata()) == 90 > len(smooth.get_xdata()) > 80
    np.testing.assert_allclose(smooth.get_ydata(), 3.0 - 0.001 * smooth.get_xdata())


@pytest.mark.parametrize("last", [12, 300, 8000, 36000, 260000])
def test_the_numbers_of_the_steps_do_not_touch(last):
    records = [{"step": step, "loss": 1.0, "regulariser": 1.0, "dice": 0.5} for step in (0, last // 2, last)]
    figure = figures.training(records)
    figure.draw_without_rendering()
    for ax in figure.axes:
        shown = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
        inside = [box for box in shown if ax.bbox.x0 - 1 <= (box.x0 + box.x1) / 2 <= ax.bbox.x1 + 1]
        assert len(inside) >= 3
        assert all(right.x0 - left.x1 > 4 for left, right in itertools.pairwise(inside))


def test_pictures_are_saved_in_one_piece_and_leave_no_state(tmp_path):
    figure = figures.training([{"step": 0, "dice": 0.5}])
    figures.save(tmp_path / "curves.png", figure, dpi=40)
    width, height = figure.get_size_inches()
    assert png_size((tmp_path / "curves.png").read_bytes()) == (int(40 * width), int(40 * height))
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    code = (
        "import sys; from dilformer_jax.reporting import figures, html, tables; "
        "assert not {'matplotlib', 'jax'} & set(sys.modules); "
        "figures.png(figures.training([{'step': 0, 'loss': 1.0}])); "
        "assert 'matplotlib.pyplot' not in sys.modules and 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
