"""Which frame answers which request: nearest in presentation time, in one forward pass.

A request asks for the frame nearest in time to `time_s` among those presented before `end_s`. Frames are
addressed by their timestamps, never by an assumed frame rate. A frame that cannot be had is answered by a
failure with a reason, never by another frame. Left out on purpose: how frames are decoded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from pipeline.errors import Reason
from pipeline.video import VideoTimeline

# Two times closer than this are the same instant written in different clocks.
SAME_TIME_S = 1e-6


@dataclass(frozen=True, slots=True)
class FrameRequest:
    """One wanted frame: its time and the (exclusive) end of its clip, in seconds of the whole video."""

    time_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class DecodedFrame:
    """One frame, upright, with its presentation time in seconds of the whole video."""

    time_s: float
    image: UInt8[np.ndarray, "H W C"]


@dataclass(frozen=True, slots=True)
class FrameFailure:
    """Why a requested frame cannot be had."""

    reason: Reason
    detail: str


class FrameDecoder(Protocol):
    """Anything that answers frame requests; `name` stands in the shards' content key."""

    @property
    def name(self) -> str: ...

    def decode_frames(
        self, timeline: VideoTimeline, requests: Sequence[FrameRequest]
    ) -> Iterator[tuple[int, DecodedFrame | FrameFailure]]:
        """Yields (position in `requests`, answer) exactly once per request, in order of time."""
        ...


@dataclass(frozen=True, slots=True)
class TimedFrame:
    """A frame in the decoder's own form. `source` is the position of its file in the timeline."""

    time_s: float
    duration_s: float
    source: int
    frame: Any


class FrameSource(Protocol):
    """A forward-only run over the frames of a timeline; what `match_frames` walks along."""

    frame_s: float

    def go_to(self, time_s: float) -> FrameFailure | bool:
        """Move close before `time_s`; True when frames were jumped over, a failure when no file holds it."""
        ...

    def next(self, limit_s: float) -> TimedFrame | FrameFailure | None:
        """Next frame, a failure for a damaged stretch, None when only files from `limit_s` on are left."""
        ...

    def failure_past_end(self, time_s: float) -> FrameFailure:
        """Why there is no frame at `time_s` after the last one."""
        ...


def match_frames(
    source: FrameSource, requests: Sequence[FrameRequest]
) -> Iterator[tuple[int, TimedFrame | FrameFailure]]:
    """Pair every request with its nearest frame in one forward pass over the source.

    `before` and `after` are the frames around the requested time. The earlier one wins a tie; `after` is not
    taken when it lies at or past the end of the clip, unless there is nothing else.
    """
    before: TimedFrame | None = None
    after: TimedFrame | None = None
    damage: FrameFailure | None = None
    for position in sorted(range(len(requests)), key=lambda i: (requests[i].time_s, requests[i].end_s)):
        request = requests[position]
        moved = source.go_to(request.time_s)
        if isinstance(moved, FrameFailure):
            yield position, moved
            continue
        if moved:
            before, after, damage = None, None, None
        while after is None or after.time_s < request.time_s:
            found = source.next(request.end_s)
            if found is None:
                break
            if isinstance(found, FrameFailure):
                before, after, damage = after or before, None, found
                continue
            if after is not None:
                before, damage = after, None
            after = found
        if after is not None and after.time_s < request.time_s:
            yield position, _choose(source, request, after, None, None)
        else:
            yield position, _choose(source, request, before, after, damage)


def _choose(
    source: FrameSource,
    request: FrameRequest,
    before: TimedFrame | None,
    after: TimedFrame | None,
    damage: FrameFailure | None,
) -> TimedFrame | FrameFailure:
    time_s, frame_s = request.time_s, source.frame_s
    if before is None and after is None:
        return damage or source.failure_past_end(time_s)
    if before is None or after is None:
        chosen = before or after
    else:
        is_after_nearer = after.time_s - time_s < time_s - before.time_s - SAME_TIME_S
        chosen = after if is_after_nearer and after.time_s < request.end_s - SAME_TIME_S else before
    assert chosen is not None
    distance_s = abs(chosen.time_s - time_s)
    if damage is not None:
        return chosen if distance_s <= frame_s / 2 + SAME_TIME_S else damage
    if before is not None and after is not None and before.source == after.source:
        return chosen
    # At the edge of a file: on screen still (plus half a frame), or about to come within one frame.
    if before is not None and time_s < before.time_s + before.duration_s + frame_s / 2 + SAME_TIME_S:
        return chosen
    if after is not None and after.time_s - time_s <= frame_s + SAME_TIME_S:
        return after
    if after is None:
        return source.failure_past_end(time_s)
    start = "its file starts" if before is None else f"the frame before is at {before.time_s:.3f} s, the next"
    return FrameFailure(Reason.GAP_IN_VIDEO, f"no frame at {time_s:.3f} s: {start} at {after.time_s:.3f} s")
