"""Text files that a reader sees whole or not at all."""

import os
from pathlib import Path


def write_text_atomically(path: Path, text: str) -> bool:
    """Writes UTF-8 text by rename; returns False, touching nothing, when the file already holds it."""
    content = text.encode("utf-8")
    if path.exists() and path.read_bytes() == content:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return True
