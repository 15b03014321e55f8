"""The report of a pair: what it says and shows, also as a browser runs it."""

import io
import re
import shutil
import subprocess
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from matplotlib.image import imread
from scipy import ndimage

from dilformer_jax.io.volumes import Volume, read_image, write_image
from dilformer_jax.registration.checks import checks
from dilformer_jax.reporting import batch_index, measures, pair_figures, pair_report, provenance, shown, viewer
from dilformer_jax.reporting.shown import Shown

AFFINE = np.array([[-1.0, 0, 0, 9], [0, 0, 2.0, -12], [0, -1.0, 0, 8], [0, 0, 0, 1]])  # axes to L, I, A
METRICS = {
    "folding_percent": 0.02,
    "dice_before": 0.4,
    "dice": 0.72,
    "inverse_mean_mm": 0.7,
    "displacement_mean_mm": 1.5,
    "correlation_before": 0.5,
    "correlation_affine": 0.6,
    "correlation": 0.9,
    "seconds": {"displacement": 2.5},
}


def brain(centre, shape=(18, 22, 13)):
    """An ellipsoid of three shells, and their labels, nothing about it symmetric; axes to L, I, A."""
    x = np.stack(np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij"), axis=-1) - np.array(centre)
    radius = np.linalg.norm(x / [0.36, 0.4, 0.34], axis=-1)
    labels = np.select([radius < 0.4, radius < 0.75, radius < 1], [3, 2, 1], 0).astype(np.int32)
    return (np.array([0, 0.5, 0.8, 0.3])[labels] * (1 + 0.3 * x[..., 0])).astype(np.float32), labels


@pytest.fixture(scope="module")
def pair() -> Shown:
    fixed, fixed_labels = brain((0.5, 0.55, 0.45))
    moving, moving_labels = brain((0.42, 0.5, 0.5))
    noise = np.random.default_rng(0).normal(size=(3, *fixed.shape))
    u = np.stack([ndimage.gaussian_filter(n, 2) * 20 for n in noise], axis=-1).astype(np.float32)
    points = np.moveaxis(np.moveaxis(np.indices(fixed.shape), 0, -1) + u, -1, 0)
    moved = ndimage.map_coordinates(moving, points, order=1, mode="nearest")
    labels = ndimage.map_coordinates(moving_labels, points, order=0, mode="nearest")
    return Shown(fixed, moving, moving, moved, u, AFFINE, fixed_labels, moving_labels, labels)


@pytest.fixture(scope="module")
def facts(pair, tmp_path_factory) -> pair_report.Facts:
    path = tmp_path_factory.mktemp("volumes") / "fixed <1>.nii.gz"
    write_image(path, pair.fixed, Volume(pair.fixed, AFFINE, path, nib.nifti1.Nifti1Header()))
    header = provenance.header(read_image(path))
    rows = [
        {"structure": "hippo<campus>", "dice_before": 0.3, "dice_after": 0.7, "hd95_before": 4.0, "hd95_after": 1.5},
        {"structure": "7", "dice_before": np.nan, "dice_after": np.nan, "hd95_before": None, "hd95_after": None},
    ]
    return pair_report.Facts(
        measures.rows(METRICS),
        checks(METRICS),
        rows,
        {"fixed": header, "moving": {**header, "file": "moving.nii.gz"}},
        ["The images <hardly> overlap."],
        {"jax": "0.10.2"},
        "python -m dilformer_jax.register --fixed 'a & b.nii'",
    )


@pytest.fixture(scope="module")
def report(pair, facts, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    pair_report.write(path, "B <to> A", pair, facts)
    return path


def text_of(page: str) -> str:
    """What is read on a page."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", page.split("<body>")[1], flags=re.DOTALL)
    return re.sub(r"<[^>]+>", " ", body)


def test_the_report_says_what_was_found(report):
    page = report.read_text("utf-8")
    said = re.sub(r"\s+", " ", text_of(page))
    assert '<div class="verdict warn">' in page
    assert "Look at: inverse error, mean 0.7000 mm." in said
    assert "folding 0.0200 % warn &gt; 0.1, fail &gt; 1 pass" in said
    assert "The images &lt;hardly&gt; overlap." in said and "hippo&lt;campus&gt; 0.3000 0.7000 4 1.5" in said
    assert "correlation 0.5000 0.6000 0.9000 Pearson" in said and "time, displacement [s] – – 2.5" in said
    assert "orientation LIA LIA" in said and "18 x 22 x 13" in said and "1 x 1 x 2" in said
    assert "jax 0.10.2" in said and "a &amp; b.nii" in said and len(re.findall(r"\b[0-9a-f]{64}\b", said)) == 2


def test_the_report_is_one_small_file_without_a_network(report):
    page = report.read_text("utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 3 * (5 + 3) + 4 and all(source.startswith("data:image/") for source in sources)
    without = re.sub(r'src="[^"]*"', "", page)
    assert "http" not in without and "url(" not in without and "import" not in without
    assert report.stat().st_size < 1e6 and [path.name for path in report.parent.iterdir()] == ["report.html"]


def test_without_labels_the_report_has_no_structures(pair, facts, tmp_path):
    bare = replace(pair, fixed_labels=None, moving_labels=None, moved_labels=None)
    pair_report.write(tmp_path / "report.html", "B to A", bare, replace(facts, structures=()))
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "Structures on the images" not in page and "<h2>Alignment</h2>" in page


def test_shapes_that_disagree_are_refused(pair):
    with pytest.raises(ValueError, match=r"moved_labels is \(17, 22, 13\)"):
        replace(pair, moved_labels=pair.moved_labels[1:])


def test_upright_turns_volumes_displacement_and_affine_alike(pair):
    turned = shown.upright(pair)
    assert turned.orientation == "RAS" and tuple(turned.spacing) == (1.0, 2.0, 1.0)
    # A voxel and where it is taken to, by either grid, in mm.
    voxel = np.array([3, 16, 5])
    ahead = voxel + pair.displacement[tuple(voxel)]
    world = AFFINE[:3, :3] @ voxel + AFFINE[:3, 3]
    index = np.linalg.inv(turned.affine) @ [*world, 1]
    same = tuple(np.rint(index[:3]).astype(int))
    np.testing.assert_allclose(index[:3], same, atol=1e-9)
    assert (
        turned.fixed[same] == pair.fixed[tuple(voxel)] and turned.moved_labels[same] == pair.moved_labels[tuple(voxel)]
    )
    there = turned.affine[:3, :3] @ (same + turned.displacement[same]) + turned.affine[:3, 3]
    np.testing.assert_allclose(there, AFFINE[:3, :3] @ ahead + AFFINE[:3, 3], atol=1e-5)
    np.testing.assert_allclose(turned.determinant[same], pair.determinant[tuple(voxel)], rtol=1e-4)
    np.testing.assert_allclose(turned.millimetres[same], pair.millimetres[tuple(voxel)], rtol=1e-5)


def test_folds_are_listed_where_they_are(pair):
    u = np.zeros_like(pair.displacement)
    u[4, 10, 6, 0] = 3.0  # central differences: J = 1 + 3/2 before it, 1 - 3/2 after it
    u[12, 5, 6, 1] = 6.0  # J = 1 + 6/2 and 1 - 6/2
    rows = shown.locations(replace(pair, displacement=u))
    assert [(row["what"], row["value"], row["voxel"]) for row in rows] == [
        ("fold of 1 voxel", "J = -2", "12, 6, 6"),
        ("fold of 1 voxel", "J = -0.5", "5, 10, 6"),
        ("strongest growth", "J = 4", "12, 4, 6"),
        ("largest displacement", "6 mm", "12, 5, 6"),
    ]
    assert rows[0]["R, A, S [mm]"] == "-3.0, 0.0, 2.0"  # AFFINE @ (12, 6, 6)
    calm = shown.locations(replace(pair, displacement=u / 10))
    assert [(row["what"], row["value"]) for row in calm][:2] == [
        ("strongest shrinkage", "J = 0.7"),
        ("strongest growth", "J = 1.3"),
    ]


def test_edges_are_thin_and_where_the_step_is():
    slope = np.hypot(*(np.indices((64, 64)) - 31.5))
    found = shown.edges((slope < 20).astype(np.float32))
    distance = slope[found]
    assert np.abs(distance - 20).max() < 1.5 and 100 < found.sum() < 260  # its length is 126 pixels
    assert not shown.edges(np.full((20, 20), 0.5, np.float32)).any()


def test_thick_slices_are_shown_in_true_proportions(pair):
    turned = shown.upright(pair)  # 18 x 13 x 22 voxels of 1 x 2 x 1 mm
    ramp = np.broadcast_to(turned.affine[1, 1] * np.arange(13)[:, None] / 24, (13, 22)).astype(np.float32)
    pixels = shown.pixels(turned, ramp, 0)
    assert pixels.shape == (26, 22)
    np.testing.assert_allclose(np.diff(pixels[2:-2, 5]), 1 / 24, atol=1e-5)
    assert shown.pixels(turned, turned.fixed_labels[9], 0).shape == (52, 44)
    assert shown.pixels(turned, turned.fixed[9], 0, largest=13).shape == (13, 11)


def panel(figure, row: int, title: str):
    titles = [ax.get_title() for ax in figure.axes]
    columns = titles.index("") if "" in titles else len(titles)
    return figure.axes[row * columns + titles.index(title)]


def test_figures_show_the_slices_they_say(pair):
    turned = shown.upright(pair)
    steep = replace(turned, displacement=6 * turned.displacement)
    figure = pair_figures.deformation(steep)
    index = shown.centre_of_mass(turned.fixed)
    for row in range(3):
        cut = steep.determinant.take(index[row], row)
        log, marks = panel(figure, row, "log Jacobian").images
        good = cut > 0
        np.testing.assert_allclose(np.asarray(log.get_array()).T[good], np.log(cut[good]), rtol=1e-5)
        np.testing.assert_array_equal(np.asarray(marks.get_array())[..., 3].T > 0, ~good)
        assert log.get_clim()[0] == -log.get_clim()[1] < 0
        left = np.asarray(panel(figure, row, "moved − fixed").images[0].get_array()).T
        difference = (steep.scaled("moved") - steep.scaled("fixed")).take(index[row], row)
        np.testing.assert_allclose(left, difference)
    assert f"{100 * np.mean(steep.determinant <= 0):.2g} % folded" in figure.axes[-1].get_xlabel()
    board = pair_figures.squares((70, 35), np.array([1.0, 2.0]))
    assert [board[5, 2], board[15, 2], board[5, 7], board[15, 7]] == [False, True, True, False]


def test_structures_are_ranked_with_a_dot_before_and_after(facts):
    figure = pair_figures.structures(facts.structures)
    dice, hd95 = figure.axes
    assert [tick.get_text() for tick in dice.get_yticklabels()] == ["7", "hippo<campus>"]
    np.testing.assert_array_equal([line.get_xdata() for line in dice.get_lines()], [[np.nan, 0.3], [np.nan, 0.7]])
    np.testing.assert_array_equal([line.get_xdata() for line in hd95.get_lines()], [[np.nan, 4.0], [np.nan, 1.5]])


def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium here to open the report with")
    return found


def browse(page, profile, size="900,900"):
    """Opens a page: its picture, and what the browser said on the console."""
    picture = profile / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    flags += ["--disable-component-update", "--no-first-run", "--hide-scrollbars", f"--user-data-dir={profile / 'p'}"]
    flags += [f"--window-size={size}", "--virtual-time-budget=3000", "--enable-logging=stderr"]
    done = subprocess.run(
        [chromium(), *flags, f"--screenshot={picture}", page], capture_output=True, text=True, check=True, timeout=300
    )
    console = [line.split("CONSOLE", 1)[1] for line in done.stderr.splitlines() if "CONSOLE" in line]
    return imread(picture)[..., :3], console


def test_the_report_runs_in_a_browser(report, tmp_path):
    # The page as it is, and after its own script one that tells what became of it.
    probe = """
    <script>setTimeout(() => {
      const canvases = [...document.querySelectorAll("canvas")];
      const spread = canvases.map(canvas => {
        const grey = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        return new Set(grey).size > 20;
      });
      console.log("STATE " + document.querySelector(".state").textContent + " " + spread);
    }, 500)</script>"""
    probed = tmp_path / "probed.html"
    probed.write_text(report.read_text("utf-8") + probe, "utf-8")
    picture, console = browse(f"{probed.as_uri()}#aligned-checkerboard", tmp_path)
    assert len(console) == 1, console
    assert "STATE checkerboard of fixed and aligned true,true,true" in console[0]
    assert picture.std() > 0.05


def test_the_thumbnail_has_the_three_planes(pair):
    thumbnail = imread(io.BytesIO(viewer.thumbnail(pair)), format="jpeg")
    assert thumbnail.shape == (viewer.THUMBNAIL, 3 * viewer.THUMBNAIL, 3)
    for part in np.split(thumbnail.astype(int), 3, axis=1):
        amber = (part[..., 0] - part[..., 2] > 80).sum()
        assert 20 < amber < 2000 and part.std() > 10


def test_a_batch_is_indexed_with_its_failures(pair, tmp_path):
    entries = [
        batch_index.Entry("A <1>", "pass", "", "A/report.html", viewer.thumbnail(pair), 0.5, 0.7, 0.0, 0.1, 20.0),
        batch_index.Entry("B", "warn", "", "B/report.html", None, 0.5, float("nan"), 0.2, 0.1, 21.0),
        batch_index.Entry("C", failure="c.nii is damaged & cut short."),
    ]
    batch_index.write(tmp_path / "index.html", entries)
    page = (tmp_path / "index.html").read_text("utf-8")
    said = re.sub(r"\s+", " ", text_of(page))
    assert "3 pairs: 1 pass, 1 warn, 1 stopped; mean Dice 0.7000 over 1." in said
    assert "c.nii is damaged &amp; cut short." in said and '<a href="A/report.html">A &lt;1&gt;</a>' in page
    assert re.findall(r'class="number" data-sort="([^"]*)"', page)[5:10] == ["0.5", "", "0.2", "0.1", "21.0"]
    # Sorted by Dice, downwards: what has none stays last.
    click = """<script>
      const heads = document.querySelectorAll("th button"), rows = document.querySelector("tbody").rows;
      heads[3].click(); heads[3].click();
      console.log("ROWS " + [...rows].map(row => row.cells[3].dataset.sort));
      heads[1].click();
      console.log("ROWS " + [...rows].map(row => row.cells[1].innerText));
    </script>"""
    (tmp_path / "index.html").write_text(page + click, "utf-8")
    _, console = browse((tmp_path / "index.html").as_uri(), tmp_path)
    assert ["ROWS 0.7,," in console[0], "ROWS pass,warn,stopped" in console[1]] == [True, True], console
