"""Pictures of scores: what their dots, boxes and axes stand at."""

import numpy as np
import pytest

from dilformer_jax.reporting import score_figures
from dilformer_jax.reporting.comparison import Scored


def test_dice_per_label_ranks_the_structures():
    names = ["low", "absent", "high"]
    before, after = np.array([0.2, np.nan, 0.5]), np.array([0.4, np.nan, 0.9])
    ax = score_figures.dice_per_label(names, before, after).axes[0]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["absent", "low", "high"]
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in ax.containers}
    assert widths == {"before": [0, 0.2, 0.5], "after": [0, 0.4, 0.9]}
    above, below = (bars[0].get_y() for bars in ax.containers)
    assert above > below


def test_dice_per_label_of_several_pairs_is_boxes_around_their_medians():
    before = np.array([[0.1, 0.5], [0.2, 0.6], [0.3, np.nan], [0.4, 0.8]])
    after = before + 0.1
    ax = score_figures.dice_per_label(["a", "b"], before, after).axes[0]
    medians = sorted(line.get_xdata()[0] for line in ax.get_lines() if line.get_color() == "white")
    np.testing.assert_allclose(medians, [0.25, 0.35, 0.6, 0.7])
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"before", "after"}
    with pytest.raises(ValueError, match="3 names"):
        score_figures.dice_per_label(["a", "b", "c"], before, after)


def test_scatter_has_a_dot_for_each_pair_with_both_and_shows_zero():
    rows = [
        {"name": "a", "dice": 0.7, "folding_percent": 0.0},
        {"name": "b", "dice": 0.6, "folding_percent": 0.003},
        {"name": "c", "dice": 0.8, "folding_percent": 0.2},
        {"name": "no labels", "folding_percent": 0.1},
        {"name": "no value", "dice": None, "folding_percent": 0.1},
    ]
    figure = score_figures.scatter(rows)
    (ax,) = figure.axes
    np.testing.assert_allclose(ax.collections[0].get_offsets(), [(0, 0.7), (0.003, 0.6), (0.2, 0.8)])
    assert sorted(text.get_text() for text in ax.texts) == ["b", "c"]  # the worst, and the one that folds most
    assert ax.get_xscale() == "symlog"
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "0.001", "0.01", "0.1"]
    low, high = ax.get_xlim()
    assert low < 0 and high > 0.2
    place = lambda x: ax.transData.transform((x, 0.7))[0]
    assert place(0.001) < place(0.01) < place(0.1)
    assert place(0.1) - place(0.01) == pytest.approx(place(0.01) - place(0.001))  # decades are of one width


@pytest.mark.parametrize("folding", [[], [0.0, 0.0]])
def test_scatter_of_nothing_that_folds(folding):
    (ax,) = score_figures.scatter([{"dice": 0.5, "folding_percent": value} for value in folding]).axes
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0"]


def scored(count: int, structures: int = 3) -> list[Scored]:
    generator = np.random.default_rng(0)
    rows = []
    for k in range(count):
        dice = generator.uniform(0.3, 0.5, (6, structures)) + 0.04 * k
        dice[0, 0] = np.nan
        values = {"dice": np.nanmean(dice, axis=1), "folding_percent": np.full(6, 0.01 * k)}
        rows.append(Scored(("identity", "affine")[k] if k < 2 else f"method {k}", k < 2, values, dice))
    return rows


def test_comparison_places_every_method_alike():
    rows = scored(4)
    boxes, dots, structures = score_figures.comparison(rows, ["x", "y", "z"]).axes
    assert [text.get_text() for text in boxes.get_yticklabels()] == [row.name for row in rows]
    bottom, top = boxes.get_ylim()
    assert bottom > top  # the first method stands above
    medians = [line.get_xdata()[0] for line in boxes.get_lines() if line.get_color() == "white"]
    np.testing.assert_allclose(medians, [np.median(row.values["dice"]) for row in rows])
    said = {text.get_text() for text in boxes.texts}
    assert {f"{row.values['dice'].mean():.3f}" for row in rows} <= said
    for row, pairs in zip(rows, dots.collections, strict=True):
        np.testing.assert_allclose(pairs.get_offsets()[:, 1], row.values["dice"])
    # One colour each; in the panel of structures the lines between the extremes come first.
    colours = [tuple(pairs.get_facecolor()[0][:3]) for pairs in dots.collections]
    assert len(set(colours)) == 4
    assert [tuple(means.get_facecolor()[0][:3]) for means in structures.collections[1:]] == colours
    order = ["xyz".index(text.get_text()) for text in structures.get_yticklabels()]
    for row, means in zip(rows, structures.collections[1:], strict=True):
        np.testing.assert_allclose(means.get_offsets()[:, 0], np.nanmean(row.dice, axis=0)[order])
    best = structures.collections[-1].get_offsets()[:, 0]
    assert (np.diff(best) > 0).all()  # from the bottom up


def test_ten_methods_have_ten_looks_and_missing_panels_are_left_out():
    rows = scored(10)
    looks = score_figures._looks(rows)
    assert len({look["color"] for look in looks}) == 10
    assert len({look["marker"] for look in looks[2:]}) == 8
    without = [Scored(row.name, row.baseline, {"dice": row.values["dice"]}, row.dice[:, :0]) for row in rows]
    (boxes,) = score_figures.comparison(without, []).axes
    assert len(boxes.get_yticklabels()) == 10
    with pytest.raises(ValueError, match="2 structures"):
        score_figures.comparison(rows, ["x", "y"])


def test_a_structure_that_no_pair_has_stands_without_dots():
    rows = scored(3)
    for row in rows:
        row.dice[:, 1] = np.nan
    structures = score_figures.comparison(rows, ["x", "never", "z"]).axes[2]
    assert [text.get_text() for text in structures.get_yticklabels()][0] == "never"
    assert np.ma.getmaskarray(structures.collections[1].get_offsets())[0].any()
