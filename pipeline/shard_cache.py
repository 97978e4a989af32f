"""Shards of a remote set on the local disk: fetched whole, checked, kept until newer ones need the room.

A file is named by its SHA-256, so that ranks, runs and sets share it and none reads a stale one.
"""

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from pipeline.atomic import partial_of
from pipeline.errors import ShardError
from pipeline.manifest import ShardEntry
from pipeline.shards import sha256_of_file, shard_paths
from pipeline.storage import StoragePath

DEFAULT_FOLDER = "svitt-shards"
_FETCHES_AT_ONCE = 2


class ShardCache:
    """Local copies of shards in `folder`, together at most `max_bytes` (but always the one in use).

    Safe to share between threads and between processes.
    """

    def __init__(self, folder: str | Path | None, max_bytes: int) -> None:
        self.folder = Path(folder) if folder is not None else Path(tempfile.gettempdir()) / DEFAULT_FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self._max_bytes = max_bytes
        self._threads = ThreadPoolExecutor(_FETCHES_AT_ONCE, "fetch-shards")
        self._under_way: dict[str, Future[Path]] = {}
        self._lock = threading.Lock()

    def path(self, shards_dir: StoragePath, entry: ShardEntry) -> Path:
        """The local copy of a shard, fetched if need be. Raises OSError of the store, and ShardError for other bytes
        than the manifest's.
        """
        return self._start(shards_dir, entry).result()

    def fetch_ahead(self, shards_dir: StoragePath, entries: Iterable[ShardEntry]) -> None:
        """Begins to fetch shards that will be asked for; what goes wrong is said by `path`."""
        for entry in entries:
            self._start(shards_dir, entry)

    def drop(self, entry: ShardEntry) -> None:
        """Removes the local copy of a shard: it is fetched again when asked for."""
        (self.folder / f"{entry.sha256}.tar").unlink(missing_ok=True)

    def _start(self, shards_dir: StoragePath, entry: ShardEntry) -> Future[Path]:
        with self._lock:
            future = self._under_way.get(entry.sha256)
            if future is None or (future.done() and (future.exception() or not future.result().exists())):
                future = self._threads.submit(self._fetch, shards_dir, entry)
                self._under_way[entry.sha256] = future
            return future

    def _fetch(self, shards_dir: StoragePath, entry: ShardEntry) -> Path:
        local = self.folder / f"{entry.sha256}.tar"
        # One process fetches, the others on this machine wait for its file.
        with FileLock(self.folder / f".{entry.sha256}.lock"):
            if not local.exists():
                source, _receipt = shard_paths(shards_dir, entry.name)
                partial = partial_of(local)
                try:
                    with source.open("rb") as reader, partial.open("wb") as writer:
                        shutil.copyfileobj(reader, writer, 1 << 20)
                    if (found := sha256_of_file(partial)) != entry.sha256:
                        raise ShardError(
                            f"fetched {source}: SHA-256 {found[:12]}, the manifest says {entry.sha256[:12]}; the shard "
                            "changed. Run prepare again"
                        )
                    partial.replace(local)
                finally:
                    partial.unlink(missing_ok=True)
        os.utime(local)
        self._make_room(local)
        return local

    def _make_room(self, kept: Path) -> None:
        """Removes what was asked for longest ago; a file that is open somewhere can be read to its end."""
        copies: list[tuple[float, int, Path]] = []
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process makes room, too
                copies.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total <= self._max_bytes:
                return
            if path != kept:
                path.unlink(missing_ok=True)
                path.with_name(f".{path.stem}.lock").unlink(missing_ok=True)
                total -= size
