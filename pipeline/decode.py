"""Frames of a timeline, decoded on the CPU by PyAV.

One forward pass serves all requests of a video (`frame_match` pairs them); long unneeded stretches are
skipped by seeking to a keyframe. Damage costs the frames up to the next keyframe and is reported, never
painted over. Left out on purpose: resizing, and what becomes of a clip with a failed frame.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import av
import av.container
import av.error
import numpy as np
from jaxtyping import UInt8

from pipeline.errors import Reason, VideoError
from pipeline.frame_match import (
    SAME_TIME_S,
    DecodedFrame,
    FrameFailure,
    FrameRequest,
    TimedFrame,
    match_frames,
)
from pipeline.packets import PacketReader
from pipeline.video import VideoHeader, VideoTimeline, container_zero_s, header_of, open_video

logger = logging.getLogger(__name__)

# Below this distance decoding on is cheaper than a seek.
SEEK_GAP_S = 1.0
# Containers index by decoding time, which runs ahead of presentation time by at most the reorder depth.
_REORDER_FRAMES = 17


class FileCursor:
    """Decodes one file forwards. Times are seconds of the whole video, `start_s` the file's first."""

    def __init__(self, path: str, video_uid: str, start_s: float, source: int) -> None:
        self._path = path
        self._container: av.container.InputContainer = open_video(path, video_uid)
        self._stream = self._container.streams.video[0]
        self.header: VideoHeader = header_of(self._container)
        self._start_s = start_s
        self._source = source
        self._zero_s = container_zero_s(self._container)
        self._time_base = float(self._stream.time_base or 1 / av.time_base)
        context = self._stream.codec_context
        # One thread: many files are decoded side by side, one process each. `explode` reports damaged slices
        # instead of painting over them.
        context.thread_count = 1
        context.options = {"err_detect": "explode"}
        self.reached_s = float("-inf")
        self._start_packets()

    def close(self) -> None:
        """Release the file; the cursor cannot be used afterwards."""
        self._container.close()

    def _start_packets(self) -> None:
        self._packets = PacketReader(self._container, self._stream, self.header.codec)
        self._ready: list[av.VideoFrame] = []
        self._needs_keyframe = True
        self._floor_pts: int | None = None
        # The loss of all frames up to the next keyframe is reported.
        self._is_loss_told = False

    def skip_to(self, time_s: float) -> bool:
        """Seek to the last keyframe that surely precedes `time_s` if that jumps over frames; True if so."""
        here_s = self.reached_s if self.reached_s > float("-inf") else self._start_s
        if time_s - here_s <= SEEK_GAP_S:
            return False
        target_s = time_s - _REORDER_FRAMES * self.header.frame_s
        target = round((target_s - self._start_s + self._zero_s) / self._time_base)
        entries = self._stream.index_entries
        found = entries.search_timestamp(target, backward=True, any_frame=False) if len(entries) else -1
        if found < 0:
            return False
        entry = entries[found]
        if self._time_of(entry.timestamp) <= here_s + SEEK_GAP_S / 2:
            return False
        try:
            self._container.seek(entry.timestamp, stream=self._stream, backward=True, any_frame=False)
        except av.error.FFmpegError as error:
            logger.warning(
                "seek to %.3f s in %s failed (%s); decoding on instead", target_s, self._path, error
            )
            return False
        self._stream.codec_context.flush_buffers()
        self._start_packets()
        return True

    def next(self) -> TimedFrame | FrameFailure | None:
        """Next frame in time, a failure for a stretch up to the next keyframe, None at the end."""
        while True:
            while self._ready:
                frame = self._ready[0]
                if frame.pts is not None and (loss := self._loss_before(frame.pts)):
                    return loss
                self._ready.pop(0)
                if frame.pts is None or (self._floor_pts is not None and frame.pts < self._floor_pts):
                    continue
                time_s = self._time_of(frame.pts)
                if time_s <= self.reached_s:
                    continue
                if frame.is_corrupt:
                    return self._damage(f"the decoder marks the frame at {time_s:.3f} s as corrupt")
                self.reached_s = time_s
                duration_s = (frame.duration or 0) * self._time_base or self.header.frame_s
                return TimedFrame(time_s, duration_s, self._source, frame)
            packet = self._packets.next()
            if packet is None:
                return self._loss_before(float("inf"))
            if isinstance(packet, av.error.FFmpegError):
                return self._damage(str(packet))
            is_skipped = self._is_skipped(packet)
            if not self._is_loss_told:
                self._packets.expect_frame(packet)
            if is_skipped:
                continue
            if packet.is_corrupt:
                return self._damage("a packet is cut short")
            try:
                self._ready.extend(self._stream.codec_context.decode(packet))  # type: ignore[arg-type]
            except av.error.EOFError:
                return self._loss_before(float("inf"))
            except av.error.FFmpegError as error:
                return self._damage(str(error))

    def _is_skipped(self, packet: av.Packet) -> bool:
        """Whether a packet cannot be decoded whole: before a keyframe, or its leading picture (open GOP)."""
        if packet.size == 0:
            return False
        if self._needs_keyframe:
            if not packet.is_keyframe:
                return True
            self._needs_keyframe = self._is_loss_told = False
            self._floor_pts = packet.pts
        return self._floor_pts is not None and packet.pts is not None and packet.pts < self._floor_pts

    def _loss_before(self, pts: float) -> FrameFailure | None:
        """A failure for frames shown before `pts` that the decoder dropped without an error."""
        lost = self._packets.lost_before(pts)
        if not lost:
            return None
        first_s, last_s = self._time_of(lost[0]), self._time_of(lost[-1])
        detail = f"{self._path} is damaged: no picture came of {len(lost)} frames from {first_s:.3f} s"
        return FrameFailure(Reason.DECODE_ERROR, f"{detail} to {last_s:.3f} s")

    def _damage(self, what: str) -> FrameFailure:
        self._stream.codec_context.flush_buffers()
        self._ready.clear()
        self._packets.forget_frames()
        self._needs_keyframe = self._is_loss_told = True
        where = "at its start" if self.reached_s == float("-inf") else f"after {self.reached_s:.3f} s"
        return FrameFailure(Reason.DECODE_ERROR, f"{self._path} is damaged {where}: {what}")

    def _time_of(self, pts: int) -> float:
        return self._start_s + pts * self._time_base - self._zero_s


