"""Tables of results: files read back by other programs."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from dilformer_jax.io.volumes import BadInput
from dilformer_jax.reporting import tables

NAN = float("nan")


def pair(name: str, **values) -> dict:
    fixed, moving = name.split("_from_")
    return {"name": name, "fixed": fixed, "moving": moving, **values}


PAIRS = [
    pair(
        "A_from_B",
        dice=0.7,
        dice_per_label={21: 0.6, 22: 0.8, 165: NAN},
        hd95=2.0,
        hd95_per_label={21: 1.0, 22: 3.0, 165: NAN},
        folding_percent=0.0,
        seconds=1.5,
        absent=[165],
        vanished=[],
    ),
    pair(
        "B_from_A",
        dice=0.3,
        dice_per_label={21: 0.6, 22: 0.0, 165: 0.3},
        hd95=NAN,
        hd95_per_label={21: 5.0, 22: NAN, 165: NAN},
        folding_percent=0.5,
        seconds=2.5,
        absent=[],
        vanished=[22],
    ),
]


LABELS = (21, 22, 165)


def csv_of(path: Path) -> list[dict]:
    with path.open(newline="") as page:
        return list(csv.DictReader(page))


@pytest.fixture
def results(tmp_path):
    summary = tables.write_results(tmp_path / "out", "lpba40", {"labels": "nearest", "spacing_mm": 1.0}, PAIRS, LABELS)
    return tmp_path / "out", summary


def test_results_json_is_strict_and_round_trips(results):
    output, summary = results

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    read = json.loads((output / "results.json").read_text("utf-8"), parse_constant=refuse)
    assert read["protocol"] == "lpba40"
    assert read["definition"] == {"labels": "nearest", "spacing_mm": 1.0}
    assert read["counts"] == {"pairs": 2, "labels": 3, "absent": 1, "vanished": 1}
    assert [p["name"] for p in read["pairs"]] == ["A_from_B", "B_from_A"]
    assert read["pairs"][0]["dice_per_label"] == {"21": 0.6, "22": 0.8, "165": None}
    assert read["pairs"][1]["hd95"] is None
    assert read["summary"]["dice"] == pytest.approx({"mean": 0.5, "sd": 0.2, "n": 2})
    assert read["summary"]["hd95"] == {"mean": 2.0, "sd": 0.0, "n": 1}
    assert read["summary"]["folding_percent"] == pytest.approx({"mean": 0.25, "sd": 0.25, "n": 2})
    assert "dice_before" not in read["summary"] and "sdlogj" not in read["summary"]
    assert "population" in read["statistics"]
    assert read["summary"] == summary
    assert sorted(path.name for path in output.iterdir()) == [
        "results.csv",
        "results.json",
        "results_pairs.csv",
        "summary.md",
    ]


def test_results_csv_has_a_row_for_each_pair_and_label(results):
    rows = csv_of(results[0] / "results.csv")
    assert [(row["pair"], row["label"]) for row in rows] == [(p["name"], str(k)) for p in PAIRS for k in LABELS]
    assert list(rows[0]) == ["pair", "fixed", "moving", "label", "state", "dice", "hd95"]
    states = {(row["pair"], row["label"]): (row["state"], row["dice"], row["hd95"]) for row in rows}
    assert states["A_from_B", "22"] == ("present", "0.8", "3.0")
    assert states["A_from_B", "165"] == ("absent", "", "")
    assert states["B_from_A", "22"] == ("vanished", "0.0", "")


def test_each_pair_has_a_row_of_its_means_whether_it_has_labels_or_not(results, tmp_path):
    first, second = csv_of(results[0] / "results_pairs.csv")
    assert list(first) == ["pair", "fixed", "moving", "dice", "hd95", "folding_percent", "seconds"]
    assert (first["pair"], float(first["hd95"]), second["hd95"]) == ("A_from_B", 2.0, "")
    assert np.mean([float(row["dice"]) for row in (first, second)]) == pytest.approx(results[1]["dice"]["mean"])
    tables.write_results(tmp_path, "mine", "", [{"name": "c_to_d", "tre_mm": 1.5, "folding_percent": 0.25}], [])
    (row,) = csv_of(tmp_path / "results_pairs.csv")
    assert row == {"pair": "c_to_d", "fixed": "", "moving": "", "tre_mm": "1.5", "folding_percent": "0.25"}


def test_summary_page_has_every_metric_and_structure(results):
    page = (results[0] / "summary.md").read_text("utf-8")
    assert page.startswith("# lpba40\n")
    assert "2 pairs, 3 structures; 1 times a structure was absent" in page and "1 times one vanished" in page
    assert "| dice | 0.5000 | 0.2000 | 2 |" in page
    assert "| hd95 | 2 | 0 | 1 |" in page
    assert "* labels: nearest" in page and "population standard deviation over the pairs" in page
    # label, mean Dice, mean HD95, absent, vanished
    assert "| 22 | 0.4000 | 3 | 0 | 1 |" in page
    assert "| 165 | 0.3000 | – | 1 | 0 |" in page


def test_dice_before_and_numpy_values_are_carried(tmp_path):
    measured = pair(
        "A_from_B",
        dice=np.float64(0.75),
        dice_before=np.float32(0.5),
        dice_per_label={np.int32(1): np.float32(0.75)},
        dice_before_per_label={1: 0.5},
        matrix=np.array([[1.0, np.inf]]),
    )
    summary = tables.write_results(tmp_path, "folder", "labels by nearest neighbour", [measured], [1])
    assert summary["dice_before"] == {"mean": 0.5, "sd": 0.0, "n": 1}
    read = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert read["pairs"][0]["matrix"] == [[1.0, None]]
    assert read["pairs"][0]["dice_per_label"] == {"1": 0.75}
    (row,) = csv_of(tmp_path / "results.csv")
    assert (row["dice_before"], row["dice"]) == ("0.5", "0.75")
    assert "labels by nearest neighbour" in (tmp_path / "summary.md").read_text("utf-8")


def test_csv_survives_names_with_commas_and_quotes(tmp_path):
    odd = {"name": 'one, "two"', "fixed": "a\nb", "moving": "c", "dice": 1.0, "dice_per_label": {7: 1.0}}
    tables.write_results(tmp_path, "folder", "", [odd], [7])
    (row,) = csv_of(tmp_path / "results.csv")
    assert (row["pair"], row["fixed"], row["label"]) == ('one, "two"', "a\nb", "7")


def test_results_that_cannot_be_written_leave_the_old_ones(results, tmp_path):
    output, _ = results
    before = (output / "results.json").read_text("utf-8")
    with pytest.raises(ValueError, match="no pairs"):
        tables.write_results(output, "lpba40", "", [], LABELS)
    with pytest.raises(TypeError):
        tables.write_json(output / "results.json", {"x": object()})
    assert (output / "results.json").read_text("utf-8") == before
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput, match="file"):
        tables.write_results(tmp_path / "file", "lpba40", "", PAIRS, LABELS)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "file",
        "results.csv",
        "results.json",
        "results_pairs.csv",
        "summary.md",
    ]


def test_markdown_aligns_numbers_and_escapes_bars():
    rows = [{"name": "a|b", "x": 0.123456, "n": 3}, {"name": "c", "x": NAN}]
    assert tables.markdown(rows, ["name", "x", "n"]) == (
        "| name | x | n |\n| --- | ---: | ---: |\n| a\\|b | 0.1235 | 3 |\n| c | – | – |\n"
    )


def test_the_printed_summary_lines_up():
    lines = tables.summary_text(tables.summarise(PAIRS)).splitlines()
    assert lines[0].split() == ["metric", "mean", "sd", "n"]
    assert lines[2].split() == ["dice", "0.5000", "0.2000", "2"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.52249, "0.5225"), (12.3456, "12.35"), (1e-5, "1e-05"), (0.0, "0"), (float("inf"), "inf")]
    + [(3, "3"), (None, "–"), (True, "yes"), (np.float32(0.5), "0.5000"), ("text", "text")],
)
def test_values_are_shown_with_four_digits(value, shown):
    assert tables.text(value) == shown


def test_csv_rows_are_the_csv(results):
    rows = tables.csv_rows(PAIRS, LABELS)
    assert len(rows) == len(PAIRS) * len(LABELS)
    for row, read in zip(rows, csv_of(results[0] / "results.csv"), strict=True):
        assert {key: "" if value != value else str(value) for key, value in row.items()} == read


def test_a_pair_without_labels_says_so():
    rows = tables.csv_rows([*PAIRS, {"name": "unseen", "fixed": "A", "moving": "C"}], LABELS)
    assert {row["state"] for row in rows if row["pair"] == "unseen"} == {"unlabelled"}
    assert {row["state"] for row in rows if row["pair"] != "unseen"} == {"present", "absent", "vanished"}
