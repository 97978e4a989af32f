"""What the files of the videos say of themselves, as a table for a person to look at before anything is decoded.

Header and index of every file are read, no frame is decoded. `videos.parquet` stands beside the shards and decides
nothing about them. Left out on purpose: which videos are needed and where that work runs (`jobs`).
"""

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import av.container
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.atomic import replaced_whole
from pipeline.crash_log import MAX_CRASHES, CrashLog
from pipeline.errors import DataError, Reason, VideoError
from pipeline.mp4_header import Mp4Header, read_mp4_header
from pipeline.storage import StoragePath, open_for_reading, storage_path
from pipeline.video import PROBE_BLOCK_BYTES, Chunk, VideoTimeline, header_of, open_video

VIDEOS_FILE = "videos.parquet"
# Raised when a fact means something else: facts of an earlier version are then read from the videos again.
VIDEOS_FORMAT = 1
_FORMAT_KEY = b"svitt.videos_format"
_ROWS_AT_ONCE = 1 << 14

VIDEOS_SCHEMA = pa.schema(
    [
        ("video_uid", pa.string()),
        ("path", pa.string()),
        ("start_s", pa.float64()),
        ("duration_s", pa.float64()),
        ("codec", pa.string()),
        ("fps", pa.float64()),
        ("is_rate_varying", pa.bool_()),
        ("num_frames", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("rotation", pa.int32()),
        ("is_cut_short", pa.bool_()),
        ("size_bytes", pa.int64()),
        ("digest", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ],
    metadata={_FORMAT_KEY: str(VIDEOS_FORMAT).encode()},
)


@dataclass(frozen=True, slots=True)
class VideoFileFacts:
    """One file of a video, or, with `path` None, a video that has none. What is not known is None.

    `path` lies below the folder of the videos; `start_s` is the file's first second in the whole video. `fps` is the
    mean rate. `num_frames` counts the frames that are shown; with `is_rate_varying` it is known where the container
    lists every frame (mp4 without fragments). `width` and `height` are those before rotation; `rotation` is in degrees
    counter-clockwise, known for mp4. `is_cut_short`: the index lists frames behind the end of the file. A file that
    cannot be used has a reason, and no fact that takes opening it.
    """

    video_uid: str
    path: str | None = None
    start_s: float | None = None
    duration_s: float | None = None
    codec: str | None = None
    fps: float | None = None
    is_rate_varying: bool | None = None
    num_frames: int | None = None
    width: int | None = None
    height: int | None = None
    rotation: int | None = None
    is_cut_short: bool | None = None
    size_bytes: int | None = None
    digest: str | None = None
    reason: Reason | None = None
    detail: str | None = None


def probe_files(
    found: VideoTimeline | VideoError,
    videos_dir: str | StoragePath,
    known: Sequence[VideoFileFacts] = (),
    crash_log: CrashLog | None = None,
) -> tuple[VideoFileFacts, ...]:
    """Facts of all files of a video in order of time, or one row that says why it has none.

    A file of the same path, size and digest as a usable one of `known` is not opened. Nothing is raised for a file
    that cannot be used. With a `crash_log`, a video at which `MAX_CRASHES` processes died is not opened again.
    """
    if isinstance(found, VideoError):
        return (VideoFileFacts(found.video_uid, reason=found.reason, detail=found.detail),)
    # A file with a reason is opened again: another machine or version may be able to read it.
    usable = {(facts.path, facts.size_bytes, facts.digest): facts for facts in known if facts.reason is None}
    files: list[VideoFileFacts] = []
    unknown: list[int] = []
    for position, chunk in enumerate(found.chunks):
        plain = _before_opening(chunk, found.video_uid, videos_dir)
        before = usable.get((plain.path, plain.size_bytes, plain.digest))
        if before is None:
            unknown.append(position)
        files.append(replace(before or plain, video_uid=plain.video_uid, start_s=plain.start_s))
    if unknown and crash_log is not None and crash_log.num_crashes(found.video_uid) >= MAX_CRASHES:
        detail = f"the process died {MAX_CRASHES} times while it opened the files of this video"
        for position in unknown:
            files[position] = replace(files[position], reason=Reason.CRASHED_DECODER, detail=detail)
    elif unknown:
        with crash_log.decoding(found.video_uid) if crash_log is not None else contextlib.nullcontext():
            for position in unknown:
                files[position] = _probed(files[position], found.chunks[position])
    if unknown and crash_log is not None:
        crash_log.remove()
    return tuple(files)


def _before_opening(chunk: Chunk, video_uid: str, videos_dir: str | StoragePath) -> VideoFileFacts:
    """Facts that its timeline has. The path is without its folder: the table does not say where videos once lay."""
    path = chunk.path.removeprefix(f"{str(videos_dir).rstrip('/')}/")
    return VideoFileFacts(video_uid, path, chunk.start_s, size_bytes=chunk.size_bytes, digest=chunk.digest)


def _probed(facts: VideoFileFacts, chunk: Chunk) -> VideoFileFacts:
    path = storage_path(chunk.path)
    try:
        with open_video(path, facts.video_uid, PROBE_BLOCK_BYTES) as container:
            with open_for_reading(path, PROBE_BLOCK_BYTES) as file:
                mp4 = read_mp4_header(file, chunk.size_bytes)
            return _with_header(facts, container, mp4)
    except VideoError as error:
        return replace(facts, reason=error.reason, detail=error.detail)


def _with_header(
    facts: VideoFileFacts, container: av.container.InputContainer, mp4: Mp4Header | None
) -> VideoFileFacts:
    header = header_of(container)
    stream = container.streams.video[0]
    rate = stream.average_rate or stream.guessed_rate
    # Other containers list keyframes only, and fragments are listed as far as they have been read.
    lists_all = mp4 is not None and not mp4.is_fragmented
    entries = [entry for entry in stream.index_entries if not entry.is_discard] if lists_all else []
    return replace(
        facts,
        duration_s=header.duration_s,
        codec=header.codec,
        fps=float(rate) if rate else None,
        is_rate_varying=is_rate_varying([entry.timestamp for entry in entries]) if lists_all else None,
        num_frames=len(entries) if lists_all else None,
        width=header.width,
        height=header.height,
        rotation=mp4.rotations.get(stream.id) if mp4 is not None else None,
        is_cut_short=header.is_cut_short,
    )


def is_rate_varying(timestamps: Sequence[int]) -> bool:
    """Whether some interval between frames differs from the median one by more than a tenth of it, and by more than a
    tick, which is what rounding to the clock of the file takes.
    """
    intervals = np.diff(np.asarray(timestamps, np.int64))
    if not len(intervals):
        return False
    usual = float(np.median(intervals))
    return bool((np.abs(intervals - usual) > max(1.0, usual / 10)).any())


def write_videos(out_dir: str | StoragePath, files: Iterable[VideoFileFacts]) -> None:
    """Write videos.parquet, one row a file in the order given."""
    path = storage_path(out_dir) / VIDEOS_FILE
    rows = iter(files)
    with (
        replaced_whole(path) as partial,
        pq.ParquetWriter(partial, VIDEOS_SCHEMA, compression="zstd") as writer,
    ):
        while group := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            columns = {name: [getattr(facts, name) for facts in group] for name in VIDEOS_SCHEMA.names}
            writer.write_table(pa.Table.from_pydict(columns, schema=VIDEOS_SCHEMA))


def read_videos(out_dir: str | StoragePath) -> list[VideoFileFacts]:
    """Read videos.parquet. Raises DataError when it is absent, damaged, or of another format version."""
    path = storage_path(out_dir) / VIDEOS_FILE
    try:
        with path.open("rb") as file:
            table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"read {path}: {error}; expected the table that prepare writes: run it") from error
    found = (table.schema.metadata or {}).get(_FORMAT_KEY, b"none").decode()
    if found != str(VIDEOS_FORMAT) or not table.schema.equals(VIDEOS_SCHEMA):
        raise DataError(f"read {path}: format {found}, expected {VIDEOS_FORMAT}; run prepare again")
    return [
        VideoFileFacts(**{**row, "reason": Reason(row["reason"]) if row["reason"] else None})
        for batch in table.to_batches(_ROWS_AT_ONCE)
        for row in batch.to_pylist()
    ]
