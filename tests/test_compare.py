"""The command compare on results that the tests write: numbers by hand, baselines, refusals, and what is left."""

import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dilformer_jax import compare
from dilformer_jax.reporting import comparison, comparison_tables, results, tables

BRAINS = "ABCDEF"
LABELS = (21, 22, 165)
DEFINITION = {"dice": "nearest", "hd95": "pooled", "folding_percent": "all voxels", "absent": "left out"}
NAN = float("nan")


def pairs_of(gain: float, seed: int = 0, brains: str = BRAINS) -> list[dict]:
    """Ordered pairs with Dice of each structure, the same before in all runs; 165 is absent in the first pair."""
    shared, own = np.random.default_rng(99), np.random.default_rng(seed)
    before = {pair: shared.uniform(0.3, 0.6, len(LABELS)) for pair in itertools.permutations(BRAINS, 2)}
    rows = []
    for fixed, moving in itertools.permutations(brains, 2):
        start = before[fixed, moving].copy()
        start[2] = NAN if (fixed, moving) == ("A", "B") else start[2]
        dice, hd95 = start + own.uniform(0.5, 1, len(LABELS)) * gain, 6 - 10 * gain + own.uniform(0, 1, len(LABELS))
        measures = {"dice_before": start, "dice": dice, "hd95": np.where(np.isnan(start), NAN, hd95)}
        row = {"name": f"{moving}_to_{fixed}", "fixed": fixed, "moving": moving}
        for metric, values in measures.items():
            row |= {metric: np.nanmean(values), f"{metric}_per_label": dict(zip(LABELS, values.tolist(), strict=True))}
        rows.append(row | {"folding_percent": 0.01 * gain * own.uniform(), "seconds": 1 + own.uniform()})
    return rows


def write(
    folder: Path, method: str = "", rows=None, labels=LABELS, protocol="toys", definition=DEFINITION, **more
) -> str:
    """results.json as `evaluate` writes it, with more at its top; without a method as it was once written."""
    old = {} if method else {"method": folder.name}
    start = protocol if method else f"{folder.name}, {protocol}"
    tables.write_results(folder, start, {**definition, **old}, rows or pairs_of(0.2), labels)
    found = json.loads((folder / "results.json").read_text())
    tables.write_json(folder / "results.json", found | ({"method": method} if method else {}) | more)
    return str(folder)


def compared(output: Path, *arguments: str) -> dict:
    compare.main(["compare", *arguments, "--output", str(output), "--resamples", "500"])
    return json.loads((output / "comparison.json").read_text("utf-8"))


def record(found: dict, method: str, metric: str = "dice") -> dict:
    return next(row for row in found["statistics"] if (row["method"], row["metric"]) == (method, metric))


@pytest.fixture
def undrawn(monkeypatch):
    """Without the picture, which takes longer than all else."""
    monkeypatch.setattr(compare, "_picture", lambda *arguments: False)


@pytest.fixture
def runs(tmp_path: Path) -> tuple[str, str]:
    timing = {"device": "H100", "median_seconds": 0.05, "parameters": 1234567}
    return write(tmp_path / "good", "new_net", pairs_of(0.2, 1), timing=timing), write(
        tmp_path / "old", "", pairs_of(0.1)
    )


