"""Annotations and videos to verified shards: `train` from an EgoClip file, `egomcq` from an EgoMCQ file.

Where the work runs is an argument: `mapper(fn, items)` yields results in any order. A rerun does what is
missing; the bytes do not depend on the number of workers.
"""

import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.prepare_size import find_clips_per_shard
from jobs.prepare_videos import probe_videos
from jobs.prepare_work import Mapper, SetWork
from jobs.progress import ProgressReport
from pipeline.atomic import write_atomically
from pipeline.clip_table import ClipTable
from pipeline.config import PrepareConfig
from pipeline.egoclip import read_egoclip
from pipeline.egomcq import read_egomcq
from pipeline.epic_kitchens import read_epic_kitchens
from pipeline.errors import DataError, Reason, ShardError, TooManyRejectedError
from pipeline.lavila import read_lavila
from pipeline.manifest import (
    REJECTED_FILE,
    Manifest,
    build_manifest,
    indexed_captions,
    unpublish,
    write_index,
    write_manifest,
    write_rejected,
)
from pipeline.narrations import Taxonomy, read_taxonomy
from pipeline.prepare import ShardPlan, build_shard, plan_shards, shard_settings
from pipeline.questions import QUESTIONS_FILE, build_question_set, questions_to_bytes
from pipeline.read_report import ReadReport
from pipeline.shards import ShardReceipt, ShardSummary, read_receipt, sha256_of_file, shard_paths
from pipeline.storage import StoragePath, make_folder, storage_path
from pipeline.text import build_vocabulary

READERS = {"egoclip": read_egoclip, "epic_kitchens": read_epic_kitchens, "lavila": read_lavila}
VOCABULARY_FILE = "vocab.txt"
TRAIN, EGOMCQ = "train", "egomcq"
NUM_EXAMPLES = 5
# Rows that carried a clip and do not any more; a repeated row is no loss.
LOST_ROW_REASONS = (Reason.BAD_ROW, Reason.END_BEFORE_START, Reason.OUTSIDE_VIDEO, Reason.EMPTY_CAPTION)


@dataclass(frozen=True)
class PrepareResult:
    """The published sets. `read_report` says what became of the rows of the EgoClip file."""

    train: Manifest
    egomcq: Manifest | None
    read_report: ReadReport


@dataclass(frozen=True)
class _ShardSet:
    """One set under way: where it goes, its shards in order, and what reading its annotations said."""

    name: str
    out_dir: StoragePath
    shards: list[ShardSummary]
    read_report: ReadReport

    def receipts(self) -> Iterator[ShardReceipt]:
        """Read again from disk, one after the other."""
        return (read_receipt(shard_paths(self.out_dir, shard.name)[1]) for shard in self.shards)

    @property
    def num_lost_rows(self) -> int:
        return sum(self.read_report.counts.get(reason, 0) for reason in LOST_ROW_REASONS)

    @property
    def num_rejected(self) -> int:
        return sum(len(shard.rejected) for shard in self.shards)

    @property
    def stored_ids(self) -> set[str]:
        return {clip.clip_id for receipt in self.receipts() for clip in receipt.clips}


