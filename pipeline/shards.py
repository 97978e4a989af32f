"""One shard: a plain WebDataset tar with the same bytes on every run, and its receipt.

Members of a clip: `<clip_id>.00.jpg` ... and `<clip_id>.json`. A shard is written beside its name, synced,
hashed and renamed, its receipt after it: a shard without a matching receipt does not exist. Left out on
purpose: which clips go into which shard (`prepare`), and the set of shards (`manifest`).
"""

import hashlib
import itertools
import json
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.atomic import partial_of, publish, write_atomically
from pipeline.clip import ClipRecord
from pipeline.errors import Reason, ShardError
from pipeline.storage import StoragePath, make_folder, storage_path

SHARD_FORMAT = 2
_BLOCK_BYTES = 512
_HASH_CHUNK_BYTES = 1 << 20


class StoredClip(BaseModel):
    """One row of the index: the clip and where its frames lie, as bytes from the start of the tar."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clip_id: str
    video_uid: str
    start_s: float
    end_s: float
    narration_s: float
    caption: str
    verbs: tuple[int, ...]
    nouns: tuple[int, ...]
    height: int
    width: int
    repeated_frames: int
    frame_offsets: tuple[int, ...]
    frame_sizes: tuple[int, ...]
    frame_crc32: tuple[int, ...]


class RejectedClip(BaseModel):
    """A clip that is not stored, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clip_id: str
    video_uid: str
    start_s: float
    end_s: float
    reason: Reason
    detail: str


class ShardSummary(BaseModel):
    """What is kept in memory of every shard of a set: a receipt without its clips."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: str
    bytes: int
    num_clips: int
    repeated_frames: int
    clips_with_repeated_frames: int
    rejected: tuple[RejectedClip, ...]


class ShardReceipt(BaseModel):
    """What a shard holds. `bytes` and `sha256` are those of the tar; empty when all clips were rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = SHARD_FORMAT
    name: str
    content_key: str
    sha256: str
    bytes: int
    clips: tuple[StoredClip, ...]
    rejected: tuple[RejectedClip, ...]

    @property
    def num_clips(self) -> int:
        return len(self.clips)

    @property
    def repeated_frames(self) -> int:
        """Stored frames equal to the one before, because the video has no other frame in that time."""
        return sum(clip.repeated_frames for clip in self.clips)

    @property
    def summary(self) -> ShardSummary:
        """The receipt without its clips."""
        return ShardSummary(
            name=self.name,
            sha256=self.sha256,
            bytes=self.bytes,
            num_clips=self.num_clips,
            repeated_frames=self.repeated_frames,
            clips_with_repeated_frames=sum(clip.repeated_frames > 0 for clip in self.clips),
            rejected=self.rejected,
        )


