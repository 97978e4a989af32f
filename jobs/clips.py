"""Narrations -> EgoClip-format TSV for training and EgoMCQ-format JSON from held-out videos."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.atomic import write_text_atomically
from pipeline.clip import make_record
from pipeline.clip_rule import ClipRuleResult, NarrationTimes, TimedClip, clips_by_rule
from pipeline.config import ClipRuleConfig
from pipeline.egoclip import EgoClipRow, format_egoclip
from pipeline.egomcq import build_egomcq, probe_questions, read_egomcq
from pipeline.errors import DataError
from pipeline.narrations import PASS_NAMES, NarratedVideo, Taxonomy, read_narrations, read_taxonomy
from pipeline.script import keyed_random


@dataclass(frozen=True, slots=True)
class ClipsSummary:
    """What was written. counts are those of the clip rule; skipped lists passes without a clip width."""

    egoclip: Path
    egomcq: Path | None
    num_clips: int
    num_inter: int
    num_intra: int
    num_probe: int
    mean_gap_s: float | None
    counts: dict[str, int]
    skipped: tuple[tuple[str, str, str], ...]
    has_changed: bool


def run_clips(
    world_dir: Path,
    out_dir: Path,
    config: ClipRuleConfig,
    *,
    seed: int = 0,
    num_inter: int | None = None,
    num_intra: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> ClipsSummary:
    """Writes out_dir/egoclip.csv from the training videos and out_dir/egomcq.json from the held-out ones.

    Reads narration.json and taxonomy.json in world_dir, and splits.json where there is one; without it every
    video is for training and no EgoMCQ file is written. Files that would not change are not touched. Raises
    DataError when an input is missing or unusable, or a video has no duration.
    """
    videos = read_narrations(world_dir / "narration.json")
    taxonomy = read_taxonomy(world_dir / "taxonomy.json")
    train, heldout = _read_splits(world_dir / "splits.json", videos)
    result = clips_by_rule({video.video_uid: _times(video) for video in videos}, config)
    rows = _rows(videos, taxonomy, result)
    train_rows = [row for row in rows if row.video_uid in train]
    text = format_egoclip(train_rows)
    has_changed = write_text_atomically(out_dir / "egoclip.csv", text)
    kinds: Counter[str] = Counter()
    num_probe = 0
    egomcq = out_dir / "egomcq.json" if heldout else None
    if egomcq is not None:
        records = [
            make_record(
                row.video_uid,
                row.clip_start,
                row.clip_end,
                row.narration_time,
                row.clip_text,
                row.tag_verb,
                row.tag_noun,
            )
            for row in rows
            if row.video_uid in heldout and row.narration_source == PASS_NAMES[0]
        ]
        document = build_egomcq(records, keyed_random(seed, "egomcq"), num_inter, num_intra)
        has_changed |= write_text_atomically(egomcq, json.dumps(document, indent=1) + "\n")
        # What is scored later is what the strict reader accepts, so it has the last word here too.
        questions = read_egomcq(egomcq)
        kinds = Counter(question.kind for question in questions)
        num_probe = len(probe_questions(questions, taxonomy.reversed_verbs))
    summary = ClipsSummary(
        egoclip=out_dir / "egoclip.csv",
        egomcq=egomcq,
        num_clips=len(train_rows),
        num_inter=kinds["inter"],
        num_intra=kinds["intra"],
        num_probe=num_probe,
        mean_gap_s=result.mean_gap_s,
        counts=dict(result.counts),
        skipped=result.skipped,
        has_changed=has_changed,
    )
    if progress is not None:
        for line in summary_lines(summary):
            progress(line)
    return summary


def summary_lines(summary: ClipsSummary) -> list[str]:
    """Returns the summary as lines for a person."""
    gap = "not computed" if summary.mean_gap_s is None else f"{summary.mean_gap_s:.4f} s"
    state = "" if summary.has_changed else " (unchanged)"
    lines = [f"{summary.num_clips} training clips in {summary.egoclip}{state}, mean narration gap {gap}"]
    if summary.egomcq is not None:
        lines.append(
            f"{summary.num_inter} inter and {summary.num_intra} intra questions in {summary.egomcq}, "
            f"{summary.num_probe} intra with the reversed action among the choices"
        )
    lost = {name: count for name, count in summary.counts.items() if name not in ("clips", "narrations")}
    if lost:
        lines.append(
            "of all narrations: " + ", ".join(f"{name} {count}" for name, count in sorted(lost.items()))
        )
    lines.extend(f"skipped {uid} {name}: {why}" for uid, name, why in summary.skipped[:5])
    if len(summary.skipped) > 5:
        lines.append(f"... and {len(summary.skipped) - 5} more skipped")
    return lines


def _read_splits(path: Path, videos: list[NarratedVideo]) -> tuple[set[str], set[str]]:
    uids = {video.video_uid for video in videos}
    if not path.exists():
        return uids, set()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        train, heldout = set(value["train"]), set(value["heldout"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be used ({type(error).__name__}: {error}), "
            'expected {"train": [uids], "heldout": [uids]}'
        ) from error
    both = sorted(train & heldout)
    if both:
        raise DataError(f"{path}: {len(both)} video(s) are in train and in heldout, first {both[0]}")
    unknown = sorted((train | heldout) - uids)
    if unknown:
        raise DataError(f"{path}: {len(unknown)} video(s) have no narrations, first {unknown[0]}")
    return train, heldout


def _times(video: NarratedVideo) -> NarrationTimes:
    if video.duration_s is None:
        raise DataError(
            f"narrations of video {video.video_uid} come without its length; add duration_sec (seconds) to "
            "the video's entry: clips are cut to it and EgoClip's video_dur column holds it"
        )
    passes = {name: [item.time_s for item in items] for name, items in video.passes.items()}
    return NarrationTimes(video.duration_s, passes)


def _rows(videos: list[NarratedVideo], taxonomy: Taxonomy, result: ClipRuleResult) -> list[EgoClipRow]:
    by_uid = {video.video_uid: video for video in videos}
    return [_row(number, clip, by_uid[clip.video_uid], taxonomy) for number, clip in enumerate(result.clips)]


def _row(number: int, clip: TimedClip, video: NarratedVideo, taxonomy: Taxonomy) -> EgoClipRow:
    narration = video.passes[clip.pass_name][clip.index]
    return EgoClipRow(
        clip_idx=number,
        video_uid=clip.video_uid,
        video_dur=video.duration_s or 0.0,
        narration_source=clip.pass_name,
        narration_ind=narration.index,
        narration_time=clip.narration_s,
        clip_start=clip.start_s,
        clip_end=clip.end_s,
        clip_text=narration.text,
        tag_verb=taxonomy.verb_ids(narration.text),
        tag_noun=taxonomy.noun_ids(narration.text),
    )
