"""Stored clips by row number: the index in memory, frames read from the tars by offset.

Every read is checked against the recorded checksum, so damage is met here and named, not decoded into a
training step. Left out on purpose: which rows make a batch (`order`) and what becomes of the bytes
(`loader`).
"""

import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from types import TracebackType

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64, UInt8

from pipeline.errors import ClipError, Reason, ShardError
from pipeline.manifest import INDEX_FILE, Manifest, read_index, read_manifest, require_whole
from pipeline.order import SceneIndex, build_scene_index
from pipeline.shard_cache import ShardCache
from pipeline.shards import shard_paths
from pipeline.storage import StoragePath, is_url, storage_path

_MAX_OPEN_FILES = 64
DEFAULT_CACHE_GIB = 32.0


class ClipStore:
    """A published shard set. Rows are numbered in shard order; reading is safe from several threads.

    Raises ShardError on opening when the manifest is absent, the index disagrees with it, or a shard is
    missing or has another size. `verify` compares checksums as well. Shards behind a URL are read from local copies
    (`ShardCache`) in `cache_dir`, a temporary folder by default, of at most `cache_gib`.
    """

    def __init__(
        self,
        shards_dir: str | StoragePath,
        cache_dir: str | None = None,
        cache_gib: float = DEFAULT_CACHE_GIB,
    ) -> None:
        self.shards_dir = storage_path(shards_dir)
        self._cache = ShardCache(cache_dir, int(cache_gib * 2**30)) if is_url(self.shards_dir) else None
        self.manifest: Manifest = read_manifest(self.shards_dir)
        require_whole(self.shards_dir, self.manifest, is_full=False)
        table = _read_index(self.shards_dir, self.manifest)
        num_frames = self.manifest.num_frames
        self.num_frames = num_frames
        self.height = table["height"].to_numpy()
        self.width = table["width"].to_numpy()
        self.narration_s = table["narration_s"].to_numpy()
        self._shard = table["shard"].to_numpy()
        self._clip_ids = table["clip_id"].combine_chunks()
        # Only which rows share a video is ever asked.
        self._video_of_row = table["video_uid"].combine_chunks().dictionary_encode().indices.to_numpy()
        self._captions = table["caption"].combine_chunks()
        self._verbs = _ragged(table["verbs"])
        self._nouns = _ragged(table["nouns"])
        self._offsets = _ragged(table["frame_offsets"])[1].reshape(-1, num_frames)
        self._sizes = _ragged(table["frame_sizes"])[1].reshape(-1, num_frames)
        self._crc32 = _ragged(table["frame_crc32"])[1].reshape(-1, num_frames)
        self._files: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> "ClipStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._shard)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Clips per shard, in row order."""
        return tuple(entry.num_clips for entry in self.manifest.shards)

    @property
    def is_remote(self) -> bool:
        """Whether shards are fetched from a store before they are read."""
        return self._cache is not None

    def clip_id(self, row: int) -> str:
        """Id of a clip."""
        return self._clip_ids[int(row)].as_py()

    def caption(self, row: int) -> str:
        """Caption as annotated, tags included."""
        return self._captions[int(row)].as_py()

    def shard_name(self, row: int) -> str:
        """Name of the shard a clip lies in."""
        return self.manifest.shards[int(self._shard[row])].name

    def rows_of(self, clip_ids: Sequence[str]) -> Int64[np.ndarray, " n"]:
        """Row numbers of clips. Raises ShardError naming the first one that is not stored."""
        position = {clip_id: row for row, clip_id in enumerate(self._clip_ids.to_pylist())}
        missing = [clip_id for clip_id in clip_ids if clip_id not in position]
        if missing:
            raise ShardError(
                f"{len(missing)} clips are not in {self.shards_dir}, the first is {missing[0]}; "
                "questions and shards of different prepare runs do not fit together"
            )
        return np.asarray([position[clip_id] for clip_id in clip_ids], dtype=np.int64)

    def verbs_of(self, rows: Sequence[int] | np.ndarray) -> Bool[np.ndarray, "B V"]:
        """Multi-hot verb classes."""
        return _multi_hot(self._verbs, rows, self.manifest.num_verbs)

    def nouns_of(self, rows: Sequence[int] | np.ndarray) -> Bool[np.ndarray, "B U"]:
        """Multi-hot noun classes."""
        return _multi_hot(self._nouns, rows, self.manifest.num_nouns)

    def scene_index(self) -> SceneIndex:
        """Scenes (same video, same minute of the narration) for `order.scene_companions`."""
        return build_scene_index(self._video_of_row, self.narration_s)

    def read_frame(self, row: int, frame: int) -> UInt8[np.ndarray, " bytes"]:
        """JPEG bytes of one stored frame. Raises ClipError (damaged_shard) naming clip, shard and offset."""
        offset, size = int(self._offsets[row, frame]), int(self._sizes[row, frame])
        where = f"frame {frame} in {self.shard_name(row)}.tar at byte {offset}"
        try:
            content = self._read(int(self._shard[row]), offset, size)
            is_whole = zlib.crc32(content) == int(self._crc32[row, frame])
            if not is_whole and self._cache is not None:
                # The copy on this machine may be what is damaged.
                self._drop_copy(int(self._shard[row]))
                content = self._read(int(self._shard[row]), offset, size)
                is_whole = zlib.crc32(content) == int(self._crc32[row, frame])
        except (OSError, ShardError) as error:
            raise ClipError(self.clip_id(row), Reason.DAMAGED_SHARD, f"read {where}: {error}") from error
        if len(content) != size:
            detail = f"read {where}: {len(content)} bytes of {size}, the file is cut. Run prepare again"
            raise ClipError(self.clip_id(row), Reason.DAMAGED_SHARD, detail)
        if not is_whole:
            detail = f"read {where}: checksum differs from the index; the shard changed. Run prepare again"
            raise ClipError(self.clip_id(row), Reason.DAMAGED_SHARD, detail)
        return np.frombuffer(content, dtype=np.uint8)

    def fetch_ahead(self, rows: Int64[np.ndarray, " n"]) -> None:
        """Begins to fetch the shards of rows that will be read from a remote store."""
        assert self._cache is not None
        entries = [self.manifest.shards[shard] for shard in np.unique(self._shard[rows])]
        self._cache.fetch_ahead(self.shards_dir, entries)

    def verify(self) -> None:
        """Compare every byte with the checksums. Raises ShardError listing the files that differ."""
        require_whole(self.shards_dir, self.manifest, is_full=True)

    def close(self) -> None:
        """Close all shard files; they are opened again when needed."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        with self._lock:
            return os.pread(self._file(shard), size, offset)

    def _drop_copy(self, shard: int) -> None:
        """Has the next read fetch a shard of a remote store again."""
        assert self._cache is not None
        with self._lock:
            if shard in self._files:
                os.close(self._files.pop(shard))
            self._cache.drop(self.manifest.shards[shard])

    def _file(self, shard: int) -> int:
        """Descriptor of a shard, at most `_MAX_OPEN_FILES` open. The caller holds the lock."""
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= _MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        entry = self.manifest.shards[shard]
        tar_path, _receipt = shard_paths(self.shards_dir, entry.name)
        path = tar_path if self._cache is None else self._cache.path(self.shards_dir, entry)
        self._files[shard] = os.open(str(path), os.O_RDONLY)
        return self._files[shard]


def _read_index(shards_dir: StoragePath, manifest: Manifest) -> pa.Table:
    path = shards_dir / INDEX_FILE
    try:
        table = read_index(path)
    except (OSError, pa.ArrowException) as error:
        raise ShardError(f"read {path}: {error}; run prepare again: it rewrites the index") from error
    shard = table["shard"].to_numpy()
    expected = np.repeat(np.arange(len(manifest.shards)), [entry.num_clips for entry in manifest.shards])
    if not np.array_equal(shard, expected):
        raise ShardError(
            f"read {path}: {len(shard)} clips, the manifest has {manifest.num_clips}; "
            "index and manifest are of different runs. Run prepare again"
        )
    return table


def _ragged(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """(start of each row and the total, all values) of a list column."""
    chunk = column.combine_chunks()
    offsets = chunk.offsets.to_numpy()
    return offsets - offsets[0], chunk.flatten().to_numpy()


def _multi_hot(
    ragged: tuple[np.ndarray, np.ndarray], rows: Sequence[int] | np.ndarray, width: int
) -> Bool[np.ndarray, "B width"]:
    offsets, values = ragged
    hot = np.zeros((len(rows), width), dtype=np.bool_)
    for position, row in enumerate(rows):
        hot[position, values[offsets[row] : offsets[row + 1]]] = True
    return hot
