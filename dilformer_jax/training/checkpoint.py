"""Checkpoints of a run: the latest, to go on from, and the best by validation Dice, to use."""

import math
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp  # type: ignore[import-untyped]
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep  # type: ignore[import-untyped]

from dilformer_jax.io.volumes import BadInput

State = TypeVar("State")
FOLDER = "checkpoints"
# What orbax and tensorstore raise on files that are damaged, gone or of another structure, without telling which.
DAMAGE = (OSError, ValueError, KeyError, TypeError)


class Checkpoints:
    """The checkpoints in a folder, open for writing; leaving the `with` block waits until all are on disk.

    A checkpoint takes its name only once it is whole, so one cut short by SIGKILL is never found, and its remains are
    cleared away by the next run. Kept are the latest checkpoint and the best one. Every process of a run makes the
    same calls.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory).absolute()
        if not _makeable(self.directory):
            raise BadInput(f"{self.directory} cannot hold checkpoints because a file stands there; choose another.")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{self.directory} cannot be made ({error.strerror}); choose another --workdir.") from error
        self._manager = ocp.CheckpointManager(self.directory, options=_options(cleanup_tmp_directories=True))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()

    def save(self, step: int, state: Any, dice: float | None = None, force: bool = False) -> bool:
        """Starts to write `state`, whose buffers may be donated at once; `dice` is what the best is chosen by.

        Returns False, without writing, for a step that is there already or, unless `force`, lies before the latest.
        """
        if step in self._manager.all_steps():
            return False
        # An empty dictionary ranks lowest; orbax would warn of None at every checkpoint between validations.
        metrics = {} if dice is None or not math.isfinite(dice) else {"dice": float(dice)}
        return self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics, force=force)

    def wait(self) -> None:
        """Returns when every checkpoint is on disk."""
        self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step of the highest Dice, or the latest where none has a Dice."""
        return self._manager.best_step()

    def restore(self, abstract: State, step: int | None = None) -> State:
        """The state of `step` (the latest unless given), bit for bit, in the structure of `abstract`.

        Leaves come back as arrays on the `sharding` that the leaf of `abstract` has, else as NumPy arrays: the devices
        that wrote them do not matter. Raises BadInput where there is no checkpoint or it does not fit `abstract`.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise BadInput(f"{self.directory} holds no checkpoint; train first.")
        try:
            state = self._restored(step, jax.tree.map(_wanted, abstract))
            differing = [
                jax.tree_util.keystr(path)
                for (path, wanted), found in zip(
                    jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(state), strict=True
                )
                if (wanted.shape, wanted.dtype) != (found.shape, found.dtype)
            ]
        except DAMAGE as error:
            raise BadInput(_unfit(self.directory, step, error)) from error
        if differing:
            raise BadInput(_unfit(self.directory, step, f"{differing[0]} differs"))
        return state

    def _restored(self, step: int, wanted: Any) -> Any:
        # Of the fields that are None orbax keeps the names, and wants to find them: a checkpoint that was written
        # before a field existed is restored without it.
        restore = lambda item: self._manager.restore(step, args=ocp.args.StandardRestore(item))
        filled = {name: value for name, value in getattr(wanted, "__dict__", {}).items() if value is not None}
        try:
            return restore(wanted)
        except DAMAGE:
            if len(filled) == len(getattr(wanted, "__dict__", {})):
                raise
            return wanted.replace(**restore(filled))


def begun(workdir: Path | str) -> bool:
    """Whether a run has a checkpoint to go on from: a whole one, for of one cut short only a longer name is left."""
    return any(path.name.isdigit() for path in (Path(workdir) / FOLDER).glob("[0-9]*"))


def restore_params(workdir: Path | str, which: str = "best") -> tuple[dict[str, Any], int]:
    """Nested dictionary of the parameters as NumPy arrays, their running mean where the run keeps one, and the step
    they are of, from a run's folder.

    `which` is 'best' (the latest where no checkpoint has a Dice) or 'latest'. Only reads, so that a run which is still
    training is not disturbed. Raises BadInput where there is no checkpoint or it cannot be read.
    """
    if which not in ("best", "latest"):
        raise ValueError(f"which is 'best' or 'latest', not {which!r}")
    directory = Path(workdir).absolute() / FOLDER
    if not directory.is_dir():
        raise BadInput(f"{workdir} holds no checkpoints; give the --workdir of a training run.")
    # Not read_only, which warns each time of what it implies.
    options = _options(create=False)
    with ocp.CheckpointManager(directory, options=options, item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        step = manager.best_step() if which == "best" else manager.latest_step()
        if step is None:
            raise BadInput(f"{workdir} holds no finished checkpoint; wait until training has written one.")
        try:
            # Without restore arguments orbax would look for the devices that wrote the arrays.
            saved = manager.item_metadata(step)
            name = "average" if saved.get("average") else "params"
            params = {name: saved[name]}
            reading = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), params)
            arguments = ocp.args.PyTreeRestore(item=params, restore_args=reading, partial_restore=True)
            return manager.restore(step, args=arguments)[name], step
        except DAMAGE as error:
            raise BadInput(f"{directory / str(step)} cannot be read ({_first_line(error)}); try again.") from error


def _options(**settings: bool) -> ocp.CheckpointManagerOptions:
    # Without metrics are only those that a kill left half deleted.
    best = keep.BestN(get_metric_fn=_dice, n=1, keep_checkpoints_without_metrics=False)
    return ocp.CheckpointManagerOptions(
        best_fn=_dice,
        best_mode="max",
        preservation_policy=keep.AnyPreservationPolicy([keep.LatestN(1), best]),
        **settings,
    )


def _dice(metrics: dict[str, float]) -> float:
    return metrics.get("dice", -math.inf)


def _wanted(leaf: Any) -> Any:
    """A leaf as orbax is to restore it: on the devices of its sharding, or in NumPy without taking memory."""
    if getattr(leaf, "sharding", None) is not None:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _makeable(directory: Path) -> bool:
    return all(place.is_dir() for place in (directory, *directory.parents) if place.exists())


def _unfit(directory: Path, step: int, reason: object) -> str:
    return (
        f"{directory / str(step)} does not fit this configuration ({_first_line(reason)}); "
        "give the configuration it was written with, or another --workdir."
    )


def _first_line(reason: object) -> str:
    return str(reason).strip().splitlines()[0].rstrip(".:;") if str(reason).strip() else type(reason).__name__
