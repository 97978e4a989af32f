"""Copies of checkpoints in another place: a folder, or a URL that fsspec opens, such as s3://bucket/folder.

Nothing waits for copying, and nothing fails when it fails: what is missing is copied after the next save. A checkpoint
counts as copied once its manifest stands there, which is written last.
"""

import hashlib
import logging
import os
import posixpath
import shutil
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TypeAlias

from upath import UPath

from infra.checkpoint_files import (
    MANIFEST,
    STEP_FOLDER,
    CheckpointError,
    parse_manifest,
    read_manifest,
)
from infra.durable import flush, write_durably

logger = logging.getLogger(__name__)

StoragePath: TypeAlias = Path | UPath

_CHUNK_BYTES = 8 * 2**20


class Mirror:
    """The copies of the checkpoints of one store. One process writes them.

    `delays_s` are the seconds between attempts at one checkpoint. Raises CheckpointError for a URL that no installed
    package opens.
    """

    def __init__(self, where: str, local: Path, delays_s: Sequence[float]) -> None:
        self.where = where
        self._root = _storage_path(where)
        self._local = local
        self._delays_s = delays_s
        self._lock = threading.Lock()
        self._wanted: tuple[list[int], set[int]] | None = None
        self._thread: threading.Thread | None = None

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there as a whole, in ascending order."""
        return [step for step in self._begun() if MANIFEST in _names_in(self._root / _name(step))]

    def copy_soon(self, steps: Collection[int], keep: Collection[int] = ()) -> None:
        """Have these steps copied in the background, the newest first, and then those deleted that are older than all
        of them and not in `keep`. A later call replaces what has not begun.
        """
        with self._lock:
            self._wanted = (sorted(steps, reverse=True), {*steps, *keep})
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint-mirror", daemon=True)
                self._thread.start()

    def finish(self, timeout_s: float) -> bool:
        """Wait for what is under way; False when it is not done in time."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return thread is None or not thread.is_alive()

    def fetch(self, step: int, folder: Path) -> None:
        """Copy a checkpoint into a new local folder, flushed to disk and not verified.

        Raises CheckpointError when its manifest is damaged or a file is missing, and what the storage raises when it
        cannot be reached.
        """
        source = self._root / _name(step)
        text = (source / MANIFEST).read_text(encoding="utf-8")
        for name in parse_manifest(text, str(source / MANIFEST)).files:
            try:
                self._retrying(lambda name=name: _copy(source / name, folder / name))
            except FileNotFoundError:
                raise CheckpointError(f"{source / name} is missing") from None
        write_durably(folder / MANIFEST, text)

    def _work(self) -> None:
        while True:
            with self._lock:
                wanted, self._wanted = self._wanted, None
                if wanted is None:
                    self._thread = None
                    return
            self._sync(*wanted)

    def _sync(self, steps: Sequence[int], keep: set[int]) -> None:
        waiting = list(steps)
        try:
            for step in steps:
                self._retrying(lambda step=step: self._copy_over(step))
                waiting.remove(step)
            for step in self._begun():
                if step not in keep and step < max(steps):
                    self._delete(step)
        except Exception as error:  # each storage raises its own kinds
            logger.warning(
                "copying checkpoints to %s failed (%s: %s); training is not touched. Steps %s are tried again after "
                "the next save",
                self.where,
                type(error).__name__,
                error,
                ", ".join(map(str, sorted(waiting))) or "to be deleted",
            )

    def _begun(self) -> list[int]:
        """Steps of which anything is there, in ascending order."""
        named = [STEP_FOLDER.fullmatch(name) for name in _names_in(self._root)]
        return sorted(int(match.group(1)) for match in named if match)

    def _retrying(self, action: Callable[[], object]) -> None:
        for delay_s in (*self._delays_s, None):
            try:
                action()
                return
            except (CheckpointError, FileNotFoundError):  # would be the same the next time
                raise
            except Exception:
                if delay_s is None:
                    raise
                time.sleep(delay_s)

    def _copy_over(self, step: int) -> None:
        source, target = self._local / _name(step), self._root / _name(step)
        try:
            self._copy_files(source, target)
        except CheckpointError as error:
            if source.exists():
                logger.warning("%s is damaged and is not copied to %s: %s", source, self.where, error)
            else:
                logger.info("%s has been deleted meanwhile and is not copied", source)

    def _copy_files(self, source: Path, target: StoragePath) -> None:
        manifest, manifest_copy = read_manifest(source), target / MANIFEST
        text = manifest.to_json()
        if MANIFEST in _names_in(target):
            if manifest_copy.read_text(encoding="utf-8") == text:
                return
            manifest_copy.unlink()
        for name, facts in manifest.files.items():
            if not (source / name).is_file():
                raise CheckpointError(f"{source / name} is missing")
            if _copy(source / name, target / name) != facts.sha256:
                raise CheckpointError(f"{source / name} does not match its sha256: its content has changed")
        if isinstance(manifest_copy, Path):
            write_durably(manifest_copy, text)
        else:
            manifest_copy.write_text(text, encoding="utf-8")
        logger.info("%s was copied to %s", source.name, self.where)

    def _delete(self, step: int) -> None:
        folder = self._root / _name(step)
        if MANIFEST in _names_in(folder):
            (folder / MANIFEST).unlink()  # first: without it the rest is no checkpoint
        if isinstance(folder, Path):
            shutil.rmtree(folder)
        else:
            folder.fs.rm(folder.path, recursive=True)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _names_in(folder: StoragePath) -> set[str]:
    """Names in a folder, none where it is absent. Unlike `exists` and `iterdir` of URLs this tells a store that cannot
    be reached from an empty one.
    """
    try:
        if isinstance(folder, Path):
            return set(os.listdir(folder))
        return {
            posixpath.basename(entry["name"].rstrip("/")) for entry in folder.fs.ls(folder.path, detail=True)
        }
    except FileNotFoundError:
        return set()


def _copy(source: StoragePath, target: StoragePath) -> str:
    """Copies a file and returns the sha256 of what was read."""
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            digest.update(chunk)
            writer.write(chunk)
    if isinstance(target, Path):
        flush(target)
        flush(target.parent)
    return digest.hexdigest()


def _storage_path(where: str) -> StoragePath:
    """A path of this machine as pathlib has it, a URL as its counterpart with the same methods."""
    if "://" not in where:
        return Path(where)
    if where.startswith("file://"):
        return Path(where.removeprefix("file://"))
    try:
        return UPath(where, use_listings_cache=False)  # other processes write there too
    except (ValueError, ImportError) as error:
        raise CheckpointError(
            f"opening the mirror {where} failed: {error}; checkpoint.mirror must be a folder or a URL that fsspec "
            "opens (s3://bucket/folder works as installed, other stores need their package)"
        ) from error
