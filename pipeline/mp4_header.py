"""What FFmpeg reads of an mp4 file and PyAV does not hand on before a frame is decoded: the rotation of its tracks, and
whether frames lie in fragments, so that the index of an open file does not list all of them.

Walks the boxes of ISO/IEC 14496-12 down to the track headers and reads nothing else.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, NamedTuple

# More boxes than that beside each other are no file of a camera.
MAX_BOXES = 4096
# A box of its own for each version, because times take 4 bytes or 8.
_TRACK_ID_AT = {0: 12, 1: 20}
_TRACK_MATRIX_AT = {0: 40, 1: 52}
_MOVIE_MATRIX_AT = {0: 36, 1: 48}
_UNTURNED = (1.0, 0.0, 0.0, 1.0)

# Upper left of a transformation matrix, row by row.
Matrix = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Mp4Header:
    """`rotations`: track id -> degrees counter-clockwise, 0 to 359, by which its pictures are turned to be shown."""

    rotations: Mapping[int, int]
    is_fragmented: bool


class _Box(NamedTuple):
    """Kind of a box, and where its content begins and ends in the file."""

    kind: bytes
    start: int
    end: int


def read_mp4_header(file: IO[bytes], size_bytes: int) -> Mp4Header | None:
    """Reads an open file of `size_bytes`. None where it holds no movie header, as files of other containers do."""
    movie = _first(file, _Box(b"", 0, size_bytes), b"moov")
    if movie is None:
        return None
    rotations: dict[int, int] = {}
    turned = _UNTURNED
    is_fragmented = False
    for box in _boxes(file, movie):
        try:
            if box.kind == b"mvhd":
                turned = _matrix(_read(file, box), _MOVIE_MATRIX_AT)
            elif box.kind == b"trak" and (track := _first(file, box, b"tkhd")) is not None:
                content = _read(file, track)
                (track_id,) = struct.unpack_from(">I", content, _TRACK_ID_AT[content[0]])
                rotations[track_id] = _degrees(_product(_matrix(content, _TRACK_MATRIX_AT), turned))
        except (struct.error, IndexError, KeyError):
            # Cut short, or of a version that is not known.
            continue
        is_fragmented = is_fragmented or box.kind == b"mvex"
    return Mp4Header(rotations, is_fragmented)


def _boxes(file: IO[bytes], inside: _Box) -> Iterator[_Box]:
    start = inside.start
    for _ in range(MAX_BOXES):
        file.seek(start)
        head = file.read(16)
        if len(head) < 8 or start + 8 > inside.end:
            return
        size, kind = struct.unpack_from(">I4s", head)
        header_size = 8
        if size == 1 and len(head) == 16:
            header_size = 16
            (size,) = struct.unpack_from(">Q", head, 8)
        elif size == 0:
            size = inside.end - start
        if size < header_size:
            return
        yield _Box(kind, start + header_size, min(start + size, inside.end))
        start += size


def _first(file: IO[bytes], inside: _Box, kind: bytes) -> _Box | None:
    return next((box for box in _boxes(file, inside) if box.kind == kind), None)


def _read(file: IO[bytes], box: _Box) -> bytes:
    file.seek(box.start)
    # No header is longer than this, whatever its box claims.
    return file.read(min(box.end - box.start, 256))


def _matrix(content: bytes, at: Mapping[int, int]) -> Matrix:
    a, b, _, c, d = struct.unpack_from(">5i", content, at[content[0]])
    return a / 65536, b / 65536, c / 65536, d / 65536


def _product(left: Matrix, right: Matrix) -> Matrix:
    (a, b, c, d), (e, f, g, h) = left, right
    return a * e + b * g, a * f + b * h, c * e + d * g, c * f + d * h


def _degrees(matrix: Matrix) -> int:
    """As FFmpeg's av_display_rotation_get: scaling is taken out before the angle is read."""
    a, b, c, d = matrix
    across, down = math.hypot(a, c), math.hypot(b, d)
    if not across or not down:
        return 0
    return round(-math.degrees(math.atan2(b / down, a / across))) % 360
