"""Frames of a timeline, decoded by DALI on a GPU (NVDEC).

DALI addresses frames by number inside a stream in memory. So the file is demultiplexed by PyAV without
decoding, requests are paired with presentation times exactly as for the CPU decoder, and the stretch from the
keyframe before a wanted frame up to it is copied, not re-encoded, into a small mp4 that DALI decodes.

The GPU path has never been run on a GPU. Its pairing, cutting and numbering are tested on the CPU, and so is
DALI's CPU decoder on VP9, the codec both have. NVDEC reports damage less strictly than PyAV does.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import av
import av.container
import av.error
import numpy as np
from jaxtyping import UInt8
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType

from pipeline.decode import TimelineCursor
from pipeline.errors import Reason
from pipeline.frame_match import DecodedFrame, FrameFailure, FrameRequest, TimedFrame, match_frames
from pipeline.video import Chunk, VideoTimeline, container_zero_s, header_of, open_video


@dataclass(frozen=True, slots=True)
class PacketRow:
    """One packet in decoding order: presentation time in stream units, and whether decoding can start."""

    pts: int
    is_keyframe: bool


@dataclass(frozen=True, slots=True)
class Segment:
    """Packets first .. last (decoding order) to copy, and the number of each wanted frame in what they decode
    to.

    Packets presented before the first one are left out: they need frames before the keyframe (open GOP).
    """

    first: int
    last: int
    floor_pts: int
    frame_numbers: Mapping[int, int]


def plan_segments(packets: Sequence[PacketRow], wanted_pts: Sequence[int]) -> list[Segment]:
    """Cut the stretches that hold the wanted frames: from their keyframe to the last of them, one per
    keyframe.
    """
    place_of = {packet.pts: place for place, packet in enumerate(packets)}
    groups: dict[int, list[int]] = {}
    for pts in sorted(set(wanted_pts)):
        place = place_of[pts]
        while place > 0 and not (packets[place].is_keyframe and packets[place].pts <= pts):
            place -= 1
        groups.setdefault(place, []).append(pts)
    segments: list[Segment] = []
    for first, members in sorted(groups.items()):
        last = max(place_of[pts] for pts in members)
        floor_pts = packets[first].pts
        shown = sorted(packet.pts for packet in packets[first : last + 1] if packet.pts >= floor_pts)
        number_of = {pts: number for number, pts in enumerate(shown)}
        segments.append(Segment(first, last, floor_pts, {pts: number_of[pts] for pts in members}))
    return segments


class PacketCursor:
    """The frames of one file by their packets, in order of presentation, without decoding; `frame` is the
    pts.
    """

    def __init__(self, path: str, video_uid: str, start_s: float, source: int) -> None:
        with open_video(path, video_uid) as container:
            stream = container.streams.video[0]
            self.header = header_of(container)
            time_base = float(stream.time_base or 1 / av.time_base)
            offset_s = start_s - container_zero_s(container)
            rows = sorted((packet.pts or 0, packet.duration or 0) for packet in _video_packets(container))
        frame_s = self.header.frame_s
        self._frames = [
            TimedFrame(offset_s + pts * time_base, duration * time_base or frame_s, source, pts)
            for pts, duration in rows
        ]
        self._place = 0
        self.reached_s = float("-inf")

    def skip_to(self, time_s: float) -> bool:
        """Never jumps: all times are known, walking costs nothing."""
        return False

    def next(self) -> TimedFrame | FrameFailure | None:
        """Next frame by presentation time, None after the last."""
        if self._place >= len(self._frames):
            return None
        frame = self._frames[self._place]
        self._place += 1
        self.reached_s = frame.time_s
        return frame

    def close(self) -> None:
        """Nothing to release: the file was closed after its packets were read."""


def _video_packets(container: av.container.InputContainer) -> Iterator[av.Packet]:
    """Packets of shown frames in decoding order; ends where the file is cut."""
    try:
        for packet in container.demux(container.streams.video[0]):
            if packet.size and packet.is_corrupt:
                return
            if packet.size and packet.pts is not None and not packet.is_discard:
                yield packet
    except av.error.FFmpegError:
        return


def copy_segments(path: str, video_uid: str, segments: Sequence[Segment]) -> Iterator[tuple[Segment, bytes]]:
    """(segment, mp4 bytes) of each segment, copied in one pass over the file."""
    with open_video(path, video_uid) as container:
        template = container.streams.video[0]
        upcoming = sorted(segments, key=lambda segment: segment.first)
        active: list[tuple[Segment, list[av.Packet]]] = []
        for place, packet in enumerate(_video_packets(container)):
            while upcoming and upcoming[0].first == place:
                active.append((upcoming.pop(0), []))
            for segment, copied in list(active):
                if packet.pts is not None and packet.pts >= segment.floor_pts:
                    copied.append(_copy(packet))
                if place == segment.last:
                    active.remove((segment, copied))
                    yield segment, _write_mp4(template, copied)


def _copy(packet: av.Packet) -> av.Packet:
    copied = av.Packet(bytes(packet))
    copied.pts, copied.dts, copied.time_base = packet.pts, packet.dts, packet.time_base
    copied.duration, copied.is_keyframe = packet.duration, packet.is_keyframe
    return copied


def _write_mp4(template: av.VideoStream, packets: Sequence[av.Packet]) -> bytes:
    buffer = io.BytesIO()
    first_dts = packets[0].dts or 0
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream_from_template(template)
        for packet in packets:
            packet.pts = (packet.pts or 0) - first_dts
            packet.dts = (packet.dts or 0) - first_dts
            packet.stream = stream
            container.mux(packet)
    return buffer.getvalue()


class SegmentDecoder(Protocol):
    """Decodes chosen frames of a small video in memory; raises RuntimeError when it cannot."""

    def __call__(self, encoded: bytes, frame_numbers: Sequence[int]) -> UInt8[np.ndarray, "F H W C"]: ...


class DaliSegmentDecoder:
    """`SegmentDecoder` by DALI: `mixed` decodes on the GPU, `cpu` knows VP8, VP9 and MJPEG only."""

    def __init__(self, backend: Literal["mixed", "cpu"] = "mixed") -> None:
        self._pipeline = Pipeline(
            batch_size=1,
            num_threads=1,
            device_id=0 if backend == "mixed" else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        with self._pipeline:
            encoded = fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1)
            frames = fn.external_source(name="frames", dtype=DALIDataType.INT32, ndim=1)
            self._pipeline.set_outputs(fn.decoders.video(encoded, frames=frames, device=backend))
        self._pipeline.build()

    def __call__(self, encoded: bytes, frame_numbers: Sequence[int]) -> UInt8[np.ndarray, "F H W C"]:
        (output,) = self._pipeline.run(
            encoded=[np.frombuffer(encoded, dtype=np.uint8)],
            frames=[np.asarray(frame_numbers, dtype=np.int32)],
        )
        return np.array(output.as_cpu().at(0))


class DaliGpuDecoder:
    """A `FrameDecoder` on NVDEC. Never run on a GPU; `decode_segment` is replaced in tests."""

    name = "dali_gpu"

    def __init__(self, decode_segment: SegmentDecoder | None = None) -> None:
        self._decode_segment = decode_segment if decode_segment is not None else DaliSegmentDecoder()

    def decode_frames(
        self, timeline: VideoTimeline, requests: Sequence[FrameRequest]
    ) -> Iterator[tuple[int, DecodedFrame | FrameFailure]]:
        """See `FrameDecoder`. Reads every touched file twice: once for the times, once for the frames."""
        cursor = TimelineCursor(timeline, PacketCursor)
        chosen: dict[int, dict[int, list[tuple[int, float]]]] = {}
        for position, found in match_frames(cursor, requests):
            if isinstance(found, FrameFailure):
                yield position, found
            else:
                chosen.setdefault(found.source, {}).setdefault(found.frame, []).append(
                    (position, found.time_s)
                )
        for source, wanted in sorted(chosen.items()):
            yield from self._decode_file(timeline.video_uid, timeline.chunks[source], wanted)

    def _decode_file(
        self, video_uid: str, chunk: Chunk, wanted: Mapping[int, Sequence[tuple[int, float]]]
    ) -> Iterator[tuple[int, DecodedFrame | FrameFailure]]:
        with open_video(chunk.path, video_uid) as container:
            packets = [PacketRow(packet.pts or 0, packet.is_keyframe) for packet in _video_packets(container)]
            quarter_turns = _quarter_turns(container)
        for segment, encoded in copy_segments(chunk.path, video_uid, plan_segments(packets, list(wanted))):
            numbers = sorted(segment.frame_numbers.items(), key=lambda item: item[1])
            try:
                images = self._decode_segment(encoded, [number for _pts, number in numbers])
            except RuntimeError as error:
                failure = FrameFailure(Reason.DECODE_ERROR, f"{chunk.path}: DALI: {str(error)[-300:]}")
                for pts, _number in numbers:
                    for position, _time_s in wanted[pts]:
                        yield position, failure
                continue
            for (pts, _number), image in zip(numbers, images, strict=True):
                upright = np.ascontiguousarray(np.rot90(image, quarter_turns))
                for position, time_s in wanted[pts]:
                    yield position, DecodedFrame(time_s, upright)


def _quarter_turns(container: av.container.InputContainer) -> int:
    """Counter-clockwise quarter turns of the display matrix, which DALI does not apply."""
    container.seek(0)
    for frame in container.decode(container.streams.video[0]):
        return round(frame.rotation / 90) % 4
    return 0
