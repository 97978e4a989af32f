"""Where the files of a video lie: four known layouts, or a pattern of the recipe. Nothing is guessed or opened here.

raw `<uid>.mp4`; EgoVLP `<uid>/<k>.mp4`, 600 s each, k counts chunks; LaViLa and AVION `<uid>.mp4/<start>.mp4`, 300 s
and 15 s each, named by their first second.
"""

import re
from typing import NamedTuple

from pipeline.config import VideoLayout
from pipeline.errors import Reason, VideoError
from pipeline.storage import StoragePath, storage_path

NAMED_LAYOUTS = {
    "raw": VideoLayout(pattern="{uid}.mp4"),
    "egovlp_600s": VideoLayout(pattern="{uid}/{number}.mp4", chunk_s=600.0),
    "lavila_300s": VideoLayout(pattern="{uid}.mp4/{start}.mp4", chunk_s=300.0),
    "avion_15s": VideoLayout(pattern="{uid}.mp4/{start}.mp4", chunk_s=15.0),
}

_SAFE_UID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_CHUNK = re.compile(r"\{(start|number)\}")


class VideoFile(NamedTuple):
    """One file of a video and its first second in the whole video."""

    path: StoragePath
    start_s: float


def layout_of(layout: str | VideoLayout) -> VideoLayout:
    """The layout of a name, or the one given."""
    return NAMED_LAYOUTS[layout] if isinstance(layout, str) else layout


def locate_files(videos_dir: str | StoragePath, video_uid: str, layout: str | VideoLayout) -> list[VideoFile]:
    """The files of one video in order of time, empty ones of a chunked layout left out: an exact cut leaves an empty
    last chunk behind, which holds no time.

    Raises VideoError with the reason: a uid that is no plain file name, nothing there, a name against the layout.
    """
    if not _SAFE_UID.fullmatch(video_uid):
        raise VideoError(
            video_uid, Reason.BAD_NAME, "a video uid holds letters, digits, '_', '-' and '.' only"
        )
    shown = layout if isinstance(layout, str) else layout.pattern
    found = layout_of(layout)
    pattern, chunk_s = found.pattern, found.chunk_s
    name = pattern.replace("{uid}", video_uid).replace("{prefix}", video_uid.split("_")[0])
    path = storage_path(videos_dir) / name
    if chunk_s is None:
        if not path.is_file():
            raise VideoError(video_uid, Reason.MISSING_VIDEO, f"no file {path}; layout is {shown}")
        return [VideoFile(path, 0.0)]
    if not path.parent.is_dir():
        raise VideoError(video_uid, Reason.MISSING_VIDEO, f"no folder {path.parent}; layout is {shown}")
    counts_chunks = "{number}" in pattern
    before, _, after = _CHUNK.split(path.name)
    chunk_name = re.compile(re.escape(before) + "([0-9]{1,9})" + re.escape(after))
    files: list[VideoFile] = []
    for candidate in path.parent.iterdir():
        match = chunk_name.fullmatch(candidate.name)
        if match is None or not candidate.is_file():
            continue
        number = int(match.group(1))
        if not counts_chunks and number % chunk_s:
            raise VideoError(
                video_uid,
                Reason.BAD_NAME,
                f"{candidate} starts at second {number}; layout {shown} has multiples of {chunk_s:g}",
            )
        if candidate.stat().st_size:
            files.append(VideoFile(candidate, number * chunk_s if counts_chunks else float(number)))
    if not files:
        raise VideoError(
            video_uid, Reason.MISSING_VIDEO, f"no chunk {path.name} with content in {path.parent}"
        )
    return sorted(files, key=lambda file: file.start_s)
