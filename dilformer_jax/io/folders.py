"""Output folders that get all of their files or none, and what tells files apart."""

import hashlib
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dilformer_jax.io.volumes import BadInput


@contextmanager
def staged(folder: Path | str) -> Iterator[Path]:
    """Yields an empty folder, whose files move into `folder` when the block succeeds and vanish when it does not.

    A file of the same name is replaced and every other file in `folder` stays. Raises BadInput at once where the system
    refuses to write there.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; give a folder for the output.")
    # Inside the folder where there is one, since it may be the root of a file system of its own.
    base = next(place for place in (folder, *folder.parents) if place.exists())
    staging = base / f".{secrets.token_hex(4)}-{folder.name}"
    try:
        staging.mkdir()
        yield staging
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(staging.iterdir()):
            path.replace(folder / path.name)
    except OSError as error:
        raise BadInput(f"{folder} cannot be written ({error.strerror or error}); choose another place.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
