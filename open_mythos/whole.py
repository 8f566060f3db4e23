"""Files that are there whole or not at all, and what is said where one cannot be written."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, sync it and rename it. Links and permissions stay.

    Raises `OSError` that names the file and the remedy; then what was there before still is.
    """
    place = path.resolve()
    temporary = place.with_name(f".{place.name}.part")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(content if isinstance(content, bytes) else content.encode())
                file.flush()
                os.fsync(file.fileno())
            if place.exists():
                shutil.copymode(place, temporary)
            temporary.replace(place)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Let an `OSError` in here name the file that is being written, and the remedy."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder, "
            "then run it again"
        ) from error
