"""Generates a world: videos in parallel processes, then narrations, taxonomy and split."""

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import cv2

from pipeline.atomic import write_text_atomically
from pipeline.config import WorldConfig
from pipeline.script import VideoSpec, video_specs
from pipeline.wording import narration_document, world_taxonomy
from pipeline.world import is_complete, write_video


@dataclass(frozen=True, slots=True)
class SynthSummary:
    """What a world holds and what this call had to do for it."""

    num_train_videos: int
    num_heldout_videos: int
    num_written: int
    num_actions: int
    video_s: float
    size_bytes: int
    elapsed_s: float


def run_synth(
    out_dir: Path,
    config: WorldConfig,
    num_workers: int | None = None,
    progress: Callable[[str], None] | None = None,
    on_video: Callable[[int, int], None] | None = None,
) -> SynthSummary:
    """Writes out_dir/videos/<uid>.mp4, narration.json, taxonomy.json and splits.json.

    Videos already complete for this config are left alone: a second call does nothing. num_workers None:
    one process per core this process may use. progress gets a line at the start and at the end; on_video
    gets (videos there, all videos) after each video.
    """
    started_s = time.monotonic()
    say = progress or _ignore
    specs = video_specs(config)
    paths = {spec.video_uid: out_dir / "videos" / f"{spec.video_uid}.mp4" for spec in specs}
    todo = [spec for spec in specs if not is_complete(spec, paths[spec.video_uid])]
    num_workers = num_workers or len(os.sched_getaffinity(0))
    if todo:
        say(f"drawing {len(todo)} of {len(specs)} videos in {min(num_workers, len(todo))} processes")
        _write_videos(todo, paths, num_workers, len(specs), on_video)
    _write_descriptions(out_dir, specs)
    summary = SynthSummary(
        num_train_videos=config.num_train_videos,
        num_heldout_videos=config.num_heldout_videos,
        num_written=len(todo),
        num_actions=sum(len(spec.actions) for spec in specs),
        video_s=sum(spec.duration_s for spec in specs),
        size_bytes=sum(path.stat().st_size for path in paths.values()),
        elapsed_s=time.monotonic() - started_s,
    )
    say(
        f"world of {len(specs)} videos ({summary.video_s:.0f} s, {summary.num_actions} actions) "
        f"in {out_dir}: {len(todo)} drawn, {len(specs) - len(todo)} already there, {summary.elapsed_s:.1f} s"
    )
    return summary


def _write_videos(
    todo: list[VideoSpec],
    paths: dict[str, Path],
    num_workers: int,
    total: int,
    on_video: Callable[[int, int], None] | None,
) -> None:
    # The longest first, so that no process ends with a long video while the others are idle.
    todo = sorted(todo, key=lambda spec: -spec.duration_s * spec.picture.width * spec.picture.height)
    there = total - len(todo)
    pool = ProcessPoolExecutor(
        max_workers=min(num_workers, len(todo)), mp_context=get_context("spawn"), initializer=_one_thread
    )
    with pool:
        futures = [pool.submit(write_video, spec, paths[spec.video_uid]) for spec in todo]
        try:
            for future in as_completed(futures):
                future.result()
                there += 1
                if on_video is not None:
                    on_video(there, total)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write_descriptions(out_dir: Path, specs: list[VideoSpec]) -> None:
    splits = {
        "train": [spec.video_uid for spec in specs if not spec.is_heldout],
        "heldout": [spec.video_uid for spec in specs if spec.is_heldout],
    }
    documents = {
        "taxonomy.json": world_taxonomy().to_json(),
        "splits.json": splits,
        "narration.json": narration_document(specs),
    }
    for name, value in documents.items():
        write_text_atomically(out_dir / name, json.dumps(value, indent=1) + "\n")


def _one_thread() -> None:
    """One process draws one video; its libraries must not take the other cores as well."""
    cv2.setNumThreads(1)


def _ignore(_: str) -> None:
    pass
