"""What of a longer piece of work is done: a line of JSON for each part, so that it goes on where it was stopped.

The first line has the order, which cannot change while the work goes on.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dilformer_jax.io.headers import BadInput, by
from dilformer_jax.io.volumes import replacing

FILE = "preparation.jsonl"


def begun(output: Path, order: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The records in the journal of a folder, by name; folder and journal are begun where there is none.

    Raises BadInput where the folder has anything else in it, or a journal of another order.
    """
    path = output / FILE
    if not path.exists():
        if output.is_dir() and any(output.iterdir()):
            raise BadInput(f"{output} has files that are no preparation's; give a new or an empty folder.")
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{output} cannot be made ({error.strerror}); choose another place.") from error
        with replacing(path) as unfinished:
            unfinished.write_text(json.dumps(order) + "\n", "utf-8")
        return {}
    first, *lines = path.read_bytes().decode("utf-8", "replace").splitlines() or [""]
    try:
        before = json.loads(first)
        differing = [key for key in order if before.get(key) != order[key]]
    except (ValueError, AttributeError) as fault:
        raise BadInput(f"{path} is damaged; remove {output}, or give another folder.") from fault
    if differing:
        key = differing[0]
        raise BadInput(
            f"{output} was prepared with {key} {_said(before.get(key))}, not {_said(order[key])}; give another folder."
        )
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            record = json.loads(line)
            found[record["name"]] = record
        except (ValueError, KeyError, TypeError):  # half a line, where it was stopped
            continue
    return found


def add(output: Path, record: Mapping[str, Any]) -> None:
    """Adds a record, which has a name, to the journal. Raises BadInput where that is refused."""
    path = output / FILE
    try:
        # After a line that was half written, this one begins anew.
        content = path.read_bytes()
        with path.open("a", encoding="utf-8") as file:
            file.write("" if content.endswith(b"\n") else "\n")
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror}); make room, then start again.") from error


def _said(value: Any) -> str:
    return by(value) if isinstance(value, list) else str(value)
