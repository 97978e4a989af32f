"""How many clips go into a shard: as the recipe says, as an earlier run has found, or measured on a sample."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from jobs.prepare_work import SetWork
from pipeline.clip import ClipRecord
from pipeline.clip_table import ClipTable
from pipeline.crash_log import CrashLog
from pipeline.errors import DataError, VideoError
from pipeline.frame_match import FrameFailure
from pipeline.shard_size import (
    ShardSize,
    read_shard_size,
    sample_rows,
    size_of,
    stored_bytes,
    write_shard_size,
)
from pipeline.video import VideoTimeline


@dataclass(frozen=True, slots=True, repr=False)
class _SampleClip:
    row: int
    clip: ClipRecord
    timeline: VideoTimeline | VideoError

    def __repr__(self) -> str:
        return f"clip {self.clip.clip_id}"


def find_clips_per_shard(
    work: SetWork, ordered: ClipTable, timelines: Mapping[str, VideoTimeline | VideoError]
) -> int:
    """The number for a set whose clips stand in order. What is measured is pinned beside the shards.

    Raises DataError when a sample is needed and no clip of it can be decoded.
    """
    if work.config.clips_per_shard is not None:
        return work.config.clips_per_shard
    size = read_shard_size(work.out_dir, work.config)
    if size is None:
        size = _measure(work, ordered, timelines)
        write_shard_size(work.out_dir, size)
        work.progress.say(
            f"{work.name}: a clip takes {size.mean_clip_bytes / 1024:.1f} KiB (mean of {size.num_measured}): "
            f"{size.clips_per_shard} clips for a shard of {size.shard_mib:g} MiB"
        )
    return size.clips_per_shard


def _measure(
    work: SetWork, ordered: ClipTable, timelines: Mapping[str, VideoTimeline | VideoError]
) -> ShardSize:
    # A plain function, no partial: Ray makes tasks of nothing else.
    def store(sample: _SampleClip) -> int | FrameFailure:
        crash_log = CrashLog(out_dir, f"sample-{sample.row}", run_key)
        found = stored_bytes(sample.clip, sample.timeline, config, crash_log)
        crash_log.remove()
        return found

    out_dir, config, run_key = work.out_dir, work.config, uuid.uuid4().hex[:8]
    usable = {video_uid for video_uid, found in timelines.items() if not isinstance(found, VideoError)}
    # Where no video is there at all, the sample says why.
    rows = sample_rows(ordered, usable or timelines)
    clips = [ordered[row] for row in rows]
    sample = [
        _SampleClip(row, clip, timelines[clip.video_uid]) for row, clip in zip(rows, clips, strict=True)
    ]
    measured: list[int | FrameFailure] = []
    with work.progress.task(f"{work.name}: storing a sample", len(sample)) as task:
        for found in work.mapper(store, sample):
            measured.append(found)
            task.advance()
    try:
        return size_of(measured, config)
    except DataError as error:
        raise DataError(f"{work.name}: {error}") from error
