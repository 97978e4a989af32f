"""Videos and clip records to shards: plan, build one shard, publish the set. Pure per item and repeatable.

The plan cuts the clips, in order of video and time, into shards of a given number (`shard_size` finds one); it does not
depend on which videos are usable, so a video that turns up later changes its own shards only. A clip that cannot be
decoded whole is rejected with a reason and never replaced. Left out on purpose: where the tasks run (`jobs`).
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, overload

import numpy as np

from pipeline.clip import ClipRecord
from pipeline.clip_table import ClipTable
from pipeline.config import PrepareConfig, VideoLayout
from pipeline.crash_log import MAX_CRASHES, CrashLog
from pipeline.decode import PyAvDecoder
from pipeline.decode_dali import DaliGpuDecoder
from pipeline.errors import DataError, Reason, VideoError
from pipeline.frame_match import DecodedFrame, FrameDecoder, FrameFailure, FrameRequest
from pipeline.resize import FrameResizer, encode_jpeg
from pipeline.shards import (
    SHARD_FORMAT,
    RejectedClip,
    ShardReceipt,
    ShardWriter,
    find_intact,
    to_json_bytes,
)
from pipeline.storage import StoragePath
from pipeline.text import clean_caption
from pipeline.video import VideoTimeline, midpoint_times, probe, resolve_timeline

RESIZE_BATCH = 16


@dataclass(frozen=True, slots=True, repr=False)
class ShardPlan:
    """All that decides the bytes of one shard. `timelines` holds a VideoError for a video without files."""

    name: str
    content_key: str
    config: PrepareConfig
    clips: tuple[ClipRecord, ...]
    timelines: Mapping[str, VideoTimeline | VideoError]

    def __repr__(self) -> str:
        return f"{self.name} ({len(self.clips)} clips of {len(self.timelines)} videos)"


@dataclass(frozen=True, slots=True)
class StoredFrame:
    """One shrunk frame as JPEG bytes."""

    jpeg: bytes
    time_s: float
    height: int
    width: int


def find_video(
    video_uid: str, videos_dir: str, layout: str | VideoLayout
) -> tuple[str, VideoTimeline | VideoError]:
    """(uid, its files) or (uid, why there are none): the item function of the first pass over all videos."""
    try:
        return video_uid, resolve_timeline(videos_dir, video_uid, layout)
    except VideoError as error:
        return video_uid, error


def shard_settings(config: PrepareConfig) -> dict[str, Any]:
    """The settings that change bytes on disk: everything but the budget and the size of shards.

    A number of clips given by the recipe stands among them, as it always did: shards made so stay valid. One that is
    measured does not. It shows in nothing but the clips of a shard, so another size builds only what is cut otherwise.
    """
    left_out = {"max_rejected_share", "shard_mib"}
    if config.clips_per_shard is None:
        left_out.add("clips_per_shard")
    return {"format": SHARD_FORMAT, **config.model_dump(mode="json", exclude=left_out)}


class ShardPlans(Sequence[ShardPlan]):
    """The plans of a set by number, made when asked for: those of EgoClip do not fit into memory at once."""

    def __init__(
        self,
        ordered: ClipTable,
        timelines: Mapping[str, VideoTimeline | VideoError],
        config: PrepareConfig,
        clips_per_shard: int,
    ) -> None:
        self._ordered, self._timelines, self._config = ordered, timelines, config
        self._clips_per_shard = clips_per_shard
        self._settings = shard_settings(config)

    def __len__(self) -> int:
        return -(-len(self._ordered) // self._clips_per_shard)

    @overload
    def __getitem__(self, place: int) -> ShardPlan: ...
    @overload
    def __getitem__(self, place: slice) -> list[ShardPlan]: ...
    def __getitem__(self, place: int | slice) -> ShardPlan | list[ShardPlan]:
        if isinstance(place, slice):
            return [self[number] for number in range(len(self))[place]]
        number = range(len(self))[place]
        start = number * self._clips_per_shard
        clips = tuple(self._ordered[start : start + self._clips_per_shard])
        used = {clip.video_uid: self._timelines[clip.video_uid] for clip in clips}
        return ShardPlan(
            self.name(number), _content_key(clips, used, self._settings), self._config, clips, used
        )

    def name(self, number: int) -> str:
        """Name of a shard."""
        return f"shard-{number:05d}"

    @property
    def names(self) -> list[str]:
        """Names of all shards, in order."""
        return [self.name(number) for number in range(len(self))]


def plan_shards(
    records: Iterable[ClipRecord],
    timelines: Mapping[str, VideoTimeline | VideoError],
    config: PrepareConfig,
    clips_per_shard: int,
) -> ShardPlans:
    """Cut the clips into shards of a number. Clips of a video stand together in time order, for scene-aware neighbours.

    Raises DataError when a clip id stands twice: ids are names inside the tar.
    """
    table = ClipTable.of(records)
    repeats = table.repeats()
    if len(repeats):
        clip_id = table[int(repeats[0])].clip_id
        raise DataError(f"planned shards: clip {clip_id} stands twice; expected every clip id once")
    return ShardPlans(table.in_order(), timelines, config, clips_per_shard)


def _content_key(
    clips: Sequence[ClipRecord],
    timelines: Mapping[str, VideoTimeline | VideoError],
    settings: Mapping[str, Any],
) -> str:
    files: dict[str, Any] = {}
    for video_uid, timeline in timelines.items():
        if isinstance(timeline, VideoError):
            files[video_uid] = timeline.reason.value
            continue
        spans = [clip for clip in clips if clip.video_uid == video_uid]
        touched = {chunk for clip in spans for chunk in timeline.chunks_for(clip.start_s, clip.end_s)}
        # Where the video ends is a fact of its last file.
        touched.add(timeline.chunks[-1])
        files[video_uid] = sorted((chunk.start_s, chunk.size_bytes, chunk.digest) for chunk in touched)
    covered = {"settings": settings, "clips": [asdict(clip) for clip in clips], "files": files}
    return hashlib.sha256(to_json_bytes(covered)).hexdigest()


def build_decoder(name: Literal["pyav", "dali_gpu"]) -> FrameDecoder:
    """The decoder of the recipe. Raises DataError when it wants a GPU and there is none."""
    if name == "pyav":
        return PyAvDecoder()
    try:
        return DaliGpuDecoder()
    except RuntimeError as error:
        raise DataError(
            "prepare.decoder is dali_gpu, and DALI cannot use a GPU on this machine; set prepare.decoder "
            f"to pyav, or run where there is one ({str(error).splitlines()[0][:200]})"
        ) from error


def build_shard(
    plan: ShardPlan, out_dir: str | StoragePath, decoder: FrameDecoder | None = None, run_key: str = ""
) -> ShardReceipt:
    """Write one shard, or return the receipt of an undamaged one made from the same content.

    `decoder` defaults to the one the plan's settings name. Rejected clips are listed in the receipt. A video at which
    earlier attempts of the run `run_key` died `MAX_CRASHES` times is not tried again: its clips are rejected.
    """
    existing = find_intact(out_dir, plan.name, plan.content_key)
    if existing is not None:
        return existing
    config = plan.config
    decoder = decoder if decoder is not None else build_decoder(config.decoder)
    extractor = ClipExtractor(config, decoder)
    crash_log = CrashLog(out_dir, plan.name, run_key)
    rejected: list[RejectedClip] = []
    with ShardWriter(out_dir, plan.name) as writer:
        for video_uid, group in itertools.groupby(plan.clips, key=lambda clip: clip.video_uid):
            if crash_log.num_crashes(video_uid) >= MAX_CRASHES:
                detail = (
                    f"the process died {MAX_CRASHES} times while it decoded this video; to try it again, delete "
                    f"{plan.name}.json and run prepare"
                )
                failure = FrameFailure(Reason.CRASHED_DECODER, detail)
                rejected.extend(_rejected(clip, failure) for clip in group)
                continue
            with crash_log.decoding(video_uid):
                for clip, answer in extractor.extract(plan.timelines[video_uid], list(group)):
                    if isinstance(answer, FrameFailure):
                        rejected.append(_rejected(clip, answer))
                        continue
                    add_clip(writer, clip, answer)
        return writer.finish(plan.content_key, rejected)


def add_clip(writer: ShardWriter, clip: ClipRecord, frames: Sequence[StoredFrame]) -> None:
    """Append a clip with its frames, which are all of one size, to a shard."""
    jpegs = [frame.jpeg for frame in frames]
    writer.add(clip, jpegs, [frame.time_s for frame in frames], frames[0].height, frames[0].width)


def _rejected(clip: ClipRecord, failure: FrameFailure) -> RejectedClip:
    return RejectedClip(
        clip_id=clip.clip_id,
        video_uid=clip.video_uid,
        start_s=clip.start_s,
        end_s=clip.end_s,
        reason=failure.reason,
        detail=failure.detail,
    )


class ClipExtractor:
    """Frames of clips as JPEG bytes: one decode pass per video, frames shared by clips are encoded once."""

    def __init__(self, config: PrepareConfig, decoder: FrameDecoder) -> None:
        self._config = config
        self._decoder = decoder
        device = "gpu" if config.decoder == "dali_gpu" else "cpu"
        self._resizer = FrameResizer(config.short_side, device, max_frames=RESIZE_BATCH)

    def extract(
        self, timeline: VideoTimeline | VideoError, clips: Sequence[ClipRecord]
    ) -> Iterator[tuple[ClipRecord, list[StoredFrame] | FrameFailure]]:
        """Yields every clip once, in the order given, with all its frames or the reason it has none."""
        if isinstance(timeline, VideoError):
            for clip in clips:
                yield clip, FrameFailure(timeline.reason, timeline.detail)
            return
        failures = _refuse_before_decoding(timeline, clips)
        wanted = [position for position in range(len(clips)) if position not in failures]
        num_frames = self._config.num_frames
        requests = frame_requests([clips[position] for position in wanted], num_frames)
        time_of_request: dict[int, float] = {}
        stored: dict[float, StoredFrame] = {}
        waiting: dict[float, DecodedFrame] = {}
        for number, answer in self._decoder.decode_frames(timeline, requests):
            position = wanted[number // num_frames]
            if isinstance(answer, FrameFailure):
                failures.setdefault(position, answer)
                continue
            time_of_request[number] = answer.time_s
            if answer.time_s not in stored:
                waiting[answer.time_s] = answer
            if len(waiting) == RESIZE_BATCH:
                stored.update(self._store(waiting))
                waiting.clear()
        stored.update(self._store(waiting))
        first_request = {position: order * num_frames for order, position in enumerate(wanted)}
        for position, clip in enumerate(clips):
            if position in failures:
                yield clip, failures[position]
                continue
            first = first_request[position]
            frames = [stored[time_of_request[number]] for number in range(first, first + num_frames)]
            yield clip, _check_one_size(frames)

    def _store(self, frames: Mapping[float, DecodedFrame]) -> dict[float, StoredFrame]:
        shrunk = self._resizer.resize([frame.image for frame in frames.values()])
        quality = self._config.jpeg_quality
        return {
            time_s: StoredFrame(encode_jpeg(np.ascontiguousarray(image), quality), time_s, *image.shape[:2])
            for time_s, image in zip(frames, shrunk, strict=True)
        }


def frame_requests(clips: Sequence[ClipRecord], num_frames: int) -> list[FrameRequest]:
    """What is asked of the decoder: `num_frames` midpoints of every clip, clip after clip."""
    return [
        FrameRequest(time_s, clip.end_s)
        for clip in clips
        for time_s in midpoint_times(clip.start_s, clip.end_s, num_frames)
    ]


def _check_one_size(frames: list[StoredFrame]) -> list[StoredFrame] | FrameFailure:
    sizes = sorted({(frame.width, frame.height) for frame in frames})
    if len(sizes) == 1:
        return frames
    return FrameFailure(Reason.DECODE_ERROR, f"frames of one clip differ in size (width, height): {sizes}")


def _refuse_before_decoding(timeline: VideoTimeline, clips: Sequence[ClipRecord]) -> dict[int, FrameFailure]:
    """Position -> failure for clips that the words or the header of the last file already rule out."""
    failures: dict[int, FrameFailure] = {}
    end_s, tolerance_s = float("inf"), 0.0
    last = timeline.chunks[-1]
    try:
        header = probe(last.path, timeline.video_uid)
        if header.duration_s is not None:
            end_s, tolerance_s = last.start_s + header.duration_s, header.frame_s / 2 + 1e-3
    except VideoError:
        # Clips in that file meet the same error when they are decoded; the others do not need it.
        pass
    for position, clip in enumerate(clips):
        if not clean_caption(clip.caption):
            failures[position] = FrameFailure(Reason.EMPTY_CAPTION, f"no words in {clip.caption!r}")
        elif not 0.0 <= clip.start_s < clip.end_s:
            failures[position] = FrameFailure(
                Reason.END_BEFORE_START, f"from {clip.start_s} s to {clip.end_s} s; expected 0 <= start < end"
            )
        elif clip.end_s > end_s + tolerance_s:
            failures[position] = FrameFailure(
                Reason.OUTSIDE_VIDEO, f"ends at {clip.end_s:.3f} s, the video at {end_s:.3f} s"
            )
    return failures