def test_one_row_for_each_method_with_what_scipy_says(runs, tmp_path, capsys):
    found = compared(tmp_path / "out", *runs)
    assert [method["name"] for method in found["methods"]] == ["identity", "affine", "new_net", "old"]
    new, old = (np.array([row["dice"] for row in rows]) for rows in (pairs_of(0.2, 1), pairs_of(0.1)))
    row = record(found, "old")
    assert (row["mean"], row["sd"], row["n"]) == (pytest.approx(old.mean()), pytest.approx(old.std()), 30)
    assert row["reference"] == "new_net" and row["difference"] == pytest.approx((old - new).mean())
    assert row["p"] == pytest.approx(stats.wilcoxon(old, new).pvalue)
    assert row["low"] < row["mean"] < row["high"] and row["difference_high"] < 0
    before = np.array([row["dice_before"] for row in pairs_of(0.1)])
    identity = record(found, "identity")
    assert identity["mean"] == pytest.approx(before.mean())
    tests = sorted([row["p"], identity["p"]])  # Holm's correction of two
    assert row["p_holm"] == pytest.approx(max(2 * tests[0], tests[1]) if row["p"] == tests[1] else 2 * tests[0])
    assert record(found, "identity", "folding_percent")["mean"] == 0
    assert record(found, "identity", "hd95")["n"] == 0  # nobody measured it
    assert record(found, "new_net")["n_paired"] == 0 and record(found, "new_net")["p"] is None
    assert found["units_drawn"] == [6] and found["seed"] == 0 and found["resamples"] == 500
    labels = [[row["dice_per_label"][label] for label in LABELS] for row in pairs_of(0.2, 1)]
    assert list(found["dice_per_label"]["new_net"].values()) == pytest.approx(list(np.nanmean(labels, axis=0)))
    costs = {method["name"]: (method["seconds"], method["device"], method["parameters"]) for method in found["methods"]}
    assert costs["new_net"] == (0.05, "H100", 1234567)
    assert costs["old"] == (pytest.approx(np.median([row["seconds"] for row in pairs_of(0.1)])), "", None)

    out = capsys.readouterr().out
    assert "30 pairs of 6 brains, 3 structures" in out and "Differences to new_net" in out
    assert "p is too small" in out and "affine was not evaluated: `dilformer evaluate --method affine" in out
    assert "seed 0" in out and f"{new.mean():.3f} ± {new.std():.3f} [" in out
    written = {f"comparison.{kind}" for kind in ("md", "tex", "csv", "json", "png")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == written
    page = (tmp_path / "out" / "comparison.md").read_text("utf-8")
    assert f"**{new.mean():.3f}** ± {new.std():.3f} [" in page and "| affine | – | – | – | – | – | – |" in page
    assert "1,234,567" in page and "![Dice of each method](comparison.png)" in page
    with (tmp_path / "out" / "comparison.csv").open(newline="") as file:
        lines = {(line["method"], line["metric"]): line for line in csv.DictReader(file)}
    assert float(lines["old", "dice"]["p"]) == pytest.approx(row["p"]) and lines["affine", "dice"]["mean"] == ""
    assert lines["new_net", "hd95"]["device"] == "H100"


@pytest.mark.usefixtures("undrawn")
def test_latex_has_the_best_bold_and_the_second_underlined(runs, tmp_path):
    names = r"A&B_1 {50%}", r"\new [x]"
    found = compared(tmp_path / "out", *runs, "--names", ",".join(names))
    text = (tmp_path / "out" / "comparison.tex").read_text("utf-8")
    lines = {line.split(" & ")[0].strip(): line for line in text.splitlines() if " & $" in line}
    best, second = lines[r"A\&B\_1 \{50\%\}"], lines[r"\textbackslash{}new {[}x{]}"]
    dice, hd95 = (record(found, names[0], metric) for metric in ("dice", "hd95"))
    assert rf"$\mathbf{{{dice['mean']:.3f}}} \pm {dice['sd']:.3f}$" in best
    assert rf"$\mathbf{{{hd95['mean']:.2f}}} \pm" in best  # which is the lower one
    assert rf"$\underline{{{record(found, names[1])['mean']:.3f}}} \pm" in second
    assert best.endswith(r"1{,}234{,}567 \\") and "identity" in lines and r"\underline" not in lines["identity"]
    assert r"affine" in text and "& -- & -- & --" in text
    bare = text.replace(r"\{", "").replace(r"\}", "")
    for begin, end in (("{", "}"), (r"\begin{tabular}", r"\end{tabular}"), (r"\toprule", r"\bottomrule")):
        assert bare.count(begin) == bare.count(end) > 1
    for table in text.split(r"\begin{tabular}")[1:]:
        columns = table[1 : table.index("}")]
        cells = [line.replace(r"\&", "").count(" & ") + 1 for line in table.splitlines() if line.endswith(r"\\")]
        assert set(cells) == {len(columns)}


def test_latex_of_numbers_and_text():
    assert comparison_tables.latex_text("a_b\n100% ~ <x|y> #1 $ ^") == (
        r"a\_b 100\% \textasciitilde{} \textless{}x\textbar{}y\textgreater{} \#1 \$ \textasciicircum{}"
    )
    assert comparison_tables.latex_number(0.0000234, ".2g") == r"2.3\cdot10^{-5}"
    assert comparison_tables.latex_number(-0.0341, "+.3f") == "-0.034"
    assert (comparison_tables.p_value(0.0004), comparison_tables.p_value(0.0314)) == ("<0.001", "0.031")


def test_equal_means_share_a_rank_and_doing_nothing_is_not_the_most_regular():
    rows = [comparison.Scored(name, name == "identity", {}, np.zeros((1, 1))) for name in ("identity", "a", "b", "c")]
    table = {"folding_percent": (0, 0.1, 0.3, 0.1), "dice": (0.9, 0.5, NAN, 0.7), "unheard": (1, 2, 3, 4)}
    records = [
        {"metric": metric, "method": row.name, "mean": mean}
        for metric, means in table.items()
        for row, mean in zip(rows, means, strict=True)
    ]
    assert comparison.ranks(records, rows) == {
        **{("folding_percent", "a"): 1, ("folding_percent", "c"): 1, ("folding_percent", "b"): 2},
        **{("dice", "identity"): 1, ("dice", "c"): 2},
    }


@pytest.mark.usefixtures("undrawn")
def test_runs_of_the_identity_and_the_affine_take_their_rows(runs, tmp_path):
    nothing = [row | {"dice": row["dice_before"], "hd95": 7.5} for row in pairs_of(0.2)]
    identity, affine = (write(tmp_path / k, k, rows) for k, rows in (("identity", nothing), ("affine, 12 dof", None)))
    refined = write(tmp_path / "r", "identity, 50 steps of refinement of a velocity", pairs_of(0.15))
    found = compared(tmp_path / "out", runs[0], affine, refined, identity)
    names = [method["name"] for method in found["methods"]]
    assert names == ["identity", "affine, 12 dof", "new_net", "identity, 50 steps of refinement of a velocity"]
    assert record(found, "identity", "hd95")["mean"] == 7.5
    assert not [note for note in found["notes"] if "affine was not" in note]


@pytest.mark.usefixtures("undrawn")
def test_data_that_were_aligned_before_have_one_row_for_both(tmp_path):
    found = compared(tmp_path / "out", write(tmp_path / "run", "net", aligned=True))
    assert [method["name"] for method in found["methods"]] == ["affine (as distributed)", "net"]


@pytest.mark.usefixtures("undrawn")
def test_pairs_and_structures_in_common(tmp_path):
    fewer = []
    for row in pairs_of(0.1, brains="ABCD"):
        means = {k: np.nanmean([row[f"{k}_per_label"][label] for label in (22, 165)]) for k in ("dice", "dice_before")}
        fewer.append(row | means)
    some = write(tmp_path / "some", "some", fewer, labels=(22, 165))
    found = compared(tmp_path / "out", write(tmp_path / "all", "all"), some, "--metrics", "dice")
    assert len(found["pairs"]) == 12 and found["labels"] == [22, 165]
    assert "The runs scored 30, 12 pairs; compared are the 12 that all have." in found["notes"]
    assert "The runs scored 3, 2 structures; means are over 2 that all have." in found["notes"]
    rows = pairs_of(0.2, brains=BRAINS)
    kept = [row for row in rows if {row["fixed"], row["moving"]} <= set("ABCD")]
    expected = [np.nanmean([row["dice_per_label"][label] for label in (22, 165)]) for row in kept]
    assert record(found, "all")["mean"] == pytest.approx(np.mean(expected))


@pytest.mark.usefixtures("undrawn")
def test_asking_for_structures_and_a_reference(runs, tmp_path):
    found = compared(tmp_path / "out", *runs, "--labels", "165", "--reference", "old", "--metrics", "hd95,dice")
    assert [row["metric"] for row in found["statistics"]] == ["hd95"] * 4 + ["dice"] * 4
    mine = record(found, "new_net")
    assert mine["reference"] == "old" and mine["n"] == 29 and mine["difference"] > 0  # 165 is absent once
    assert ", n 29" in (tmp_path / "out" / "comparison.md").read_text("utf-8")
    expected = np.nanmean([row["dice_per_label"][165] for row in pairs_of(0.2, 1)])
    assert mine["mean"] == pytest.approx(expected)


def test_dice_with_what_is_absent_as_zero(tmp_path):
    rows = [row | {"dice_absent0": 0.5} for row in pairs_of(0.2)]
    run = results.read(Path(write(tmp_path / "run", "net", rows)))
    table = [[0 if value != value else value for value in row["dice_per_label"].values()] for row in rows]
    whole, part = results.common([run]), results.common([run], (22, 165))
    np.testing.assert_allclose(results.values(run, "dice_absent0", whole), 0.5)
    np.testing.assert_allclose(results.values(run, "dice_absent0", part), np.mean(np.array(table)[:, 1:], axis=1))
    (identity, *_) = comparison.scored([run], ["net"], ["dice_absent0", "dice_trilinear"], whole)
    before = np.array([list(row["dice_before_per_label"].values()) for row in rows])
    np.testing.assert_allclose(identity.values["dice_absent0"], np.nan_to_num(before).mean(axis=1))
    np.testing.assert_allclose(identity.values["dice_trilinear"], np.nanmean(before, axis=1))


@pytest.mark.usefixtures("undrawn")
def test_a_measure_that_one_run_lacks_is_a_dash(tmp_path):
    bare = [{key: value for key, value in row.items() if "hd95" not in key} for row in pairs_of(0.1)]
    found = compared(tmp_path / "out", write(tmp_path / "all", "all"), write(tmp_path / "bare", "bare", bare))
    assert record(found, "bare", "hd95")["n"] == 0 and record(found, "bare", "hd95")["mean"] is None
    line = next(line for line in (tmp_path / "out" / "comparison.md").read_text().splitlines() if "| bare" in line)
    assert line.split("|")[3].strip() == "–"


def test_a_training_run_with_one_evaluation_and_without_labels(tmp_path):
    rows = [{k: row[k] for k in ("name", "fixed", "moving", "folding_percent", "seconds")} for row in pairs_of(0.2)]
    write(tmp_path / "run" / "evaluation-x", "net", rows, labels=())
    (tmp_path / "run" / "evaluation-x" / "run.json").write_text('{"device": "TPU v5"}')
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "comparison.png").touch()  # of an earlier comparison, which had Dice
    found = compared(tmp_path / "out", str(tmp_path / "run"))
    assert found["methods"][2]["device"] == "TPU v5" and not (tmp_path / "out" / "comparison.png").exists()
    assert record(found, "identity", "folding_percent")["reference"] == "net"  # the identity does not win by its 0
    assert "comparison.png" not in (tmp_path / "out" / "comparison.md").read_text("utf-8")


