"""Video files as one timeline per video, whatever the layout on disk.

Everything after this module sees seconds of the whole video. Left out on purpose: where files lie (`layout`), decoding.

Time zero of a file is the start of the container (where a player starts its clock); chunk k of a layout with
chunks of c seconds starts at k * c. Intervals are half-open: second 600.0 belongs to the second chunk.
"""

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import av
import av.container
import av.error

from pipeline.config import VideoLayout
from pipeline.errors import Reason, VideoError
from pipeline.layout import layout_of, locate_files
from pipeline.storage import StoragePath, open_for_reading, storage_path

# Header caps: larger values are broken or hostile files, not egocentric recordings.
MAX_PIXELS = 8192 * 4320
MAX_DURATION_S = 48 * 3600.0
MAX_STREAMS = 32

# How much of a file in a store is fetched at once, at least, by those who want its header and index only.
PROBE_BLOCK_BYTES = 1 << 20
_IDENTITY_BYTES = 64 * 1024
# Demuxers of the containers we accept. Together with protocol_whitelist this stops playlists that fetch URLs.
_OPEN_OPTIONS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm", "protocol_whitelist": "file"}


@dataclass(frozen=True, slots=True)
class Chunk:
    """One file of a timeline: path, first second in the whole video, bytes, identity (digest of the file)."""

    path: str
    start_s: float
    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class VideoTimeline:
    """One video over all its files. `chunk_s` is None for a single file; chunks are in time order."""

    video_uid: str
    chunk_s: float | None
    chunks: tuple[Chunk, ...]

    def position_at(self, time_s: float) -> int | None:
        """Position in `chunks` of the file that holds `time_s`, or None where no file covers it by name."""
        if self.chunk_s is None:
            return 0
        position = bisect_right(self.chunks, time_s, key=lambda chunk: chunk.start_s) - 1
        if position < 0 or time_s >= self.chunks[position].start_s + self.chunk_s:
            return None
        return position

    def chunks_for(self, start_s: float, end_s: float) -> tuple[Chunk, ...]:
        """Files that [start_s, end_s) touches; a span ending at a border does not touch the next file."""
        if self.chunk_s is None:
            return self.chunks
        chunk_s = self.chunk_s
        return tuple(c for c in self.chunks if c.start_s < end_s and c.start_s + chunk_s > start_s)


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """What the header of one file says. `duration_s` is the end of the last frame, None when not written.

    `is_cut_short`: the last frame listed lies behind the end of the file.
    """

    codec: str
    height: int
    width: int
    duration_s: float | None
    frame_s: float
    is_cut_short: bool


def resolve_timeline(
    videos_dir: str | StoragePath, video_uid: str, layout: str | VideoLayout
) -> VideoTimeline:
    """Find the files of one video. Opens no decoder; reads the first and last 64 KiB for the identity.

    Raises VideoError with the reason, as `locate_files`, and for an empty file.
    """
    files = locate_files(videos_dir, video_uid, layout)
    chunks = tuple(_chunk(file.path, file.start_s, video_uid) for file in files)
    return VideoTimeline(video_uid, layout_of(layout).chunk_s, chunks)


def _chunk(path: StoragePath, start_s: float, video_uid: str) -> Chunk:
    size_bytes = path.stat().st_size
    if size_bytes == 0:
        raise VideoError(video_uid, Reason.EMPTY_VIDEO, f"{path} has 0 bytes")
    return Chunk(str(path), start_s, size_bytes, file_identity(path))


def file_identity(path: str | StoragePath) -> str:
    """Digest of size, first and last 64 KiB: notices a replaced file without reading terabytes."""
    path = storage_path(path)
    size_bytes = path.stat().st_size
    digest = hashlib.sha256(str(size_bytes).encode())
    with open_for_reading(path, _IDENTITY_BYTES) as file:
        digest.update(file.read(_IDENTITY_BYTES))
        file.seek(max(_IDENTITY_BYTES, size_bytes - _IDENTITY_BYTES))
        digest.update(file.read(_IDENTITY_BYTES))
    return digest.hexdigest()


def open_video(
    path: str | StoragePath, video_uid: str, block_bytes: int | None = None
) -> av.container.InputContainer:
    """Open one file with whitelisted demuxers, which open no further file, and hold its header against the caps.

    A file of a store is fetched at least `block_bytes` at a time, None for what suits reading it whole.
    Raises VideoError: missing, empty, not a video, truncated, no video stream, unsupported codec, over a cap.
    """
    path = storage_path(path)
    if not path.is_file():
        raise VideoError(video_uid, Reason.MISSING_VIDEO, f"no file {path}")
    if path.stat().st_size == 0:
        raise VideoError(video_uid, Reason.EMPTY_VIDEO, f"{path} has 0 bytes")
    try:
        # A file of a store is read in pieces, as far as decoding goes. What the network does wrong stays an OSError and
        # is not taken for damage of the video.
        source = str(path) if isinstance(path, Path) else open_for_reading(path, block_bytes)
        container = av.open(source, mode="r", options=dict(_OPEN_OPTIONS))
    except (av.error.FFmpegError, ValueError, UnicodeError) as error:
        raise VideoError(video_uid, *_why_not_opened(path, error)) from error
    try:
        _check_header(container, path, video_uid)
    except VideoError:
        container.close()
        raise
    return container


