"""A contact sheet of clips: one row per clip, its frames in order and its caption beside them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.clip import ClipRecord
from pipeline.decode import PyAvDecoder
from pipeline.errors import ClipError, DataError
from pipeline.frame_match import FrameFailure, FrameRequest
from pipeline.video import midpoint_times, resolve_timeline

TEXT_WIDTH = 250
LINE_CHARS = 30


def sample_records(records: Sequence[ClipRecord], num_clips: int) -> list[ClipRecord]:
    """Chooses clips of all verbs in turn, spread over the videos; same input, same choice."""
    by_tags: dict[tuple[int, ...], list[ClipRecord]] = {}
    for record in records:
        by_tags.setdefault(record.verbs, []).append(record)
    groups = [by_tags[key] for key in sorted(by_tags)]
    chosen = []
    for turn in range(num_clips):
        group = groups[turn % len(groups)]
        # A step that shares no factor with usual group sizes walks through all videos.
        chosen.append(group[(turn * 37) % len(group)])
    return sorted(chosen, key=lambda record: record.verbs)


def write_contact_sheet(
    videos_dir: Path, records: Sequence[ClipRecord], path: Path, num_frames: int = 6, frame_height: int = 120
) -> None:
    """Decodes the clips from <videos_dir>/<uid>.mp4 and writes the sheet as PNG.

    Frames are those nearest to the midpoints of num_frames equal parts of a clip. Raises DataError when there
    is nothing to show, or a video or a frame cannot be had.
    """
    if not records:
        raise DataError("a contact sheet needs at least one clip")
    rows = [_row(videos_dir, record, num_frames, frame_height) for record in records]
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 4), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), cv2.cvtColor(np.concatenate(padded), cv2.COLOR_RGB2BGR))


def _row(videos_dir: Path, record: ClipRecord, num_frames: int, frame_height: int) -> NDArray[np.uint8]:
    timeline = resolve_timeline(videos_dir, record.video_uid, "raw")
    times_s = midpoint_times(record.start_s, record.end_s, num_frames)
    requests = [FrameRequest(time_s, record.end_s) for time_s in times_s]
    row: list[NDArray[Any]] = [_caption(record, frame_height)]
    for _, found in PyAvDecoder().decode_frames(timeline, requests):
        if isinstance(found, FrameFailure):
            raise ClipError(record.clip_id, found.reason, found.detail)
        width = round(frame_height * found.image.shape[1] / found.image.shape[0])
        row.append(np.asarray(cv2.resize(found.image, (width, frame_height), interpolation=cv2.INTER_AREA)))
    return np.concatenate(row, axis=1).astype(np.uint8, copy=False)


def _caption(record: ClipRecord, height: int) -> NDArray[np.uint8]:
    picture = np.full((height, TEXT_WIDTH, 3), 255, np.uint8)
    lines = [""]
    for word in record.caption.split():
        if len(lines[-1]) + len(word) > LINE_CHARS:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    lines += ["", f"{record.video_uid[:8]}  {record.start_s:.2f}-{record.end_s:.2f} s"]
    for number, line in enumerate(lines):
        place = (6, 24 + 20 * number)
        cv2.putText(picture, line, place, cv2.FONT_HERSHEY_SIMPLEX, 0.46, (20, 20, 20), 1, cv2.LINE_AA)
    return picture
