"""On which subjects a network was trained and chosen: those say nothing of how it does on others."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dilformer_jax.data import sources
from dilformer_jax.data.protocols import Task, atlas, subjects
from dilformer_jax.io.volumes import BadInput
from dilformer_jax.models import bundle
from dilformer_jax.registration.predictor import keywords, read_config


@dataclass(frozen=True)
class Selection:
    """The data set's kind and options, and the names of the subjects that trained the network and by which its
    checkpoint was chosen; None where that is not recorded."""

    dataset: str
    options: Mapping[str, Any]
    trained: frozenset[str] | None
    chosen: frozenset[str] | None


def of_bundle(weights: Path | str) -> Selection:
    """As the bundle says. Raises BadInput where it is none."""
    training = bundle.describe(weights)["training"]
    known = lambda key: frozenset(training[key]) if key in training else None
    return Selection(training["dataset"], keywords(training["options"]), known("subjects"), known("chosen_by"))


def of_run(workdir: Path | str) -> Selection:
    """As the configuration of a training run says, if its data are still there. Raises BadInput where it is none."""
    data = read_config(workdir)["data"]
    try:
        dataset = sources.DATASETS[data["name"]](Path(data["directory"]), **data["options"])
    except BadInput:
        return Selection(data["name"], data["options"], None, None)
    return Selection(data["name"], data["options"], subjects(dataset.train), subjects(dataset.validation))


def sentence(task: Task, selection: Selection | None) -> str:
    """What the scores of this task are worth, for the results. Raises BadInput where the protocol is `clean` and a
    subject was trained on or chosen by."""
    if selection is None:
        return "nothing was trained"
    if selection.dataset != task.dataset:
        return f"trained and chosen on another data set ({selection.dataset})"
    if selection.trained is None or selection.chosen is None:
        missing = "trained" if selection.trained is None else "chosen"
        if task.name == "clean":
            raise BadInput(
                f"The network does not say on which subjects it was {missing}, which --protocol clean must know; "
                "export it again from its run, or evaluate the run by --workdir."
            )
    everywhere = atlas(task.pairs)
    scored = subjects(task.pairs) - everywhere
    trained = sorted(scored & (selection.trained or frozenset()))
    chosen = sorted(scored & (selection.chosen or frozenset()))
    if task.name == "clean" and (trained or chosen):
        raise BadInput(
            f"The network was {'trained' if trained else 'chosen'} on {', '.join((trained or chosen)[:3])}, which "
            "--protocol clean keeps for the test; evaluate a network that has not seen the test split."
        )
    if trained:
        return f"TRAINED on {len(trained)} of the {len(scored)} subjects: these are no figures of unseen brains"
    if chosen:
        return f"{len(chosen)} of the {len(scored)} subjects chose the checkpoint: validation figures, not test figures"
    if selection.trained is None or selection.chosen is None:
        return "on which subjects the network was trained or chosen is not recorded"
    return f"none of the {len(scored)} subjects trained the network or chose its checkpoint"
