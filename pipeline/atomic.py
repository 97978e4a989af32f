"""Files that a reader sees whole or not at all."""

import os
import uuid
from pathlib import Path


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write beside the target, sync, rename, sync the folder: readers see the old file or the new one."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text_atomically(path: Path, text: str) -> bool:
    """Writes UTF-8 text by rename; returns False, touching nothing, when the file already holds it."""
    content = text.encode("utf-8")
    if path.exists() and path.read_bytes() == content:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return True
