"""Trains a registration network: `python -m dilformer_jax.train --config configs/demo.py --workdir runs/demo`."""

import dataclasses
import importlib.util
import inspect
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict  # type: ignore[import-untyped]

from dilformer_jax import cli
from dilformer_jax.data.sources import DATASETS
from dilformer_jax.data.subjects import Pair
from dilformer_jax.io.volumes import BadInput
from dilformer_jax.reporting import run_record, tables
from dilformer_jax.training import logs

if TYPE_CHECKING:
    from dilformer_jax.registration.predictor import Predictor


def train(config: ConfigDict, workdir: Path) -> None:
    """Trains what the configuration says, in WORKDIR; started again, it goes on from the last checkpoint."""
    # Here, not above: JAX and what uses it take seconds to import, which --help need not wait for.
    import jax
    import jax.numpy as jnp

    from dilformer_jax import models
    from dilformer_jax.data import pipeline, subjects
    from dilformer_jax.registration import evaluation, methods
    from dilformer_jax.registration.predictor import Predictor, keywords
    from dilformer_jax.reporting import figures
    from dilformer_jax.training import checkpoint, feeding, parallel, state

    # --- Devices and configuration ---
    parallel.initialise()
    first = jax.process_index() == 0
    mesh = parallel.mesh(config.space)
    replicated, (share, shares) = parallel.replicated(mesh), parallel.share(mesh)
    run_record.complete(config)
    with config.unlocked():
        config.batch_size = batch_size = _batch_size(config, mesh.shape["data"], workdir)
    _check(config, batch_size, mesh.shape["data"])
    try:
        module = models.create(config.model.name, **keywords(config.model.options.to_dict()))
    except ValueError as error:
        raise BadInput(f"config.model: {error}") from error

    # --- Data ---
    source, options = DATASETS[config.data.name], keywords(config.data.options.to_dict())
    known = set(inspect.signature(source).parameters) - {"directory", "path"}
    if unknown := sorted(options.keys() - known):
        raise BadInput(
            f"config.data.options.{unknown[0]} is no option of {config.data.name}, which has "
            f"{', '.join(sorted(known)) or 'none'}; mend it in the configuration."
        )
    dataset = source(Path(config.data.directory), **options)
    made, labelled = dataset.synthesis is not None, "label_weight" in config.loss
    preprocessing, resident = config.data.preprocessing.to_dict(), config.data.cache == "device"
    cache = None if resident else config.data.cache or None
    _check_labels(config, made, len(dataset.labels))
    pairs = subjects.split(dataset, "train")
    held_out = _spread(subjects.split(dataset, "validation"), config.validation_pairs)
    evaluation.check([*pairs, *held_out], methods.identity())
    grid = pipeline.common_grid(pairs, preprocessing, cache=cache)
    shape = tuple(grid["network_shape"])

    # --- Network, optimiser, step ---
    if any(size % module.downsampling for size in shape):
        raise BadInput(
            f"The images of {config.data.directory} reach the network as {shape} voxels "
            f"and {config.model.name} needs multiples of {module.downsampling}; "
            "set data.preprocessing.crop_to, or fewer levels."
        )
    try:
        transformation = state.optimiser(total_steps=config.total_steps, **config.optimiser.to_dict())
    except TypeError as error:
        raise BadInput(f"config.optimiser: {error}") from error
    # When a run goes on, what it began with may be gone.
    given, teachers = _start(config.start_from, workdir)
    try:
        now = state.initial(module, transformation, config.seed, params=given, average=config.average)
    except BadInput as error:
        raise BadInput(f"config.start_from {config.start_from}: {error}" if given else str(error)) from error
    except ValueError as error:
        raise BadInput(f"config.model: {error}") from error
    now = jax.device_put(now, replicated)
    split = parallel.slabs(mesh, shape[0], module.downsampling)
    step_once = state.step_function(
        module,
        transformation,
        config.loss.to_dict(),
        bidirectional=config.bidirectional,
        mesh=mesh,
        split=split,
        remat=config.remat,
        accumulate=config.accumulate,
        average=config.average,
        total_steps=config.total_steps,
    )
    planes = split.count * split.planes if split else shape[0]
    image = jax.ShapeDtypeStruct((batch_size, planes, *shape[1:], 1), jnp.float32, sharding=parallel.sharded(mesh))
    try:
        jax.eval_shape(step_once, now, feeding.shapes(image, made=made, labelled=labelled))
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"config.model or config.loss: {error}") from error
    predictor = Predictor(module, now.params, preprocessing, config.model.name, "")
    ids = dataset.labels if labelled and not made else ()
    volumes = feeding.upload(pairs, preprocessing, shape, replicated, classes=made, ids=ids) if resident else None
    feed = feeding.feeder(mesh, split, volumes)

    with checkpoint.Checkpoints(workdir / checkpoint.FOLDER) as checkpoints:
        # --- Resume: the restored state, and the log as it was at that step ---
        done = checkpoints.latest_step()
        began = run_record.record(dataset, pairs, held_out, grid, parallel.describe(), teachers)
        if done is not None:
            run_record.check(workdir, began, config.data.directory)
        run_record.write_config(config, workdir, resuming=done is not None, writing=first)
        if first:
            tables.write_json(workdir / run_record.RECORD, began)
        log = logs.MetricLog(workdir, writing=first)
        log.cut(-1 if done is None else done)
        if done is not None:
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), now)
            now = checkpoints.restore(abstract)
        start = done or 0

        with (
            logs.Progress(config.total_steps, step=start, showing=first) as progress,
            pipeline.batches(
                pairs, preprocessing, batch_size=batch_size, seed=config.seed, start_step=start,
                workers=config.data.workers,
                flips=config.data.flips, affine=config.data.affine, gamma=config.data.gamma,
                synthesis=dataset.synthesis,
                images=not resident, cache=cache,
                process_index=share, process_count=shares,
            ) as batches,
        ):  # fmt: skip
            parameters = sum(x.size for x in jax.tree.leaves(now.params))
            progress.print(
                f"{parallel.describe()}, {config.model.name} with {parameters:,} parameters, "
                f"{len(pairs)} training pairs"
            )
            progress.print(
                f"from step {start} of {config.total_steps}, global batch {batch_size}, network input {shape}"
            )
            if set(held_out) & set(pairs):
                progress.print("validation is on training pairs: its Dice says nothing about images not trained on")
            if done is None:
                scores = _validate(predictor, now.trained, held_out, dataset.labels)
                log.write(0, **scores)
                progress.print(_sentence(0, scores))

            # --- The loop: step, check, log, validate, checkpoint; in this order, so that a resumed log is the same
            # log. The devices never wait: the next batch is on its way while they compute, and a step's figures are
            # fetched when the step after it has been handed to them ---
            seen: list[dict[str, float]] = []
            fed = ((batch["index"], feed(batch)) for batch in batches)
            ahead: list[tuple[np.ndarray, dict[str, Any]]] = []
            running: list[tuple[int, np.ndarray, dict[str, Any]]] = []
            clock = time.monotonic()
            for step in range(start + 1, config.total_steps + 1):
                indices, images = ahead.pop() if ahead else next(fed)
                now, measured = step_once(now, images)
                running.append((step, indices, measured))
                last = step == config.total_steps
                if not last:
                    ahead.append(next(fed))
                # What is validated or saved is first known to be sound.
                settled = last or not (step % config.validate_every and step % config.checkpoint_every)
                while len(running) > (not settled):
                    of, indices, measured = running.pop(0)
                    seen.append({name: float(value) for name, value in jax.device_get(measured).items()})
                    _check_numbers(seen[-1], of, [pairs[index].name for index in indices], config)
                    if of % config.log_every == 0 or of == config.total_steps:
                        means = {name: float(np.mean([values[name] for values in seen])) for name in seen[0]}
                        log.write(of, **means)
                        log.timing(of, seconds=time.monotonic() - clock)
                        progress.update(of, loss=means["loss"])
                        seen = []
                scores = {}
                if step % config.validate_every == 0 or last:
                    scores = _validate(predictor, now.trained, held_out, dataset.labels) | {
                        "regulariser_share": means["regulariser_share"]
                    }
                    log.write(step, **scores)
                    progress.update(step, dice=scores.get("dice"))
                    progress.print(_sentence(step, scores))
                if step % config.checkpoint_every == 0 or scores:
                    checkpoints.save(step, now, scores.get("dice"), force=last)

    if first and importlib.util.find_spec("matplotlib"):
        (workdir / "figures").mkdir(exist_ok=True)
        figures.save(workdir / "figures" / "training.png", figures.training(logs.read(workdir / logs.METRICS)))


