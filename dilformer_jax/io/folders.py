"""Output folders that get all of their files or none, and what tells files apart."""

import hashlib
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dilformer_jax.io.volumes import BadInput


@contextmanager
def staged(folder: Path | str, replacing: Iterable[str] = ()) -> Iterator[Path]:
    """Yields an empty folder, whose files move into `folder` when the block succeeds and vanish when it does not.

    A file of the same name is replaced; those that are named in `replacing` and were not written now go, since they are
    of an earlier run; every other file in `folder` stays. Raises BadInput at once where the system refuses to write
    there.
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
        written = sorted(path.name for path in staging.iterdir())
        for name in written:
            if (folder / name).is_dir():
                raise BadInput(f"{folder / name} is a folder where a file is to be written; choose another place.")
        for name in written:
            (staging / name).replace(folder / name)
        for name in set(replacing) - set(written):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(f"{folder} cannot be written ({error.strerror or error}); choose another place.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
