"""Packets of one video file in decoding order, and the account of which of their frames have come out.

A decoder may drop a picture without any error, when its count of pictures is damaged. Such a frame is known by
its packet, so it is named here instead of being answered by its neighbour. Left out on purpose: decoding.
"""

from collections import deque

import av
import av.container
import av.error

# Every packet of these is one frame. Elsewhere (VP8, MPEG-4) some hold a picture that is never shown.
_FRAME_PER_PACKET = frozenset({"h264", "hevc", "vp9", "libdav1d"})


class PacketReader:
    """Reads forwards from where the container stands. Times are presentation times in units of the stream."""

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream, codec: str) -> None:
        self._packets = container.demux(stream)
        self._is_counted = codec in _FRAME_PER_PACKET
        self._ahead: deque[av.Packet | av.error.FFmpegError] = deque()
        self._awaited: set[int] = set()
        self._told_pts = float("-inf")

    def next(self) -> av.Packet | av.error.FFmpegError | None:
        """Next packet (the last one is empty), an error of the file, or None at the end."""
        return self._ahead.popleft() if self._ahead else self._read()

    def expect_frame(self, packet: av.Packet) -> None:
        """From now on the frame of this packet is lost unless it comes out in its turn."""
        pts = _shown_pts(packet)
        if pts is not None and self._is_counted:
            self._awaited.add(pts)

    def forget_frames(self) -> None:
        """No frame is expected any more: their loss is reported already."""
        self._awaited.clear()

    def lost_before(self, pts: float) -> list[int]:
        """Expected frames shown before `pts`, a frame that has come out or infinity at the end; told only once."""
        if not self._is_counted or pts <= self._told_pts:
            return []
        self._read_ahead(pts)
        ahead = [_shown_pts(packet) for packet in self._ahead if isinstance(packet, av.Packet)]
        waiting = self._awaited.union(shown for shown in ahead if shown is not None)
        lost = sorted(shown for shown in waiting if self._told_pts < shown < pts)
        self._awaited = {shown for shown in self._awaited if shown > pts}
        self._told_pts = pts
        return lost

    def _read_ahead(self, pts: float) -> None:
        """Read until no packet shown before `pts` can follow: none is shown before it is decoded."""
        newest = self._ahead[-1] if self._ahead else self._read_into_queue()
        while isinstance(newest, av.Packet) and newest.dts is not None and newest.dts < pts:
            newest = self._read_into_queue()

    def _read_into_queue(self) -> av.Packet | av.error.FFmpegError | None:
        packet = self._read()
        if packet is not None:
            self._ahead.append(packet)
        return packet

    def _read(self) -> av.Packet | av.error.FFmpegError | None:
        try:
            return next(self._packets, None)
        except av.error.EOFError:
            return None
        except av.error.FFmpegError as error:
            return error


def _shown_pts(packet: av.Packet) -> int | None:
    """When the frame of a packet is shown; None where an edit list hides it, and for the empty last packet."""
    return packet.pts if packet.size and not packet.is_discard else None