def _start(path: str, workdir: Path) -> tuple[Any, run_record.Teachers]:
    """The parameters that a new run begins with, of a bundle or of a run at its best checkpoint, None for fresh ones;
    and what they have seen, or this run has where it goes on. Raises BadInput."""
    from dilformer_jax.io import bundle
    from dilformer_jax.registration import selection
    from dilformer_jax.registration.predictor import read_config
    from dilformer_jax.training import checkpoint

    going_on = checkpoint.begun(workdir)
    if not (read_config(workdir).get("start_from") if going_on else path):
        return None, run_record.Teachers()
    if going_on:
        params, seen = None, selection.of_run(workdir)
    elif path != bundle.DEFAULT and not Path(path).exists():
        raise BadInput(f"config.start_from {path} does not exist; give a bundle, default, or a run's workdir.")
    elif (Path(path) / checkpoint.FOLDER).is_dir():
        params, seen = checkpoint.restore_params(path)[0], selection.of_run(path)
    else:
        params, seen = bundle.load(path)[0], selection.of_bundle(path)
    named = lambda names: None if names is None else {name: seen.files.get(name, "") for name in names}
    datasets = seen.others | ({seen.dataset} if params is not None else frozenset())
    return params, run_record.Teachers(named(seen.trained), named(seen.chosen), datasets)


