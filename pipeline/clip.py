"""One clip: a caption, where it lies in its video, and an id that is the same on every machine."""

import re
import zlib
from dataclasses import dataclass

# No recording is longer; milliseconds of it fit into 64 bits.
MAX_TIME_S = 1e9
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """One clip with its caption. Times are seconds in the whole video; verbs and nouns are class ids."""

    clip_id: str
    video_uid: str
    start_s: float
    end_s: float
    narration_s: float
    caption: str
    verbs: tuple[int, ...] = ()
    nouns: tuple[int, ...] = ()


def make_record(
    video_uid: str,
    start_s: float,
    end_s: float,
    narration_s: float,
    caption: str,
    verbs: tuple[int, ...],
    nouns: tuple[int, ...],
) -> ClipRecord:
    """Builds a record with its id."""
    clip_id = make_clip_id(video_uid, start_s, end_s, caption)
    return ClipRecord(clip_id, video_uid, start_s, end_s, narration_s, caption, verbs, nouns)


def make_clip_id(video_uid: str, start_s: float, end_s: float, caption: str) -> str:
    """Returns an id that is stable over machines and safe as a file name in a tar of WebDataset samples."""
    checksum = zlib.crc32(caption.encode())
    return f"{safe_name(video_uid)}_{round(start_s * 1000):09d}_{round(end_s * 1000):09d}_{checksum:08x}"


def safe_name(video_uid: str) -> str:
    """The uid as it stands in ids."""
    return _UNSAFE.sub("_", video_uid)