class OpenFile(Protocol):
    """A forward run over the frames of one file: what `FileCursor` is, and DALI's table of packets."""

    header: VideoHeader
    reached_s: float

    def skip_to(self, time_s: float) -> bool: ...

    def next(self) -> TimedFrame | FrameFailure | None: ...

    def close(self) -> None: ...


class TimelineCursor:
    """A `FrameSource` over the files of a timeline; at most one file is open.

    `open_file(path, video_uid, start_s, source)` opens one of them, `FileCursor` by default.
    """

    def __init__(
        self, timeline: VideoTimeline, open_file: Callable[[str, str, float, int], OpenFile] = FileCursor
    ) -> None:
        self._timeline = timeline
        self._open_file = open_file
        self._position = -1
        self._cursor: OpenFile | None = None
        self._failures: dict[int, FrameFailure] = {}
        self._is_cut_told = False
        self.frame_s = 1 / 30

    def close(self) -> None:
        """Close the open file, if any."""
        if self._cursor is not None:
            self._cursor.close()
            self._cursor = None

    def go_to(self, time_s: float) -> FrameFailure | bool:
        position = self._timeline.position_at(time_s)
        if position is None:
            return self._failure_without_file(time_s)
        if position <= self._position:
            # Already here, or in the next file because a frame at its border was looked at.
            assert self._cursor is not None
            return self._cursor.skip_to(time_s) if position == self._position else False
        failure = self._open(position)
        if failure is not None:
            return failure
        assert self._cursor is not None
        self._cursor.skip_to(time_s)
        return True

    def next(self, limit_s: float) -> TimedFrame | FrameFailure | None:
        chunks = self._timeline.chunks
        while self._cursor is not None:
            following = self._position + 1
            found = self._cursor.next()
            if found is None and self._cursor.header.is_cut_short and not self._is_cut_told:
                self._is_cut_told = True
                path, reached_s = chunks[self._position].path, self._cursor.reached_s
                detail = f"{path} ends after {reached_s:.3f} s, its index lists more frames"
                return FrameFailure(Reason.TRUNCATED_VIDEO, detail)
            # A file that runs past its place in the layout ends where the next one starts.
            is_overhang = (
                isinstance(found, TimedFrame)
                and following < len(chunks)
                and found.time_s >= chunks[following].start_s - SAME_TIME_S
            )
            if found is not None and not is_overhang:
                return found
            if following >= len(chunks) or chunks[following].start_s >= limit_s - SAME_TIME_S:
                return None
            if following in self._failures or self._open(following) is not None:
                return None
        return None

    def failure_past_end(self, time_s: float) -> FrameFailure:
        assert self._cursor is not None
        chunk = self._timeline.chunks[self._position]
        reached_s, claimed_s = self._cursor.reached_s, self._cursor.header.duration_s
        what = f"no frame at {time_s:.3f} s: the last one in {chunk.path} is at {reached_s:.3f} s"
        if claimed_s is not None and time_s < chunk.start_s + claimed_s:
            return FrameFailure(Reason.TRUNCATED_VIDEO, f"{what}, its header claims {claimed_s:.3f} s")
        if self._position + 1 < len(self._timeline.chunks):
            return FrameFailure(Reason.GAP_IN_VIDEO, what)
        return FrameFailure(Reason.OUTSIDE_VIDEO, what)

    def _open(self, position: int) -> FrameFailure | None:
        if position in self._failures:
            return self._failures[position]
        chunk = self._timeline.chunks[position]
        try:
            cursor = self._open_file(chunk.path, self._timeline.video_uid, chunk.start_s, position)
        except VideoError as error:
            self._failures[position] = FrameFailure(error.reason, error.detail)
            return self._failures[position]
        self.close()
        self._cursor, self._position, self.frame_s = cursor, position, cursor.header.frame_s
        self._is_cut_told = False
        return None

    def _failure_without_file(self, time_s: float) -> FrameFailure:
        last = self._timeline.chunks[-1]
        if time_s > last.start_s:
            return FrameFailure(
                Reason.OUTSIDE_VIDEO, f"no frame at {time_s:.3f} s: the last file is {last.path}"
            )
        detail = (
            f"no file holds second {time_s:.3f}; chunks of {self._timeline.chunk_s} s end with {last.path}"
        )
        return FrameFailure(Reason.MISSING_CHUNK, detail)


class PyAvDecoder:
    """Decodes on the CPU: H.264, HEVC, VP9, AV1 and whatever else PyAV's build decodes."""

    name = "pyav"

    def decode_frames(
        self, timeline: VideoTimeline, requests: Sequence[FrameRequest]
    ) -> Iterator[tuple[int, DecodedFrame | FrameFailure]]:
        """See `FrameDecoder`. Holds two undecoded frames and one image at a time."""
        cursor = TimelineCursor(timeline)
        latest: DecodedFrame | None = None
        try:
            for position, found in match_frames(cursor, requests):
                if isinstance(found, FrameFailure):
                    yield position, found
                    continue
                if latest is None or latest.time_s != found.time_s:
                    latest = DecodedFrame(found.time_s, upright_rgb(found.frame))
                yield position, latest
        finally:
            cursor.close()


def upright_rgb(frame: av.VideoFrame) -> UInt8[np.ndarray, "H W C"]:
    """RGB pixels with the display matrix applied: a camera held upright records lying frames."""
    image_HWC = frame.to_ndarray(format="rgb24")
    # The display matrix counts degrees counter-clockwise, and so does rot90.
    quarter_turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(image_HWC, quarter_turns)) if quarter_turns else image_HWC