def _batch_size(config: ConfigDict, shares: int, workdir: Path) -> int:
    """What a batch size of 0 stands for: one pair for each share of the batch and part of it, or, when a run goes on,
    what it stood for when the run began: on other devices it would come to mean other batches."""
    from dilformer_jax.training import checkpoint

    began = workdir / "config.json"
    if config.batch_size == 0 and began.is_file() and checkpoint.begun(workdir):
        return json.loads(began.read_text())["batch_size"]
    return config.batch_size or shares * max(config.accumulate, 1)


def _check(config: ConfigDict, batch_size: int, shares: int) -> None:
    owners = "devices" if config.space == 1 else f"groups of {config.space} devices"
    if config.accumulate < 1:
        raise BadInput(f"accumulate is {config.accumulate}; make it 1 or more.")
    if batch_size < 1 or batch_size % shares:
        raise BadInput(
            f"batch_size {batch_size} does not divide among {shares} {owners}; "
            "make it a multiple, or 0, in a new run, for one pair each."
        )
    if batch_size % (shares * config.accumulate):
        raise BadInput(
            f"batch_size {batch_size} on {shares} {owners if shares > 1 else 'device'} does not divide into accumulate="
            f"{config.accumulate} parts; make it a multiple of {shares * config.accumulate}, or 0 in a new run."
        )
    if config.loss.inverse_weight and not config.bidirectional:
        raise BadInput("loss.inverse_weight compares both directions of a pair; set bidirectional, or make it 0.")
    if config.data.name not in DATASETS:
        raise BadInput(f"config.data.name is {config.data.name!r}; give one of {', '.join(DATASETS)}.")
    for name in ("total_steps", "log_every", "validate_every", "checkpoint_every"):
        if config[name] < 1:
            raise BadInput(f"{name} is {config[name]}; make it 1 or more.")
    for name, value in (("validation_pairs", config.validation_pairs), ("data.workers", config.data.workers)):
        if value < 0:
            raise BadInput(f"{name} is {value}; make it 0 or more.")
    if not 0 <= config.seed < 2**32:
        raise BadInput(f"seed is {config.seed}; give one from 0 to 2**32 - 1.")
    for name in ("validate_every", "checkpoint_every"):
        # A log line is a mean since the line before; it could not be made again from a checkpoint amid it.
        if config[name] % config.log_every:
            raise BadInput(
                f"{name} is {config[name]} and log_every {config.log_every}; make it a multiple of log_every."
            )


