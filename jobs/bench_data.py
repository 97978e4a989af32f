"""`svitt bench data`: loading and preparation on this machine against what users have and against the limit.

Loading: our loader on prepared shards against a Dataset that opens the video of every clip. Preparation: whole shards
against decoding alone. Samples of both sides alternate; figures count only against others of the same run.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from infra.runtime import keep_freed_memory
from jobs.bench_loading import Loading, clips_in_videos, measure_loading
from jobs.bench_peer import VideoClip, VideoClips
from jobs.bench_preparing import Preparing, measure_preparing, plan_again
from jobs.bench_record import BenchError, Ratio, Record, Spread, print_table
from jobs.pretrain import open_store, open_tokenizer
from jobs.progress import ProgressReport
from jobs.recipe import Recipe
from pipeline.loader import BatchLoader
from pipeline.store import ClipStore
from pipeline.video import probe

RECORD_VERSION = 1


@dataclass(frozen=True, slots=True)
class DataPlan:
    """What to measure. A round of loading shows `batches` batches, a round of preparing builds `shards` shards of at
    most `clips_per_shard` clips; 0 rounds leave a part out.
    """

    num_frames: int = 4
    image_size: int = 224
    batch_size: int = 16
    batches: int = 16
    loading_rounds: int = 5
    shards: int = 2
    clips_per_shard: int = 256
    preparing_rounds: int = 5

    @staticmethod
    def quick() -> "DataPlan":
        """Few samples of little: a look, no figure to publish."""
        return DataPlan(batches=4, loading_rounds=3, shards=1, clips_per_shard=64, preparing_rounds=3)


def bench_data(
    recipe: Recipe, plan: DataPlan, num_threads: int, record_file: Path, report: ProgressReport
) -> int:
    """Measures, prints the tables, writes the record. Raises BenchError for settings that cannot be measured, and
    ShardError or DataError for shards that cannot be read.
    """
    _check(plan, num_threads)
    record = Record(record_file, RECORD_VERSION, num_threads, asdict(plan))

    # As in the process of a training stage.
    keep_freed_memory()
    with open_store(recipe, "train") as store:
        loader = _loader(recipe, plan, store, num_threads)
        clips = _clips_shown(recipe, plan, store, loader)
        record.keep("data", describe(recipe, store, clips))
        for line in detail_lines(record.parts["data"]):
            report.say(line)
        if plan.loading_rounds:
            videos = VideoClips(
                clips, plan.num_frames, plan.image_size, recipe.loader.crop_scale, recipe.loader.crop_aspect
            )
            with report.task("loading", plan.loading_rounds + 1) as task:
                loading = measure_loading(
                    loader, videos, plan.batch_size, num_threads, plan.loading_rounds, task.advance
                )
            record.keep("loading", asdict(loading))
            _show_loading(loading, plan, num_threads, report)
        if plan.preparing_rounds:
            plans = plan_again(store, plan.shards, plan.clips_per_shard, recipe.data.videos, recipe.prepare)
            with report.task("preparing", plan.preparing_rounds + 1) as task:
                preparing = measure_preparing(
                    plans, recipe.prepare, plan.preparing_rounds, record_file.parent, task.advance
                )
            record.keep("preparing", asdict(preparing))
            _show_preparing(preparing, recipe, report)
    report.say(f"record: {record_file}")
    return 0


def describe(recipe: Recipe, store: ClipStore, clips: Sequence[VideoClip]) -> dict[str, Any]:
    """What the figures depend on: size and coding of the videos, length of the clips, size of the stored frames."""
    headers = [probe(path, path) for path in sorted({clip.path for clip in clips})]
    return {
        "fingerprint": store.manifest.fingerprint,
        "num_clips": len(store),
        "num_videos_read": len(headers),
        "clip_s": asdict(Spread.of([clip.end_s - clip.start_s for clip in clips])),
        "codecs": sorted({header.codec for header in headers}),
        "video_short_side": asdict(Spread.of([min(header.height, header.width) for header in headers])),
        "video_fps": asdict(Spread.of([1 / header.frame_s for header in headers])),
        "layout": recipe.prepare.model_dump(mode="json")["layout"],
        "stored_frames_per_clip": store.num_frames,
        "stored_short_side": int(min(store.height.min(), store.width.min())),
        "crop_scale": list(recipe.loader.crop_scale),
    }


def detail_lines(data: dict[str, Any]) -> list[str]:
    """The data in words, and a warning where stored frames show less than the videos do."""
    video, stored = data["video_short_side"], data["stored_short_side"]
    lines = [
        f"{data['num_clips']} clips of {data['clip_s']['median']:.2f} s (median) in {', '.join(data['codecs'])} "
        f"videos of short side {video['least']:.0f} to {video['most']:.0f}, {data['video_fps']['median']:.0f} "
        f"frames/s; {data['stored_frames_per_clip']} stored frames of short side {stored}"
    ]
    if stored < min(video["least"], 224):
        lines.append(
            f"stored frames (short side {stored}) show less than the videos: loading is not compared on equal "
            "pictures. Prepare a set with --set prepare.short_side=256 --set data.shards=shards-256 and measure that"
        )
    return lines


def _check(plan: DataPlan, num_threads: int) -> None:
    needed = {
        "threads": num_threads,
        "batch": plan.batch_size,
        "batches": plan.batches,
        "shards": plan.shards,
        "clips per shard": plan.clips_per_shard,
    }
    low = {name: value for name, value in needed.items() if value < 1}
    if low or min(plan.loading_rounds, plan.preparing_rounds) < 0:
        raise BenchError(
            f"settings that cannot be measured: {low or 'negative rounds'}; each has to be 1 or more"
        )


def _loader(recipe: Recipe, plan: DataPlan, store: ClipStore, num_threads: int) -> BatchLoader:
    config = recipe.loader.model_copy(update={"image_size": plan.image_size, "num_threads": num_threads})
    return BatchLoader(
        store, open_tokenizer(recipe), config, plan.num_frames, recipe.seed, global_batch_size=plan.batch_size
    )


def _clips_shown(recipe: Recipe, plan: DataPlan, store: ClipStore, loader: BatchLoader) -> list[VideoClip]:
    """Clips of the timed steps, 1 to `batches`, in the order shown; step 0 warms up."""
    rows = [view.row for step in range(1, plan.batches + 1) for view in loader.views(step)]
    places = clips_in_videos(store, rows, recipe.data.videos, recipe.prepare.layout)
    return [places[store.clip_id(row)] for row in rows]


def _show_loading(loading: Loading, plan: DataPlan, num_threads: int, report: ProgressReport) -> None:
    print_table(report.console, loading_table(loading, plan, num_threads))
    report.say(
        f"loading: {_words(loading.speedup)} times the clips/s of a DataLoader on the videos; "
        f"it takes {_words(loading.cpu_saving)} times our processor time a clip"
    )


def loading_table(loading: Loading, plan: DataPlan, num_threads: int) -> Table:
    """Both ways of loading."""
    shown = Table(
        title=f"Loading {plan.num_frames} frames of {plan.image_size} x {plan.image_size}, uint8, batches of "
        f"{plan.batch_size}, {num_threads} threads or workers",
        title_justify="left",
    )
    shown.add_column("way")
    for name in ("clips/s", "spread", "CPU ms/clip", "spread", "wait ms/step", "most", "KiB read/clip"):
        shown.add_column(name, justify="right")
    for row in loading.rows:
        shown.add_row(
            row.name,
            f"{row.clips_per_s.median:.1f}",
            _range(row.clips_per_s),
            f"{row.cpu_ms_per_clip.median:.2f}",
            _range(row.cpu_ms_per_clip),
            f"{row.wait_ms_per_step.median:.1f}",
            f"{row.wait_ms_per_step.most:.1f}",
            f"{row.bytes_per_clip / 1024:.1f}",
        )
    return shown


def _show_preparing(preparing: Preparing, recipe: Recipe, report: ProgressReport) -> None:
    print_table(report.console, preparing_table(preparing, recipe))
    report.say(
        f"preparing: {_words(preparing.share_of_decoding)} of the rate of decoding alone, "
        f"{_words(preparing.cpu_share_of_decoding)} by processor time"
    )


def preparing_table(preparing: Preparing, recipe: Recipe) -> Table:
    """Whole shards and decoding alone."""
    config = recipe.prepare
    shown = Table(
        title=f"Preparing {preparing.num_clips} clips ({preparing.video_s:.0f} s of video), {config.num_frames} "
        f"frames a clip, short side {config.short_side}, {config.decoder}, one process",
        title_justify="left",
    )
    shown.add_column("work")
    names = ("video s/s", "spread", "clips/s", "video s/CPU s", "spread", "clips/CPU s")
    for name in names:
        shown.add_column(name, justify="right")
    for row in preparing.rows:
        shown.add_row(
            row.name,
            f"{row.video_s_per_s.median:.1f}",
            _range(row.video_s_per_s),
            f"{row.clips_per_s.median:.1f}",
            f"{row.video_s_per_cpu_s.median:.1f}",
            _range(row.video_s_per_cpu_s),
            f"{row.clips_per_cpu_s.median:.1f}",
        )
    return shown


def _range(spread: Spread) -> str:
    return f"{spread.least:.3g}-{spread.most:.3g} (n {spread.n})"


def _words(ratio: Ratio) -> str:
    return f"{ratio.of_medians:.2f} ({ratio.rounds.least:.2f}-{ratio.rounds.most:.2f}, n {ratio.rounds.n})"
