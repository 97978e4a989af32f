"""Files that a reader sees whole or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced_whole(path: str | Path) -> Iterator[Path]:
    """Yields a name beside the target to write to; at the end it is synced, renamed, and the folder synced.

    Readers see the old file or the new one. An exception leaves the old one and nothing else.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _sync(path.parent)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file by rename; see `replaced_whole`."""
    with replaced_whole(path) as partial:
        partial.write_bytes(content)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomically(path: Path, text: str) -> bool:
    """Writes UTF-8 text by rename; returns False, touching nothing, when the file already holds it."""
    content = text.encode("utf-8")
    if path.exists() and path.read_bytes() == content:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return True
