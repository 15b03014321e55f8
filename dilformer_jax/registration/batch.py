"""Many pairs, one after the other: what is done is not done again, and one that fails does not stop the others."""

import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dilformer_jax.data.subjects import Pair
from dilformer_jax.io.folders import digest
from dilformer_jax.io.volumes import BadInput, replacing

RECORD = "run.json"
FAILURES = "failures"


@dataclass(frozen=True)
class Outcome:
    """What became of a pair: 'done', 'kept' from an earlier run, 'refused' by BadInput, or 'failed' by a fault of ours,
    of which `sentence` says why."""

    pair: Pair
    kind: str
    sentence: str = ""


def run(
    pairs: Sequence[Pair],
    output: Path,
    register: Callable[[Pair, Path], object],
    settings: Mapping[str, Any],
    shard: tuple[int, int] = (1, 1),
) -> Iterator[Outcome]:
    """Calls `register(pair, folder)` for each pair of this shard, (k, n) with 1 <= k <= n, and says what became of it.

    A pair's folder is `output`/NAME, which `register` fills all at once, with `RECORD` in it. Pairs whose record was
    made from the same files with the same `settings` are kept. Why a pair failed is left in `output`/failures/NAME.txt.
    """
    k, n = shard
    for pair in pairs[k - 1 :: n]:
        folder, told = output / pair.name, output / FAILURES / f"{pair.name}.txt"
        if is_done(pair, folder, settings):
            yield Outcome(pair, "kept")
            continue
        try:
            register(pair, folder)
        except BadInput as fault:
            outcome, text = Outcome(pair, "refused", " ".join(str(fault).split())), str(fault)
        # Whatever it is, the other pairs have nothing to do with it.
        except Exception as fault:
            outcome, text = Outcome(pair, "failed", f"{type(fault).__name__}: {fault}"), traceback.format_exc()
        else:
            told.unlink(missing_ok=True)
            yield Outcome(pair, "done")
            continue
        told.parent.mkdir(parents=True, exist_ok=True)
        with replacing(told) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
        yield outcome


def is_done(pair: Pair, folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the folder holds this pair's results, of its files as they are now and with these settings."""
    found = record(folder)
    if found is None or found.get("settings") != json.loads(json.dumps(settings)):
        return False
    files = [path for subject in (pair.fixed, pair.moving) for path in (subject.image, subject.labels) if path]
    if not all(path.is_file() for path in files):
        return False
    return all(found["inputs_sha256"].get(str(path.absolute())) == digest(path) for path in files)


def record(folder: Path) -> dict[str, Any] | None:
    """What `register` left about a pair; None where there is nothing."""
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
