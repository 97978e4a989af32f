"""From narration times to clips by the EgoClip rule (arXiv 2206.01670, section 3.1).

    clip(t) = [ t - b / (2a),  t + b / (2a) ]

b is the mean gap between consecutive narrations of a video, a the mean of b over all videos (4.9 s for
EgoClip). The quotient b / a is read as seconds. Pure arithmetic: no files, no texts.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config import ClipRuleConfig
from pipeline.errors import DataError


@dataclass(frozen=True, slots=True)
class NarrationTimes:
    """Narration times of one video, seconds, per pass. duration_s None: clips are not cut at the end."""

    duration_s: float | None
    passes: Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class TimedClip:
    """Where one narration's clip lies. index is the place of its time in its pass as given."""

    video_uid: str
    pass_name: str
    index: int
    narration_s: float
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class ClipRuleResult:
    """Clips in the order given, the a that was used, and what happened to everything else.

    counts: narrations, clips, start_clamped, end_clamped, dropped_empty, dropped_short, in_skipped_passes.
    skipped: (video uid, pass name, why) for passes without a gap to measure.
    """

    clips: tuple[TimedClip, ...]
    mean_gap_s: float | None
    counts: Mapping[str, int]
    skipped: tuple[tuple[str, str, str], ...]


def mean_gap(times_s: Sequence[float]) -> float | None:
    """Returns the mean gap between consecutive times, or None when there are fewer than two."""
    if len(times_s) < 2:
        return None
    return (max(times_s) - min(times_s)) / (len(times_s) - 1)


def clips_by_rule(videos: Mapping[str, NarrationTimes], config: ClipRuleConfig) -> ClipRuleResult:
    """Applies the rule to all narrations of all videos.

    With per_pass, b belongs to one pass, and a video counts in the mean a with the mean b of its passes;
    otherwise b comes from the times of all passes together. A pass with one narration has no b: it is skipped
    with a reason, no width is invented. Raises DataError when a must be computed and every gap is zero.
    """
    gaps_s = {uid: _gaps_of(times, config.per_pass) for uid, times in videos.items()}
    mean_gap_s = config.mean_gap_s if config.mean_gap_s is not None else _mean_over_videos(gaps_s)
    counts: Counter[str] = Counter()
    clips: list[TimedClip] = []
    skipped: list[tuple[str, str, str]] = []
    for uid, times in videos.items():
        for name, times_s in times.passes.items():
            counts["narrations"] += len(times_s)
            gap_s = gaps_s[uid].get(name)
            if gap_s is None or mean_gap_s is None:
                skipped.append((uid, name, "one narration: there is no gap to take the clip width from"))
                counts["in_skipped_passes"] += len(times_s)
                continue
            if mean_gap_s <= 0:
                raise DataError(
                    "all narrations of every video share one time, so no clip width can be computed"
                )
            half_s = gap_s / (2 * mean_gap_s)
            for index, time_s in enumerate(times_s):
                clip = _clip(uid, name, index, time_s, half_s, times.duration_s, config, counts)
                if clip is not None:
                    clips.append(clip)
    counts["clips"] = len(clips)
    return ClipRuleResult(tuple(clips), mean_gap_s, dict(counts), tuple(skipped))


def _gaps_of(times: NarrationTimes, per_pass: bool) -> dict[str, float | None]:
    if per_pass:
        return {name: mean_gap(times_s) for name, times_s in times.passes.items()}
    pooled = mean_gap([time_s for times_s in times.passes.values() for time_s in times_s])
    return dict.fromkeys(times.passes, pooled)


def _mean_over_videos(gaps_s: Mapping[str, Mapping[str, float | None]]) -> float | None:
    of_videos = []
    for by_pass in gaps_s.values():
        known = [gap_s for gap_s in by_pass.values() if gap_s is not None]
        if known:
            of_videos.append(sum(known) / len(known))
    return sum(of_videos) / len(of_videos) if of_videos else None


def _clip(
    uid: str,
    pass_name: str,
    index: int,
    time_s: float,
    half_s: float,
    duration_s: float | None,
    config: ClipRuleConfig,
    counts: Counter[str],
) -> TimedClip | None:
    start_s, end_s = time_s - half_s, time_s + half_s
    if config.clamp:
        if start_s < 0:
            start_s = 0.0
            counts["start_clamped"] += 1
        if duration_s is not None and end_s > duration_s:
            end_s = duration_s
            counts["end_clamped"] += 1
    if end_s <= start_s:
        counts["dropped_empty"] += 1
        return None
    if end_s - start_s < config.min_clip_s:
        counts["dropped_short"] += 1
        return None
    return TimedClip(uid, pass_name, index, time_s, start_s, end_s)
