"""Protocols on small files of the data sets that they are of, and what the training of a network says of the scores."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from toys import affine, tiny_bundle, write

from dilformer_jax.data import protocols, sources
from dilformer_jax.data.ixi import IXI_LABELS
from dilformer_jax.data.protocols import IXI_GROUPS, PROTOCOLS
from dilformer_jax.data.subjects import Dataset, Pair, Subject, ordered_pairs
from dilformer_jax.io.volumes import BadInput
from dilformer_jax.registration import selection


@pytest.fixture
def lpba40(tmp_path: Path):
    """A folder with these subjects of LPBA40, by their numbers."""

    def folder(*numbers: int) -> Path:
        for number, kind in itertools.product(numbers, ("t1", "seg")):
            write(tmp_path / f"S{number:02d}_{kind}.nii.gz", np.full((4, 4, 4), 21, np.uint8), affine())
        return tmp_path

    return folder


def names(task: protocols.Task) -> list[str]:
    return [pair.name for pair in task.pairs]


def test_lpba40_is_its_test_pairs_or_where_they_are_missing_the_validation_pairs(lpba40):
    directory = lpba40(11, 35, 36, 37)
    task = protocols.task("lpba40", directory, None, None, {})
    assert task.split == "validation" and len(task.pairs) == 6 and len(task.labels) == 54
    assert not {181, 182} & set(task.labels) and names(task)[0] == "S35_to_S36"
    lpba40(1, 2)
    task = protocols.task("lpba40", directory, None, None, {})
    assert task.split == "test" and names(task) == ["S01_to_S02", "S02_to_S01"]
    assert protocols.task("lpba40", directory, "validation", None, {}).split == "validation"
    assert protocols.task("lpba40", directory, None, None, {}, (21, 22)).labels == (21, 22)


def test_the_atlas_is_fixed_in_every_pair(lpba40):
    directory = lpba40(1, 2, 5, 35, 36)
    assert names(protocols.task("lpba40-atlas", directory, None, None, {})) == ["S02_to_S01", "S05_to_S01"]
    with pytest.raises(BadInput, match="no pair of the validation split with S01 as fixed image"):
        protocols.task("lpba40-atlas", directory, "validation", None, {})


def test_the_17_structures_of_ixi_are_its_30():
    members = sorted(itertools.chain.from_iterable(IXI_GROUPS.values()))
    assert len(IXI_GROUPS) == 17 and members == sorted(IXI_LABELS)


def test_clean_refuses_splits_that_share_a_subject(lpba40, monkeypatch):
    a, b, c, d, e = (Subject(name, Path(f"{name}.nii"), None) for name in "abcde")
    atlas = lambda *others: tuple(Pair(other, a) for other in others)

    def check(train, validation, test):
        known = {"mine": lambda directory: Dataset(train, validation, test, (1,), "")}
        monkeypatch.setattr(sources, "DATASETS", known)
        return protocols.task("clean", Path("here"), None, "mine", {})

    assert names(check(ordered_pairs([a, b]), (), ordered_pairs([c, d]))) == ["c_to_d", "d_to_c"]
    assert names(check(atlas(b), atlas(c), atlas(d, e))) == ["a_to_d", "a_to_e"], "all splits share an atlas"
    with pytest.raises(BadInput, match="here has b in both train and test"):
        check(ordered_pairs([a, b]), (), ordered_pairs([b, c]))
    with pytest.raises(BadInput, match="here has c in both validation and test"):
        check(ordered_pairs([a, b]), ordered_pairs([c, d]), ordered_pairs([c, e]))


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        ("lpba41", None, "--protocol lpba41 is not known; it is one of lpba40, "),
        ("oasis-test", None, "for its test split give --protocol oasis --split test"),
        ("ixi", "lpba40", "--protocol ixi is of the data set ixi; leave out --dataset lpba40"),
        ("clean", "ixo", "--dataset ixo is not known"),
        (None, "ixo", "--dataset ixo is not known"),
    ],
)
def test_names_that_are_none(name, kind, sentence, tmp_path):
    with pytest.raises(BadInput, match=sentence):
        protocols.task(name, tmp_path, None, kind, {})


def test_clean_reports_the_test_split_alone_and_without_a_protocol_any_is(lpba40):
    directory = lpba40(11, 12, 35, 36)
    with pytest.raises(BadInput, match="--protocol clean reports the test split; leave out --split train"):
        protocols.task("clean", directory, "train", "lpba40", {})
    task = protocols.task(None, directory, "train", "lpba40", {})
    assert (task.name, task.split, names(task)) == ("lpba40", "train", ["S11_to_S12", "S12_to_S11"])
    assert protocols.task(None, directory, None, "lpba40", {}).split == "validation"


def test_every_protocol_says_what_is_scored():
    for name, protocol in PROTOCOLS.items():
        assert len(protocol.text) > 150 and protocol.text.endswith("."), name


def test_scores_say_who_trained_and_who_chose(lpba40, tmp_path):
    task = protocols.task("lpba40", lpba40(35, 36, 37), None, None, {})
    known = lambda trained, chosen, dataset="lpba40": selection.Selection(dataset, {}, trained, chosen)
    say = lambda found: selection.sentence(task, found)
    assert say(known(frozenset({"S11"}), frozenset({"S38"}))) == (
        "none of the 3 subjects trained the network or chose its checkpoint"
    )
    assert say(known(frozenset({"S11"}), frozenset({"S35", "S37"}))).startswith("2 of the 3 subjects chose")
    assert say(known(frozenset({"S36"}), frozenset({"S35"}))).startswith("TRAINED on 1 of the 3")
    assert "not recorded" in say(known(frozenset({"S11"}), None))
    assert "on other subjects, of synthseg" in say(known(frozenset({"S35"}), None, "synthseg"))
    assert "nothing was trained" in say(None)
    # Of another data set, but its training began with parameters that knew this one.
    pupil = selection.Selection(
        "ixi", {}, frozenset({"IXI1", "S36"}), frozenset({"IXI2"}), others=frozenset({"lpba40"})
    )
    assert say(pupil).startswith("TRAINED on 1 of the 3")


def test_clean_refuses_a_network_that_knows_the_test_split(lpba40):
    part = ordered_pairs([Subject(name, Path(f"{name}.nii"), None) for name in ("x", "y")])
    task = protocols.Task("clean", "", "prepared", "test", part, (1,))
    known = lambda trained, chosen: selection.Selection("prepared", {}, trained, chosen)
    assert "none of the 2" in selection.sentence(task, known(frozenset({"z"}), frozenset()))
    with pytest.raises(BadInput, match="The network was chosen on y"):
        selection.sentence(task, known(frozenset({"z"}), frozenset({"y"})))
    with pytest.raises(BadInput, match="The network was trained on x"):
        selection.sentence(task, known(frozenset({"x"}), frozenset()))
    # Under other names, in another form, they are the same files.
    elsewhere = selection.Selection(
        "folder", {}, frozenset({"z"}), frozenset({"w"}), {"w": str(Path("y.nii").absolute())}
    )
    with pytest.raises(BadInput, match="The network was chosen on y"):
        selection.sentence(task, elsewhere)
    with pytest.raises(BadInput, match="does not say on which subjects it was chosen"):
        selection.sentence(task, known(frozenset({"z"}), None))


def test_bundles_and_runs_know_their_subjects(tmp_path, lpba40):
    training = {"dataset": "folder", "options": {"validation": 0.5}, "licence": "", "steps": 0, "seed": 0}
    found = selection.of_bundle(tiny_bundle(tmp_path / "old", training=training))
    assert (found.dataset, found.options, found.trained, found.chosen) == ("folder", {"validation": 0.5}, None, None)
    training |= {"subjects": ["a", "b"], "chosen_by": ["c"]}
    found = selection.of_bundle(tiny_bundle(tmp_path / "new", training=training))
    assert (found.trained, found.chosen) == ({"a", "b"}, {"c"})

    run = tmp_path / "run"
    run.mkdir()
    data = {"name": "lpba40", "directory": str(tmp_path), "options": {}}
    (run / "config.json").write_text(json.dumps({"model": {}, "data": data}))
    assert selection.of_run(run).trained is None  # of a run that did not record it
    subjects = {"trained": {"S11": "/S11.nii", "S12": "/S12.nii"}, "chosen_by": {"S35": "/S35.nii"}}
    (run / "run.json").write_text(json.dumps({"subjects": subjects}))
    found = selection.of_run(run)
    assert (found.trained, found.chosen, found.files["S12"]) == ({"S11", "S12"}, {"S35"}, "/S12.nii")
    # What it began with did not say who had trained it: nor does the run.
    subjects = {"trained": None, "chosen_by": {"S35": "", "S36": "/S36.nii"}, "others": ["lpba40", "oasis"]}
    (run / "run.json").write_text(json.dumps({"subjects": subjects}))
    found = selection.of_run(run)
    assert (found.trained, found.chosen, found.files) == (None, {"S35", "S36"}, {"S36": "/S36.nii"})
    assert found.others == {"lpba40", "oasis"}