def _why_not_opened(path: StoragePath, error: Exception) -> tuple[Reason, str]:
    # The whole text of FFmpeg's errors repeats the path behind an opaque number.
    what = error.strerror if isinstance(error, av.error.FFmpegError) else error
    with path.open("rb") as file:
        head = file.read(16)
    is_mp4 = head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
    is_matroska = head[:4] == b"\x1a\x45\xdf\xa3"
    if is_mp4 or is_matroska:
        kind = "mp4" if is_mp4 else "matroska"
        return Reason.TRUNCATED_VIDEO, f"{path} begins as {kind} but its index cannot be read: {what}"
    return Reason.NOT_A_VIDEO, f"{path} begins with {head[:8]!r}: neither mp4 nor matroska: {what}"


def _check_header(container: av.container.InputContainer, path: StoragePath, video_uid: str) -> None:
    if len(container.streams) > MAX_STREAMS:
        detail = f"{path} has {len(container.streams)} streams; at most {MAX_STREAMS} are accepted"
        raise VideoError(video_uid, Reason.OVER_LIMIT, detail)
    if not container.streams.video:
        kinds = sorted({stream.type for stream in container.streams})
        raise VideoError(video_uid, Reason.NO_VIDEO_STREAM, f"{path} holds {kinds or 'no streams'}")
    stream = container.streams.video[0]
    try:
        context = stream.codec_context
        width, height, name = context.width, context.height, context.name
    except (AttributeError, av.error.FFmpegError) as error:
        detail = f"{path}: no decoder for this codec in PyAV {av.__version__}"
        raise VideoError(video_uid, Reason.UNSUPPORTED_CODEC, detail) from error
    if width < 1 or height < 1:
        detail = f"{path}: the header of the {name} stream gives no frame size"
        raise VideoError(video_uid, Reason.TRUNCATED_VIDEO, detail)
    if width * height > MAX_PIXELS:
        detail = f"{path} has frames of {width} x {height}; at most {MAX_PIXELS} pixels are accepted"
        raise VideoError(video_uid, Reason.OVER_LIMIT, detail)
    duration_s = (container.duration or 0) / av.time_base
    if duration_s > MAX_DURATION_S:
        detail = f"{path} claims {duration_s:.0f} s; at most {MAX_DURATION_S:.0f} s are accepted"
        raise VideoError(video_uid, Reason.OVER_LIMIT, detail)


def container_zero_s(container: av.container.InputContainer) -> float:
    """Presentation time, in the file's own clock, at which a player's clock shows zero."""
    if container.start_time is not None:
        return container.start_time / av.time_base
    stream = container.streams.video[0]
    if stream.start_time is None or stream.time_base is None:
        return 0.0
    return float(stream.start_time * stream.time_base)


def header_of(container: av.container.InputContainer) -> VideoHeader:
    """Codec, frame size before rotation, duration and mean frame period of an open file."""
    stream = container.streams.video[0]
    context = stream.codec_context
    rate = stream.average_rate or stream.guessed_rate
    frame_s = float(1 / rate) if rate else 1 / 30
    duration_s = None
    if stream.duration is not None and stream.time_base is not None:
        start = stream.start_time or 0
        duration_s = float((start + stream.duration) * stream.time_base) - container_zero_s(container)
    elif container.duration is not None:
        duration_s = container.duration / av.time_base
    # MP4 lists every frame. Matroska lists keyframes without their sizes.
    entries = stream.index_entries
    last = entries[len(entries) - 1] if len(entries) else None
    is_cut_short = last is not None and last.pos + last.size > container.size
    return VideoHeader(context.name, context.height, context.width, duration_s, frame_s, is_cut_short)


def probe(path: str | StoragePath, video_uid: str) -> VideoHeader:
    """Read the header of one file. Raises VideoError as `open_video`."""
    with open_video(path, video_uid, PROBE_BLOCK_BYTES) as container:
        return header_of(container)


def midpoint_times(start_s: float, end_s: float, num_frames: int) -> list[float]:
    """Midpoints of `num_frames` equal segments of [start_s, end_s), in seconds."""
    step_s = (end_s - start_s) / num_frames
    return [start_s + (position + 0.5) * step_s for position in range(num_frames)]
