"""The first pass of preparation: the files of every video, and what they say of themselves, as `videos.parquet`.

It is written before any shard is built, so that a person can look at it while that takes its time.
"""

import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jobs.prepare_work import SetWork
from pipeline.crash_log import CrashLog
from pipeline.errors import DataError, VideoError
from pipeline.prepare import find_video
from pipeline.storage import StoragePath
from pipeline.video import VideoTimeline
from pipeline.video_manifest import VideoFileFacts, probe_files, read_videos, write_videos

# The rates that most files have are named one by one.
NUM_RATES = 4


@dataclass(frozen=True, slots=True, repr=False)
class _VideoToProbe:
    """A video, and what is known of its files from an earlier run."""

    video_uid: str
    known: tuple[VideoFileFacts, ...]

    def __repr__(self) -> str:
        return f"video {self.video_uid}"


@dataclass(frozen=True, slots=True)
class _ProbedVideo:
    video_uid: str
    found: VideoTimeline | VideoError
    files: tuple[VideoFileFacts, ...]


def probe_videos(work: SetWork, video_uids: Sequence[str]) -> dict[str, VideoTimeline | VideoError]:
    """Finds the files of every video, or why there are none; writes the facts of all files, videos in the order given.

    Files that an earlier run has looked at and that are unchanged are not opened.
    """

    # A plain function, no partial: Ray makes tasks of nothing else.
    def probe(video: _VideoToProbe) -> _ProbedVideo:
        _, found = find_video(video.video_uid, videos_dir, layout)
        crash_log = None
        if not isinstance(found, VideoError):
            crash_log = CrashLog(out_dir, f"video-{video.video_uid}", run_key)
        files = probe_files(found, videos_dir, video.known, crash_log)
        return _ProbedVideo(video.video_uid, found, files)

    videos_dir, out_dir, layout = work.videos_dir, work.out_dir, work.config.layout
    run_key = uuid.uuid4().hex[:8]
    known = _known_files(out_dir)
    videos = [_VideoToProbe(video_uid, tuple(known.pop(video_uid, ()))) for video_uid in video_uids]
    probed: dict[str, _ProbedVideo] = {}
    with work.progress.task(f"{work.name}: looking at videos", len(videos)) as task:
        for video in work.mapper(probe, videos):
            probed[video.video_uid] = video
            task.advance()
    files = [facts for video_uid in video_uids for facts in probed[video_uid].files]
    write_videos(out_dir, files)
    work.progress.say(f"{work.name}: {describe_videos(files)}")
    return {video_uid: probed[video_uid].found for video_uid in video_uids}


def _known_files(out_dir: StoragePath) -> dict[str, list[VideoFileFacts]]:
    known: dict[str, list[VideoFileFacts]] = {}
    try:
        for facts in read_videos(out_dir):
            known.setdefault(facts.video_uid, []).append(facts)
    except DataError:
        # Absent, damaged or of another version: everything in it can be read again.
        return {}
    return known


def describe_videos(files: Iterable[VideoFileFacts]) -> str:
    """One line: videos and hours that can be used, files by codec and by rate, and what cannot be used by reason."""
    files = list(files)
    usable = [facts for facts in files if facts.reason is None]
    num_videos = len({facts.video_uid for facts in usable})
    in_files = f" in {len(usable)} files" if len(usable) != num_videos else ""
    hours = sum(facts.duration_s or 0.0 for facts in usable) / 3600
    said = [f"{num_videos} videos{in_files}, {hours:.1f} hours"]
    if usable:
        said[0] += f", {_counts(Counter(facts.codec for facts in usable))}"
        said.append(_rates(usable))
    if num_cut := sum(bool(facts.is_cut_short) for facts in usable):
        said.append(f"{num_cut} cut short")
    reasons = Counter(facts.reason.value for facts in files if facts.reason is not None)
    if reasons:
        said.append(f"{reasons.total()} unusable ({_counts(reasons)})")
    return "; ".join(said)


def _rates(files: Sequence[VideoFileFacts]) -> str:
    rates = Counter(_rate(facts) for facts in files)
    others = sum(count for _, count in rates.most_common()[NUM_RATES:])
    named = _counts(dict(rates.most_common(NUM_RATES)))
    return f"{named}, other rates {others}" if others else named


def _rate(facts: VideoFileFacts) -> str:
    # A mean of varying intervals is hardly ever that of another file.
    if facts.is_rate_varying:
        return "varying rate"
    return f"{facts.fps:.4g} fps" if facts.fps is not None else "unknown rate"


def _counts(counts: dict[str, int] | Counter[str | None]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda pair: -pair[1]))
