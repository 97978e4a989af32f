"""`svitt prepare --plan`: which videos a recipe needs, what of them is there, and what would be lost.

Only annotations are read, and file sizes looked at; no video is opened.
"""

from collections.abc import Iterable

from jobs.prepare import EGOMCQ, READERS, TRAIN
from jobs.recipe import Recipe
from pipeline.atomic import write_text_atomically
from pipeline.clip_table import ClipTable
from pipeline.config import PrepareConfig
from pipeline.egomcq import read_egomcq
from pipeline.errors import VideoError
from pipeline.layout import locate_files
from pipeline.shard_size import read_shard_size
from pipeline.storage import StoragePath, file_sizes, storage_path

NEEDED_FILE, ABSENT_FILE = "videos-needed.txt", "videos-absent.txt"
GIB = 2**30


def plan_lines(recipe: Recipe) -> list[str]:
    """The plan for a person. Writes the uids needed and absent as text files into the folder of the shards, one a
    line: what download tools take. Raises DataError for annotations that cannot be used.
    """
    data = recipe.data
    clips, report = READERS[data.egoclip_format](storage_path(data.egoclip))
    sets = {TRAIN: clips}
    if data.egomcq is not None:
        choices = {
            c.clip_id: c for question in read_egomcq(storage_path(data.egomcq)) for c in question.choices
        }
        sets[EGOMCQ] = ClipTable.of(choices.values())
    lines = report.lines()
    for name, table in sets.items():
        lines.extend(_set_lines(name, table, recipe))
    return lines


def _set_lines(name: str, clips: ClipTable, recipe: Recipe) -> list[str]:
    data, config = recipe.data, recipe.prepare
    by_video = clips.clips_by_video()
    absent: dict[str, VideoError] = {}
    num_bytes = 0
    for uid in by_video:
        try:
            files = locate_files(data.videos, uid, config.layout)
        except VideoError as error:
            absent[uid] = error
        else:
            num_bytes += sum(file.path.stat().st_size for file in files)
    out_dir = storage_path(data.shards) / name
    _write_uids(out_dir / NEEDED_FILE, by_video)
    _write_uids(out_dir / ABSENT_FILE, absent)
    hours = sum(end_s for _, end_s in by_video.values()) / 3600
    lost = sum(by_video[uid][0] for uid in absent)
    num_written = sum(name.startswith("shard-") and name.endswith(".tar") for name in file_sizes(out_dir))
    lines = [
        f"{name}: {len(clips)} clips of {len(by_video)} videos, {hours:.1f} hours up to their last clips "
        f"(listed in {out_dir / NEEDED_FILE})",
        f"{name}: {len(by_video) - len(absent)} videos are there, {num_bytes / GIB:.2f} GiB",
        f"{name}: {_shards_words(len(clips), out_dir, config)}, {num_written} are on disk",
    ]
    if absent:
        share = lost / len(clips)
        lines.append(
            f"{name}: {len(absent)} videos with {lost} clips ({share:.1%}, allowed "
            f"{config.max_rejected_share:.1%}) are absent (listed in {out_dir / ABSENT_FILE}), such as "
            f"{next(iter(absent.values())).detail}"
        )
    return lines


def _shards_words(num_clips: int, out_dir: StoragePath, config: PrepareConfig) -> str:
    clips_per_shard = config.clips_per_shard
    if clips_per_shard is None:
        size = read_shard_size(out_dir, config)
        if size is None:
            size_words = f"shards of {config.shard_mib:g} MiB"
            return f"the number of {size_words} follows from a sample of clips that prepare stores"
        clips_per_shard = size.clips_per_shard
    return f"{-(-num_clips // clips_per_shard)} shards of up to {clips_per_shard} clips"


def _write_uids(path: StoragePath, uids: Iterable[str]) -> None:
    write_text_atomically(path, "".join(f"{uid}\n" for uid in uids))