@pytest.mark.usefixtures("undrawn")
def test_a_metric_of_two_definitions_is_refused_only_where_it_is_shown(tmp_path, capsys):
    one = write(tmp_path / "one", "one")
    other = write(tmp_path / "two", "two", pairs_of(0.1), definition=DEFINITION | {"hd95": "the larger directed one"})
    with pytest.raises(SystemExit) as stop:
        compared(tmp_path / "out", one, other)
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert error.startswith("hd95 in ") and "'the larger directed one', 'pooled'" in error and error.count("\n") == 1
    assert {row["metric"] for row in compared(tmp_path / "out", one, other, "--metrics", "dice")["statistics"]} == {
        "dice"
    }


@pytest.fixture(scope="module")
def refused(tmp_path_factory) -> Path:
    """A folder with results that are as they should be (net), and others that do not go with them."""
    folder = tmp_path_factory.mktemp("refused")
    write(folder / "net", "net")
    for name in ("evaluation", "evaluation-identity"):
        write(folder / "workdir" / name, name)
    write(folder / "protocol", "p", protocol="others")
    write(folder / "elsewhere", "e", [row | {"fixed": row["fixed"] * 2} for row in pairs_of(0.1)])
    write(folder / "unlike", "u", labels=(1, 2))
    write(folder / "moved", "m", [row | {"dice_before": row["dice_before"] + 0.01} for row in pairs_of(0.1)])
    (folder / "empty").mkdir()
    for name, content in (("broken", "{"), ("nothing", "[1]"), ("half", '{"pairs": [{"fixed": "A"}]}')):
        (folder / name).mkdir()
        (folder / name / "results.json").write_text(content)
    return folder


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere",), "nowhere does not exist"),
        (("empty",), "empty has no results.json and no evaluation with one"),
        (("workdir",), "workdir has several evaluations (evaluation, evaluation-identity)"),
        (("broken",), "results.json is not JSON"),
        (("nothing",), "results.json has no list of pairs"),
        (("half",), "results.json is not as `dilformer evaluate` writes it (KeyError: 'moving')"),
        (("net", "protocol"), "of the protocol 'others'"),
        (("net", "elsewhere"), "have no pair in common"),
        (("net", "unlike"), "scored no structure in common"),
        (("net", "moved"), "these are not the same images and labels"),
        (("net", "--labels", "21,99"), "--labels 99 was not scored by every run; choose of 21, 22, 165"),
        (("net", "--labels", "21-x"), "is no list of labels"),
        (("net", "--names", "a,b"), "--names has 2 names (a, b), but there are 1 runs"),
        (("net", "--names", "identity"), "Two methods are called 'identity'"),
        (("net", "--reference", "nobody"), "--reference 'nobody' is none of the methods (identity; affine; net)"),
        (("net", "--metrics", "dice,assd"), "--metrics assd is in none of the runs, which have"),
        (("net", "--resamples", "5"), "100 or more are needed"),
        ((), "the following arguments are required: RUN"),
        (("net", "--output", "net/results.json"), "results.json is a file; give a folder"),
    ],
)
def test_refusals_are_one_sentence_and_leave_nothing(refused, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(refused)
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        compare.main(["compare", *arguments])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and sentence in err and err.count("\n") == 1 and out == ""
    assert sorted(Path().rglob("*")) == before


@pytest.mark.usefixtures("undrawn")
def test_two_runs_of_one_method_are_told_apart_by_their_folders(tmp_path):
    found = compared(tmp_path / "out", *(write(tmp_path / name, "net") for name in ("first", "second")))
    assert [method["name"] for method in found["methods"]][2:] == ["net (first)", "net (second)"]
    same = record(found, "net (second)")
    assert same["difference"] == 0 and same["p"] == 1 and same["rank_biserial"] is None


def test_comparing_imports_no_jax(runs, tmp_path):
    code = "import sys; from dilformer_jax import compare; compare.main(sys.argv); assert 'jax' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, *runs, "--output", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_brains_that_are_always_in_the_same_pairs_are_drawn_together(tmp_path, undrawn, capsys):
    chosen = [row for row in pairs_of(0.2) if {row["fixed"], row["moving"]} in ({"A", "B"}, {"C", "D"})]
    compared(tmp_path / "out", write(tmp_path / "net", "net", chosen))
    assert "2 groups of brains that are in the same pairs are drawn" in capsys.readouterr().out
    compared(tmp_path / "all", write(tmp_path / "other", "net", pairs_of(0.2)))
    assert "6 brains are drawn" in capsys.readouterr().out
