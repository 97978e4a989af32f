"""How many clips make a shard of a wanted size: a sample of clips is stored, and their mean size decides.

The number is pinned in a file beside the shards: a rerun cuts the same shards, and so does a run after further videos
have turned up, from which another sample might give another number. Left out on purpose: where the sample is stored.
"""

import contextlib
import math
import tempfile
from collections import Counter
from collections.abc import Container, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.atomic import write_atomically
from pipeline.clip import ClipRecord
from pipeline.clip_table import ClipTable
from pipeline.config import PrepareConfig
from pipeline.crash_log import MAX_CRASHES, CrashLog
from pipeline.errors import DataError, Reason, VideoError
from pipeline.frame_match import FrameDecoder, FrameFailure
from pipeline.prepare import ClipExtractor, add_clip, build_decoder, shard_settings
from pipeline.shards import ShardWriter, to_json_bytes
from pipeline.storage import StoragePath, storage_path
from pipeline.video import VideoTimeline

SHARD_SIZE_FILE = "shard-size.json"
NUM_SAMPLED = 16
MIB = 2**20


class ShardSize(BaseModel):
    """The number found, and all that led to it. `settings` are those of the shards: where one of them changes, all
    shards are new, and may as well be cut anew. `mean_clip_bytes` is that of `num_measured` clips in a tar.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    clips_per_shard: int = Field(ge=1)
    shard_mib: float
    mean_clip_bytes: float
    num_measured: int
    settings: dict[str, Any]


def sample_rows(ordered: ClipTable, usable_uids: Container[str], num_sampled: int = NUM_SAMPLED) -> list[int]:
    """Rows of up to `num_sampled` clips, evenly spaced over the clips of usable videos of a table in order."""
    ranges: list[np.ndarray] = []
    first = 0
    for video_uid, (num_clips, _) in ordered.clips_by_video().items():
        if video_uid in usable_uids:
            ranges.append(np.arange(first, first + num_clips))
        first += num_clips
    rows = np.concatenate(ranges) if ranges else np.zeros(0, np.int64)
    count = min(num_sampled, len(rows))
    # Midpoints of equal parts.
    return [int(rows[(2 * part + 1) * len(rows) // (2 * count)]) for part in range(count)]


def stored_bytes(
    clip: ClipRecord,
    timeline: VideoTimeline | VideoError,
    config: PrepareConfig,
    crash_log: CrashLog | None = None,
    decoder: FrameDecoder | None = None,
) -> int | FrameFailure:
    """Bytes that a clip takes in a tar, headers and padding included, or why it cannot be stored.

    `decoder` defaults to the one of the settings. With a `crash_log`, a video at which `MAX_CRASHES` processes died is
    not tried again.
    """
    if crash_log is not None and crash_log.num_crashes(clip.video_uid) >= MAX_CRASHES:
        detail = f"the process died {MAX_CRASHES} times while it decoded this video"
        return FrameFailure(Reason.CRASHED_DECODER, detail)
    extractor = ClipExtractor(config, decoder if decoder is not None else build_decoder(config.decoder))
    with crash_log.decoding(clip.video_uid) if crash_log is not None else contextlib.nullcontext():
        ((_, answer),) = extractor.extract(timeline, [clip])
    if isinstance(answer, FrameFailure):
        return answer
    with tempfile.TemporaryDirectory() as folder, ShardWriter(folder, "sample") as writer:
        add_clip(writer, clip, answer)
        return writer.num_bytes


def size_of(measured: Sequence[int | FrameFailure], config: PrepareConfig) -> ShardSize:
    """The size that follows from a sample. Raises DataError when no clip of it could be stored."""
    sizes = [found for found in measured if isinstance(found, int)]
    if not sizes:
        failures = [found for found in measured if isinstance(found, FrameFailure)]
        reasons = ", ".join(
            f"{reason.value} {n}" for reason, n in Counter(f.reason for f in failures).items()
        )
        example = f" ({reasons}), such as: {failures[0].detail}" if failures else ""
        raise DataError(
            f"stored a sample of {len(measured)} clips to find how many make a shard of {config.shard_mib:g} MiB: none "
            f"can be decoded{example}; expected at least one. Mend the videos, or set prepare.clips_per_shard"
        )
    mean = sum(sizes) / len(sizes)
    return ShardSize(
        clips_per_shard=max(1, math.floor(config.shard_mib * MIB / mean)),
        shard_mib=config.shard_mib,
        mean_clip_bytes=mean,
        num_measured=len(sizes),
        settings=shard_settings(config),
    )


def write_shard_size(out_dir: str | StoragePath, size: ShardSize) -> None:
    """Pin the number: write shard-size.json."""
    write_atomically(storage_path(out_dir) / SHARD_SIZE_FILE, to_json_bytes(size.model_dump(mode="json")))


def read_shard_size(out_dir: str | StoragePath, config: PrepareConfig) -> ShardSize | None:
    """What is pinned for these settings; None where nothing is, it cannot be read, or the settings were others."""
    path = storage_path(out_dir) / SHARD_SIZE_FILE
    try:
        size = ShardSize.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    is_same = size.shard_mib == config.shard_mib and size.settings == shard_settings(config)
    return size if is_same else None