def run_prepare(
    egoclip: str | StoragePath,
    egomcq_json: str | StoragePath | None,
    videos_dir: str | StoragePath,
    taxonomy: str | StoragePath | None,
    out_dir: str | StoragePath,
    config: PrepareConfig,
    mapper: Mapper,
    progress: ProgressReport,
    egoclip_format: str = "egoclip",
) -> PrepareResult:
    """Prepare out_dir/train and, when an EgoMCQ file is given, out_dir/egomcq.

    Raises DataError for annotations that cannot be used at all, and TooManyRejectedError when more than
    `config.max_rejected_share` of a set is lost; by then all shards and the list of losses are on disk.
    """
    # Tasks may run in another working directory.
    videos_dir, out_dir = storage_path(videos_dir).absolute(), storage_path(out_dir).absolute()
    clips, read_report = READERS[egoclip_format](storage_path(egoclip))
    if not clips:
        raise DataError(f"read {egoclip}: no row can be used: {'; '.join(read_report.lines())}")
    # Once, here: shards are cut from sorted clips, and the unsorted ones need not be kept for as long as that takes.
    clips = clips.in_order()
    questions = read_egomcq(storage_path(egomcq_json)) if egomcq_json is not None else []
    choices = ClipTable.of({c.clip_id: c for question in questions for c in question.choices}.values())
    found_taxonomy = read_taxonomy(storage_path(taxonomy)) if taxonomy is not None else None
    num_tags = _num_tags((clips, choices), found_taxonomy)

    def build(name: str, clips: ClipTable, read_report: ReadReport) -> _ShardSet:
        work = SetWork(name, str(videos_dir), out_dir / name, config, mapper, progress)
        shards = _build_shards(work, clips)
        write_rejected(work.out_dir, shards)
        return _ShardSet(name, work.out_dir, shards, read_report)

    def publish(built: _ShardSet, files: dict[str, bytes], source: dict[str, Any]) -> Manifest:
        return _publish(built, files, shard_settings(config), found_taxonomy, num_tags, source)

    train = build(TRAIN, clips, read_report)
    # The reader of questions refuses a file with an unusable entry: it has no such rows to report.
    mcq = build(EGOMCQ, choices, ReadReport()) if questions else None
    _hold_to_budget([train] if mcq is None else [train, mcq], config.max_rejected_share)
    write_index(train.out_dir, train.receipts())
    vocabulary = build_vocabulary(indexed_captions(train.out_dir))
    vocabulary_bytes = "".join(f"{token}\n" for token in vocabulary).encode()
    source = {
        **_train_source(egoclip, read_report),
        "format": egoclip_format,
        "has_tags": all(clips.largest_tag(kind)[0] >= 0 for kind in ("verbs", "nouns")),
    }
    train_manifest = publish(train, {VOCABULARY_FILE: vocabulary_bytes}, source)
    if mcq is None or egomcq_json is None:
        return PrepareResult(train_manifest, None, read_report)
    reversed_verbs = found_taxonomy.reversed_verbs if found_taxonomy is not None else ()
    write_index(mcq.out_dir, mcq.receipts())
    question_set = build_question_set(questions, mcq.stored_ids, reversed_verbs)
    mcq_source = {
        "file": storage_path(egomcq_json).name,
        "sha256": sha256_of_file(egomcq_json),
        "questions": len(questions),
        "unreadable": len(question_set.unreadable),
    }
    mcq_manifest = publish(mcq, {QUESTIONS_FILE: questions_to_bytes(question_set)}, mcq_source)
    return PrepareResult(train_manifest, mcq_manifest, read_report)


def _train_source(egoclip: str | StoragePath, report: ReadReport) -> dict[str, Any]:
    return {
        "file": storage_path(egoclip).name,
        "sha256": sha256_of_file(egoclip),
        "rows": report.rows,
        "kept": report.kept,
        "counts": {str(reason): count for reason, count in sorted(report.counts.items())},
    }


def _num_tags(tables: Sequence[ClipTable], taxonomy: Taxonomy | None) -> tuple[int, int]:
    """Widths of the multi-hot tags. Raises DataError for a tag that the taxonomy does not have."""
    widths: list[int] = []
    for kind in ("verbs", "nouns"):
        largest = -1
        names = getattr(taxonomy, kind) if taxonomy is not None else None
        for table in tables:
            tag, row = table.largest_tag(kind)
            if names is not None and tag >= len(names):
                raise DataError(
                    f"clip {table[row].clip_id} has the {kind} class {tag}, the taxonomy has {len(names)} {kind}; "
                    "use the taxonomy the clips were tagged with"
                )
            largest = max(largest, tag)
        widths.append(len(names) if names is not None else max(1, largest + 1))
    return widths[0], widths[1]


