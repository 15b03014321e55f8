"""On which subjects a network was trained and chosen: those say nothing of how it does on others."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dilformer_jax.data.protocols import Task, atlas
from dilformer_jax.io import bundle
from dilformer_jax.io.volumes import BadInput
from dilformer_jax.registration.predictor import keywords, read_config

RECORD = "run.json"  # that `train` writes


@dataclass(frozen=True)
class Selection:
    """The data set's kind and options, and the names of the subjects that trained the network and by which its
    checkpoint was chosen, None where that is not recorded; `files` has their images' paths, as far as those are known,
    and `others` are the data sets of what its training began with.
    """

    dataset: str
    options: Mapping[str, Any]
    trained: frozenset[str] | None
    chosen: frozenset[str] | None
    files: Mapping[str, str] = field(default_factory=dict)
    others: frozenset[str] = frozenset()


def of_bundle(weights: Path | str) -> Selection:
    """As the bundle says. Raises BadInput where it is none."""
    training = bundle.describe(weights)["training"]
    known = lambda key: None if training.get(key) is None else frozenset(training[key])
    others = frozenset(training.get("others", ()))
    return Selection(
        training["dataset"], keywords(training["options"]), known("subjects"), known("chosen_by"), others=others
    )


def of_run(workdir: Path | str) -> Selection:
    """As a training run recorded when it was started, for the splits of a folder may be others by now. Raises BadInput
    where the workdir is none."""
    data = read_config(workdir)["data"]
    try:
        record = json.loads((Path(workdir) / RECORD).read_text(encoding="utf-8"))["subjects"]
        trained, chosen = (None if record[key] is None else dict(record[key]) for key in ("trained", "chosen_by"))
        others = frozenset(record.get("others", ()))
    except (OSError, ValueError, KeyError, TypeError):
        return Selection(data["name"], data["options"], None, None)
    files = {name: path for name, path in ((trained or {}) | (chosen or {})).items() if path}
    names = lambda found: None if found is None else frozenset(found)
    return Selection(data["name"], data["options"], names(trained), names(chosen), files, others)


def sentence(task: Task, selection: Selection | None) -> str:
    """What the scores of this task are worth, for the results. Raises BadInput where the protocol is `clean` and a
    subject was trained on or chosen by, or where that cannot be known."""
    if selection is None:
        return "nothing was trained"
    everywhere = atlas(task.pairs)
    brains = {
        subject.name: str(subject.image.absolute())
        for pair in task.pairs
        for subject in (pair.fixed, pair.moving)
        if subject.name not in everywhere
    }
    same, clean = task.dataset in {selection.dataset, *selection.others}, task.name == "clean"
    known = {path: name for name, path in selection.files.items()}

    def seen(names: frozenset[str] | None) -> list[str]:
        """Those of the brains that are among these: by their files, or by their names where these mean the same."""
        return sorted(
            name
            for name, path in brains.items()
            if known.get(path) in (names or ()) or ((same or clean) and name in (names or ()))
        )

    trained, chosen = seen(selection.trained), seen(selection.chosen)
    if clean and (trained or chosen):
        raise BadInput(
            f"The network was {'trained' if trained else 'chosen'} on {', '.join((trained or chosen)[:3])}, which "
            "--protocol clean keeps for the test; evaluate a network that has not seen the test split."
        )
    if clean and (selection.trained is None or selection.chosen is None):
        missing = "trained" if selection.trained is None else "chosen"
        raise BadInput(
            f"The network does not say on which subjects it was {missing}, which --protocol clean must know; train it, "
            "or export it, again."
        )
    if trained:
        return f"TRAINED on {len(trained)} of the {len(brains)} subjects: these are no figures of unseen brains"
    if chosen:
        return f"{len(chosen)} of the {len(brains)} subjects chose the checkpoint: validation figures, not test figures"
    if not same:
        how = "by their names and files" if selection.files else "by their names"
        return f"trained and chosen on other subjects, of {selection.dataset}, as far as is to be told {how}"
    if selection.trained is None or selection.chosen is None:
        return "on which subjects the network was trained or chosen is not recorded"
    return f"none of the {len(brains)} subjects trained the network or chose its checkpoint"
