"""Preparation as measured by `svitt bench data`: whole shards in one process, against decoding the same frames and
throwing them away, which is the least that any preparation with this decoder takes.
"""

import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time

from jobs.bench_record import BenchError, Ratio, Spread
from pipeline.clip import ClipRecord
from pipeline.config import PrepareConfig
from pipeline.frame_match import FrameDecoder, FrameFailure
from pipeline.prepare import ShardPlan, build_decoder, build_shard, find_video, frame_requests, plan_shards
from pipeline.shards import read_receipt, shard_paths
from pipeline.store import ClipStore

BUILD, DECODE = "build_shard", "decoding alone"


@dataclass(frozen=True, slots=True)
class PreparingRow:
    """One way through the same clips. Video seconds are those that clips cover, overlaps once; `_cpu_` is per second
    of processor time, which is what one core does when it is left alone.
    """

    name: str
    video_s_per_s: Spread
    clips_per_s: Spread
    video_s_per_cpu_s: Spread
    clips_per_cpu_s: Spread


@dataclass(frozen=True, slots=True)
class Preparing:
    """`share_of_decoding` is the rate of whole shards over that of decoding alone: 1 is the limit."""

    rows: tuple[PreparingRow, ...]
    num_clips: int
    video_s: float
    share_of_decoding: Ratio
    cpu_share_of_decoding: Ratio


def plan_again(
    store: ClipStore, num_shards: int, num_clips: int, videos_dir: str, config: PrepareConfig
) -> list[ShardPlan]:
    """Plans of stored shards, spread over the set, at most `num_clips` clips of each: what was rejected is left out."""
    entries = store.manifest.shards
    chosen = [entries[len(entries) * number // num_shards] for number in range(min(num_shards, len(entries)))]
    plans: list[ShardPlan] = []
    for entry in chosen:
        clips = read_receipt(shard_paths(store.shards_dir, entry.name)[1]).clips[:num_clips]
        records = [
            ClipRecord(c.clip_id, c.video_uid, c.start_s, c.end_s, c.narration_s, c.caption, c.verbs, c.nouns)
            for c in clips
        ]
        timelines = dict(
            find_video(uid, videos_dir, config.layout) for uid in {clip.video_uid for clip in records}
        )
        plans += plan_shards(records, timelines, config, len(records))
    return plans


def covered_s(clips: Sequence[ClipRecord]) -> float:
    """Seconds of video inside at least one clip."""
    total_s, video_uid, reached_s = 0.0, "", 0.0
    for clip in sorted(clips, key=lambda clip: (clip.video_uid, clip.start_s)):
        if clip.video_uid != video_uid:
            video_uid, reached_s = clip.video_uid, float("-inf")
        total_s += max(0.0, clip.end_s - max(clip.start_s, reached_s))
        reached_s = max(reached_s, clip.end_s)
    return total_s


def measure_preparing(
    plans: Sequence[ShardPlan],
    config: PrepareConfig,
    num_rounds: int,
    scratch_dir: Path,
    on_round: Callable[[], None],
) -> Preparing:
    """Alternates building all shards into a folder beside the record and decoding alone, after one untimed round."""
    decoder = build_decoder(config.decoder)

    def build() -> None:
        with tempfile.TemporaryDirectory(dir=scratch_dir, prefix=".bench-data-") as out_dir:
            for number, plan in enumerate(plans):
                receipt = build_shard(plan, Path(out_dir) / str(number), decoder)
                _require_all_stored(plan, receipt.num_clips)

    def decode() -> None:
        for plan in plans:
            decode_alone(plan, decoder)

    built: list[tuple[float, float]] = []
    decoded: list[tuple[float, float]] = []
    for number in range(num_rounds + 1):
        pair = _seconds(decode), _seconds(build)
        if number:
            decoded.append(pair[0])
            built.append(pair[1])
        on_round()
    num_clips = sum(len(plan.clips) for plan in plans)
    video_s = sum(covered_s(plan.clips) for plan in plans)
    (build_wall, build_cpu), (decode_wall, decode_cpu) = zip(*built, strict=True), zip(*decoded, strict=True)
    return Preparing(
        rows=(
            _row(BUILD, num_clips, video_s, build_wall, build_cpu),
            _row(DECODE, num_clips, video_s, decode_wall, decode_cpu),
        ),
        num_clips=num_clips,
        video_s=video_s,
        share_of_decoding=Ratio.of(decode_wall, build_wall),
        cpu_share_of_decoding=Ratio.of(decode_cpu, build_cpu),
    )


def decode_alone(plan: ShardPlan, decoder: FrameDecoder) -> int:
    """Has the frames of a plan decoded to RGB as `build_shard` does, keeps none; returns how many there were."""
    num_frames = 0
    for video_uid, group in itertools.groupby(plan.clips, key=lambda clip: clip.video_uid):
        timeline = plan.timelines[video_uid]
        if isinstance(timeline, Exception):
            continue
        answers = decoder.decode_frames(timeline, frame_requests(list(group), plan.config.num_frames))
        num_frames += sum(not isinstance(answer, FrameFailure) for _, answer in answers)
    return num_frames


def _require_all_stored(plan: ShardPlan, num_stored: int) -> None:
    if num_stored != len(plan.clips):
        raise BenchError(
            f"prepared {num_stored} of {len(plan.clips)} clips that were stored before: the videos changed, or "
            "data.videos and data.shards do not belong together"
        )


def _seconds(run: Callable[[], None]) -> tuple[float, float]:
    """Wall and process CPU seconds."""
    wall, cpu = perf_counter(), process_time()
    run()
    return perf_counter() - wall, process_time() - cpu


def _row(
    name: str, num_clips: int, video_s: float, wall_s: Sequence[float], cpu_s: Sequence[float]
) -> PreparingRow:
    return PreparingRow(
        name=name,
        video_s_per_s=Spread.of([video_s / seconds for seconds in wall_s]),
        clips_per_s=Spread.of([num_clips / seconds for seconds in wall_s]),
        video_s_per_cpu_s=Spread.of([video_s / seconds for seconds in cpu_s]),
        clips_per_cpu_s=Spread.of([num_clips / seconds for seconds in cpu_s]),
    )