def _build_shards(work: SetWork, clips: ClipTable) -> list[ShardSummary]:
    """All shards of a set in order; what is finished and undamaged is only checked."""

    # A plain function, no partial: Ray makes tasks of nothing else.
    def build(plan: ShardPlan) -> ShardSummary:
        return build_shard(plan, out_dir, run_key=run_key).summary

    out_dir, run_key = work.out_dir, uuid.uuid4().hex[:8]
    make_folder(out_dir)
    timelines = probe_videos(work, clips.video_uids)
    ordered = clips.in_order()
    plans = plan_shards(ordered, timelines, work.config, find_clips_per_shard(work, ordered, timelines))
    if not all(_looks_finished(out_dir, plan) for plan in plans):
        unpublish(out_dir)
    shards: dict[str, ShardSummary] = {}
    num_clips = 0
    with work.progress.task(f"{work.name}: shards", len(plans)) as task:
        for shard in work.mapper(build, plans):
            shards[shard.name] = shard
            num_clips += shard.num_clips
            task.advance(note=f"{num_clips} clips")
    return [shards[shard_name] for shard_name in plans.names]


def _looks_finished(out_dir: StoragePath, plan: ShardPlan) -> bool:
    """Cheap look before the work: checksums are compared by the task itself."""
    tar_path, receipt_path = shard_paths(out_dir, plan.name)
    try:
        receipt = read_receipt(receipt_path)
    except ShardError:
        return False
    has_tar = tar_path.is_file() and tar_path.stat().st_size == receipt.bytes
    return receipt.content_key == plan.content_key and (has_tar or not receipt.clips)


def _hold_to_budget(sets: Sequence[_ShardSet], max_rejected_share: float) -> None:
    faults: list[str] = []
    for built in sets:
        num_clips = sum(shard.num_clips for shard in built.shards)
        lost = built.num_rejected + built.num_lost_rows
        share = lost / max(1, num_clips + lost)
        if num_clips and share <= max_rejected_share:
            continue
        faults.append(
            f"{built.name}: {lost} of {num_clips + lost} clips lost "
            f"({share:.1%}, allowed {max_rejected_share:.1%}): {_describe_losses(built)}"
        )
    if faults:
        raise TooManyRejectedError(
            "\n".join(faults)
            + "\nMend these rows and videos and run prepare again (finished shards are kept), or "
            "raise prepare.max_rejected_share."
        )


def _describe_losses(built: _ShardSet) -> str:
    """Counts by reason, then the rows with their line numbers, then one rejected clip of each video."""
    rejected = [clip for shard in built.shards for clip in shard.rejected]
    counts = [(reason, count) for reason, count in Counter(c.reason.value for c in rejected).most_common()]
    if built.num_lost_rows:
        counts.append(("unusable rows", built.num_lost_rows))
    lines = [", ".join(f"{reason} {count}" for reason, count in counts)]
    if built.num_lost_rows:
        lines.extend(built.read_report.lines())
    if rejected:
        lines.append(f"All rejected clips are listed in {built.out_dir / REJECTED_FILE}; one of each video:")
    num_of_video = Counter(clip.video_uid for clip in rejected)
    first_of_video = {clip.video_uid: clip for clip in reversed(rejected)}
    for video_uid, count in num_of_video.most_common(NUM_EXAMPLES):
        clip = first_of_video[video_uid]
        lines.append(f"    {video_uid} ({count} clips): {clip.clip_id}: {clip.reason.value}: {clip.detail}")
    if len(num_of_video) > NUM_EXAMPLES:
        lines.append(f"    and {len(num_of_video) - NUM_EXAMPLES} more videos")
    return "\n  ".join(lines)


def _publish(
    built: _ShardSet,
    files: dict[str, bytes],
    settings: dict[str, Any],
    taxonomy: Taxonomy | None,
    num_tags: tuple[int, int],
    source: dict[str, Any],
) -> Manifest:
    for file_name, content in files.items():
        write_atomically(built.out_dir / file_name, content)
    checksums = {file_name: sha256_of_file(built.out_dir / file_name) for file_name in files}
    manifest = build_manifest(
        built.name,
        built.shards,
        settings,
        checksums,
        taxonomy.to_json() if taxonomy is not None else None,
        num_tags,
        source,
    )
    write_manifest(built.out_dir, manifest, [shard.name for shard in built.shards])
    return manifest
