"""Files that a reader sees whole or not at all."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from pipeline.storage import StoragePath, make_folder, storage_path


def partial_of(target: StoragePath) -> Path:
    """A name on this machine to write to before `publish`: beside the target, or in the temporary folder for a URL."""
    folder = target.parent if isinstance(target, Path) else Path(tempfile.gettempdir())
    return folder / f".{target.name}.{uuid.uuid4().hex}.partial"


def publish(partial: Path, target: StoragePath) -> None:
    """A written file under its name: synced, renamed and the folder synced, or uploaded, which is whole or nothing."""
    if isinstance(target, Path):
        _sync(partial)
        partial.replace(target)
        _sync(target.parent)
    else:
        target.fs.put_file(str(partial), target.path)
        partial.unlink()


@contextlib.contextmanager
def replaced_whole(path: str | StoragePath) -> Iterator[Path]:
    """Yields a name to write to; at the end the file is published.

    Readers see the old file or the new one. An exception leaves the old one and nothing else.
    """
    target = storage_path(path)
    partial = partial_of(target)
    try:
        yield partial
        publish(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: str | StoragePath, content: bytes) -> None:
    """Writes a file; see `replaced_whole`."""
    with replaced_whole(path) as partial:
        partial.write_bytes(content)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomically(path: StoragePath, text: str) -> bool:
    """Writes UTF-8 text; returns False, touching nothing, when the file already holds it."""
    content = text.encode("utf-8")
    if path.exists() and path.read_bytes() == content:
        return False
    make_folder(path.parent)
    write_atomically(path, content)
    return True
