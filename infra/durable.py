"""Files that are whole and on disk, or absent. Torch-free: everybody writes some."""

import os
import uuid
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Write a file that is whole and on disk, or absent: fsync under another name, then rename.

    Of several that write it at once, in whatever processes, one wins.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """A file's content, or a folder's entries, are on disk afterwards."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
