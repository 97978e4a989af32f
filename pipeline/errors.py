"""Typed errors of the data part and the reason codes under which clips are rejected.

A reason code is a stable word: it stands in `rejected.jsonl`, in receipts and in manifests, and people count
by it.
"""

from enum import StrEnum


class Reason(StrEnum):
    """Why a row, a clip or a video cannot be used. The values are part of the on-disk format."""

    # annotation rows
    BAD_ROW = "bad_row"
    NEGATIVE_START_CLAMPED = "negative_start_clamped"
    END_BEFORE_START = "end_before_start"
    DUPLICATE = "duplicate"
    EMPTY_CAPTION = "empty_caption"
    SINGLE_NARRATION = "single_narration"
    # video files
    BAD_NAME = "bad_name"
    MISSING_VIDEO = "missing_video"
    MISSING_CHUNK = "missing_chunk"
    EMPTY_VIDEO = "empty_video"
    NOT_A_VIDEO = "not_a_video"
    TRUNCATED_VIDEO = "truncated_video"
    NO_VIDEO_STREAM = "no_video_stream"
    UNSUPPORTED_CODEC = "unsupported_codec"
    OVER_LIMIT = "over_limit"
    CRASHED_DECODER = "crashed_decoder"
    # clips inside a usable video
    OUTSIDE_VIDEO = "outside_video"
    GAP_IN_VIDEO = "gap_in_video"
    DECODE_ERROR = "decode_error"
    # stored clips
    DAMAGED_SHARD = "damaged_shard"
    DAMAGED_FRAME = "damaged_frame"


class DataError(Exception):
    """The data cannot be used as asked; the message says what was found, expected, and what to change."""


class ClipError(DataError):
    """One clip cannot be used. Carries clip_id, reason (`Reason`) and detail (text for a person)."""

    def __init__(self, clip_id: str, reason: Reason, detail: str) -> None:
        super().__init__(clip_id, reason, detail)
        self.clip_id = clip_id
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"clip {self.clip_id}: {self.reason.value}: {self.detail}"


class VideoError(DataError):
    """One video file, or all files of one video, cannot be used. Carries video_uid, reason and detail."""

    def __init__(self, video_uid: str, reason: Reason, detail: str) -> None:
        super().__init__(video_uid, reason, detail)
        self.video_uid = video_uid
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"video {self.video_uid}: {self.reason.value}: {self.detail}"


class ShardError(DataError):
    """A shard set on disk is absent, unfinished, of another version, or differs from its manifest."""


class TooManyRejectedError(DataError):
    """More input was lost than the recipe allows. Everything is on disk; nothing was published."""