def _check_labels(config: ConfigDict, made: bool, count: int) -> None:
    """Whether what the loss and the images want of label maps goes together; `count` is the data's labels."""
    labelled = "label_weight" in config.loss
    if made and config.data.preprocessing.normalise != "percentile":
        raise BadInput(
            f"data.preprocessing.normalise is {config.data.preprocessing.normalise!r}; images made of label maps are "
            "normalised by 'percentile', so that is what the network must see of others."
        )
    if made and not labelled:
        raise BadInput("loss has no label_weight, which images made of label maps need; add it, with label_count.")
    if labelled and config.loss.label_count != count:
        raise BadInput(f"loss.label_count is {config.loss.label_count} and the data have {count} labels; make it that.")
    if (made or labelled) and config.data.cache != "device":
        raise BadInput(f"data.cache is {config.data.cache!r}; label maps are trained on from the device: 'device'.")


def _check_numbers(measured: dict[str, float], step: int, names: Sequence[str], config: ConfigDict) -> None:
    # The gradient's norm too: what a gradient has spoilt the loss shows only a step later, when it may have been saved.
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(measured[name]):
            raise BadInput(
                f"The {name.replace('_', ' ')} is {measured[name]} at step {step}, on {', '.join(names)}; mend these "
                "images and start again, which goes on from the last checkpoint, or train anew in another --workdir "
                f"with a lower optimiser.learning_rate than {config.optimiser.learning_rate}."
            )


def _spread(pairs: tuple[Pair, ...], count: int) -> list[Pair]:
    """`count` of the pairs (all of them for 0), evenly spread so that every subject has its turn."""
    count = min(count or len(pairs), len(pairs))
    return [pairs[index * len(pairs) // count] for index in range(count)]


def _validate(predictor: "Predictor", params: Any, pairs: list[Pair], labels: tuple[int, ...]) -> dict[str, float]:
    """Means over the pairs, at the resolution of the files: Dice before and now, folding, and how far the displacement
    reaches."""
    import jax

    from dilformer_jax.ops import folding
    from dilformer_jax.registration import evaluation, methods, scoring

    method = methods.network(dataclasses.replace(predictor, params=jax.device_get(params)))
    rows = []
    for pair in pairs:
        case = evaluation.registered(pair, method)
        length = np.linalg.norm(case.displacement, axis=-1)
        row = {
            "displacement_p95": float(np.percentile(length, 95)),
            "folding_percent": folding.folding_percent(case.displacement),
        }
        rows.append(row | scoring.dice_of(case, labels))
    # Pairs without labels, or without a structure in common, have no Dice and are in no mean of it.
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def _sentence(step: int, scores: dict[str, float]) -> str:
    shown = [f"{scores['dice']:.4f} Dice (identity {scores['dice_identity']:.4f})"] if "dice" in scores else []
    shown += [f"|u| p95 {scores['displacement_p95']:.2f} voxels", f"folding {scores['folding_percent']:.4f} %"]
    if "regulariser_share" in scores:
        shown.append(f"regulariser {100 * scores['regulariser_share']:.0f} % of the loss")
        if scores["displacement_p95"] < 0.05:
            shown.append(
                "it is still the identity: look at the images, or train anew with a lower loss.regulariser_weight"
            )
    return f"validation at step {step}: {', '.join(shown)}"


def main() -> None:
    cli.run(train)


if __name__ == "__main__":
    main()
