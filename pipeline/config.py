"""Settings of the data side: what is generated, cut, stored and loaded.

Frozen pydantic models; an unknown key or a wrong type is refused. Imports neither a decoder nor torch.
"""

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class WorldConfig(BaseModel):
    """The generated egocentric world."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(default=0, ge=0, description="decides every script, picture and identifier")
    num_train_videos: int = Field(default=36, ge=1, description="videos for training")
    num_heldout_videos: int = Field(
        default=13, ge=0, description="videos whose clips are only used for EgoMCQ"
    )
    video_s: tuple[float, float] = Field(
        default=(36.0, 54.0), description="shortest and longest video, seconds"
    )

    @field_validator("video_s")
    @classmethod
    def _video_s_is_a_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        shortest_s, longest_s = value
        if not 4.0 <= shortest_s <= longest_s:
            raise ValueError(
                f"video_s is [{shortest_s}, {longest_s}], expected 4 <= shortest <= longest, "
                "so that a video holds at least two actions"
            )
        return value


class ClipRuleConfig(BaseModel):
    """The EgoClip rule clip(t) = t -+ b / (2a) and its open decisions (arXiv 2206.01670, section 3.1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean_gap_s: float | None = Field(
        default=None,
        gt=0,
        description="a: mean gap over all videos, seconds; EgoClip uses 4.9; empty = computed",
    )
    per_pass: bool = Field(
        default=True, description="b from the gaps of one annotation pass; false = both passes together"
    )
    clamp: bool = Field(default=True, description="cut clips to [0, video duration]; EgoClip itself does not")
    min_clip_s: float = Field(
        default=0.0, ge=0, description="clips shorter than this after clamping are dropped and counted"
    )


class VideoLayout(BaseModel):
    """How video files lie in their folder, for archives in none of the known layouts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str = Field(
        description="path of a file below the folder of videos: {uid}, {prefix} (the uid up to its first _), and "
        "for videos in chunks {start} (first second of the file) or {number} (files counted from 0)"
    )
    chunk_s: float | None = Field(
        default=None, gt=0, description="seconds of a chunk; empty = one file a video"
    )

    @model_validator(mode="after")
    def _check_pattern(self) -> "VideoLayout":
        parts = self.pattern.split("/")
        fields = re.findall(r"\{([^{}]*)\}", self.pattern)
        unknown = sorted(set(fields) - {"uid", "prefix", "start", "number"})
        if unknown or "uid" not in fields:
            raise ValueError(
                f"pattern {self.pattern!r} has the fields {fields}; expected {{uid}}, and of {{prefix}}, {{start}}, "
                "{number} what is needed"
            )
        if any(part in ("", ".", "..") for part in parts):
            raise ValueError(
                f"pattern {self.pattern!r} leaves the folder of videos; expected names and single /"
            )
        chunk_fields = [name for name in fields if name in ("start", "number")]
        in_name = [name for name in ("start", "number") if f"{{{name}}}" in parts[-1]]
        if len(chunk_fields) != (self.chunk_s is not None) or chunk_fields != in_name:
            raise ValueError(
                f"pattern {self.pattern!r} with chunk_s {self.chunk_s}: a layout of chunks has chunk_s and one of "
                "{start} and {number} in the file's name, any other has neither"
            )
        return self


class PrepareConfig(BaseModel):
    """How clips are cut from videos and stored. Every field but the budget changes the shards; the two of their size
    decide only which clips share one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_frames: int = Field(
        default=16, ge=1, le=99, description="JPEG frames stored per clip; at least the longest stage"
    )
    short_side: int = Field(
        default=256, ge=16, description="short side of a stored frame in pixels; never enlarged"
    )
    jpeg_quality: int = Field(default=90, ge=1, le=100)
    clips_per_shard: int | None = Field(
        default=None, ge=1, description="clips of a shard; empty = as many as make `shard_mib`"
    )
    shard_mib: float = Field(
        default=64.0,
        gt=0,
        description="size of a shard aimed at; the number of clips is measured on a sample; unused where "
        "clips_per_shard is given",
    )
    layout: Literal["raw", "egovlp_600s", "lavila_300s", "avion_15s"] | VideoLayout = Field(
        default="raw", description="how video files lie in their folder, a name or a pattern; never guessed"
    )
    max_rejected_share: float = Field(
        default=0.01, ge=0.0, le=1.0, description="above it prepare stops with the list"
    )
    decoder: Literal["pyav", "dali_gpu"] = Field(
        default="pyav", description="pyav runs on the CPU, dali_gpu on NVDEC"
    )


class LoaderConfig(BaseModel):
    """How stored clips become batches. Nothing here depends on the number of ranks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = Field(default=224, ge=16, description="height and width of a training frame in pixels")
    crop_scale: tuple[float, float] = Field(
        default=(0.5, 1.0), description="share of the frame area a crop covers"
    )
    crop_aspect: tuple[float, float] = Field(
        default=(3 / 4, 4 / 3), description="width / height of a crop, relative to the frame's own"
    )
    text_length: int = Field(default=32, ge=4, description="tokens per caption, [CLS] and padding included")
    max_damaged_steps: int = Field(
        default=8,
        ge=0,
        description="steps of a stage that may be left out because a clip of theirs turns out damaged; one more stops",
    )
    prefetch_batches: int = Field(default=2, ge=1, description="batches decoded ahead of the training step")
    num_threads: int = Field(default=1, ge=1, description="decoding threads per rank")
    shuffle_window_shards: int = Field(
        default=8, ge=1, description="shards read together; clips are shuffled inside"
    )
    cache_dir: str | None = Field(
        default=None,
        description="local folder for shards of a store such as s3://; empty = one in the system's temporary folder",
    )
    cache_gib: float = Field(default=32.0, gt=0, description="most that such local copies may take")
    device: Literal["cpu", "gpu"] = Field(
        default="cpu", description="where JPEG frames are decoded and resized"
    )

    @model_validator(mode="after")
    def _check_crop_scale(self) -> "LoaderConfig":
        low, high = self.crop_scale
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"crop_scale is {self.crop_scale}; expected 0 < low <= high <= 1")
        narrow, wide = self.crop_aspect
        if not 0.0 < narrow <= wide:
            raise ValueError(f"crop_aspect is {self.crop_aspect}; expected 0 < low <= high")
        return self