class ShardWriter:
    """Writes one shard. Use as a context manager; leaving it without `finish` leaves nothing behind."""

    def __init__(self, out_dir: str | StoragePath, name: str) -> None:
        self.name = name
        self._out_dir = storage_path(out_dir)
        make_folder(self._out_dir)
        self._partial: Path = partial_of(shard_paths(self._out_dir, name)[0])
        self._file = self._partial.open("wb")
        self._hash = hashlib.sha256()
        self._position = 0
        self._clips: list[StoredClip] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)

    @property
    def num_bytes(self) -> int:
        """Bytes written so far, headers and padding of the members included."""
        return self._position

    def add(
        self,
        record: ClipRecord,
        frames: Sequence[bytes],
        frame_times_s: Sequence[float],
        height: int,
        width: int,
    ) -> None:
        """Append a clip: JPEG bytes and presentation times of its frames, all of one size."""
        repeated = sum(a == b for a, b in itertools.pairwise(frame_times_s))
        offsets = [
            self._add_member(f"{record.clip_id}.{position:02d}.jpg", frame)
            for position, frame in enumerate(frames)
        ]
        facts: dict[str, Any] = {
            "video_uid": record.video_uid,
            "start_s": record.start_s,
            "end_s": record.end_s,
            "narration_s": record.narration_s,
            "caption": record.caption,
            "verbs": record.verbs,
            "nouns": record.nouns,
        }
        member = {**facts, "frame_times_s": [round(time_s, 6) for time_s in frame_times_s]}
        self._add_member(f"{record.clip_id}.json", to_json_bytes(member))
        self._clips.append(
            StoredClip(
                clip_id=record.clip_id,
                **facts,
                height=height,
                width=width,
                repeated_frames=repeated,
                frame_offsets=tuple(offsets),
                frame_sizes=tuple(len(frame) for frame in frames),
                frame_crc32=tuple(zlib.crc32(frame) for frame in frames),
            )
        )

    def finish(self, content_key: str, rejected: Sequence[RejectedClip]) -> ShardReceipt:
        """Publish the shard and then its receipt. A shard without clips has a receipt and no tar."""
        tar_path, receipt_path = shard_paths(self._out_dir, self.name)
        if self._clips:
            end_bytes = 2 * _BLOCK_BYTES
            padding = -(self._position + end_bytes) % tarfile.RECORDSIZE
            self._write(bytes(end_bytes + padding))
            self._file.close()
            publish(self._partial, tar_path)
        else:
            tar_path.unlink(missing_ok=True)
        receipt = ShardReceipt(
            name=self.name,
            content_key=content_key,
            sha256=self._hash.hexdigest() if self._clips else "",
            bytes=self._position if self._clips else 0,
            clips=tuple(self._clips),
            rejected=tuple(rejected),
        )
        write_atomically(receipt_path, to_json_bytes(receipt.model_dump(mode="json")))
        return receipt

    def _add_member(self, name: str, content: bytes) -> int:
        """Append one file; returns the offset of its content. No times, no owners: repeatable bytes."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), 0o644
        self._write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict"))
        offset = self._position
        self._write(content)
        self._write(bytes(-len(content) % _BLOCK_BYTES))
        return offset

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._position += len(content)


def shard_paths(out_dir: str | StoragePath, name: str) -> tuple[StoragePath, StoragePath]:
    """(tar, receipt) of a shard."""
    folder = storage_path(out_dir)
    return folder / f"{name}.tar", folder / f"{name}.json"


def read_receipt(path: str | StoragePath) -> ShardReceipt:
    """Read a receipt. Raises ShardError when it is absent, damaged, or of another format version."""
    try:
        return ShardReceipt.model_validate_json(storage_path(path).read_bytes())
    except OSError as error:
        raise ShardError(f"read the receipt {path}: {error.strerror}; run prepare again") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ShardError(
            f"read the receipt {path}: {first['msg']} at {first['loc']}; expected format {SHARD_FORMAT}. "
            "Run prepare again: it rebuilds this shard"
        ) from error


def find_intact(out_dir: str | StoragePath, name: str, content_key: str) -> ShardReceipt | None:
    """The receipt of a finished shard with this content key and an undamaged tar, else None."""
    tar_path, receipt_path = shard_paths(out_dir, name)
    try:
        receipt = read_receipt(receipt_path)
    except ShardError:
        return None
    if receipt.content_key != content_key or receipt.format != SHARD_FORMAT:
        return None
    if not receipt.clips:
        return receipt
    is_intact = (
        tar_path.is_file()
        and tar_path.stat().st_size == receipt.bytes
        and sha256_of_file(tar_path) == receipt.sha256
    )
    return receipt if is_intact else None


def sha256_of_file(path: str | StoragePath) -> str:
    """Hexadecimal SHA-256 of a whole file."""
    digest = hashlib.sha256()
    with storage_path(path).open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def to_json_bytes(value: Any) -> bytes:
    """Compact JSON with sorted keys and a final newline: equal values give equal bytes."""
    return (json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n").encode()
