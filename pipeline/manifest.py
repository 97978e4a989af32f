"""A set of shards: manifest.json, the clip index, the rejections, published together.

The manifest is written last and atomically, so a set with a manifest is complete. Its fingerprint covers the
settings, the checksums of all shards and of the files beside them; checkpoints and reports carry it.
"""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.atomic import replaced_whole, write_atomically
from pipeline.crash_log import SUFFIX as CRASH_SUFFIX
from pipeline.errors import DataError, ShardError
from pipeline.shards import (
    ShardReceipt,
    ShardSummary,
    read_receipt,
    sha256_of_file,
    shard_paths,
    to_json_bytes,
)
from pipeline.storage import StoragePath, file_sizes, storage_path

MANIFEST_FORMAT = 1
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.parquet"
REJECTED_FILE = "rejected.jsonl"
MAX_FAULTS = 10
_ROWS_AT_ONCE = 1 << 14
_SHARD_FILE = re.compile(r"(shard-\d{5,})\.(tar|json)")

INDEX_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("shard", pa.int32()),
        ("video_uid", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("narration_s", pa.float64()),
        ("caption", pa.string()),
        ("verbs", pa.list_(pa.int32())),
        ("nouns", pa.list_(pa.int32())),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("frame_offsets", pa.list_(pa.int64())),
        ("frame_sizes", pa.list_(pa.int32())),
        ("frame_crc32", pa.list_(pa.uint32())),
    ]
)


class ShardEntry(BaseModel):
    """One shard of the set. A shard whose clips were all rejected has no entry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: str
    bytes: int
    num_clips: int


class Manifest(BaseModel):
    """What a set of shards holds. `settings` are those of prepare, `source` the annotation file and its
    counts.

    `files` maps the name of a file beside the manifest (vocab.txt, questions.json) to its SHA-256.
    `num_verbs` and `num_nouns` are the widths of the multi-hot tags.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = MANIFEST_FORMAT
    name: str
    fingerprint: str
    num_clips: int
    num_planned: int
    num_rejected: int
    rejected_by_reason: dict[str, int]
    repeated_frames: int
    clips_with_repeated_frames: int
    bytes: int
    num_frames: int
    num_verbs: int
    num_nouns: int
    shards: tuple[ShardEntry, ...]
    files: dict[str, str]
    settings: dict[str, Any]
    taxonomy: dict[str, Any] | None
    source: dict[str, Any]


def build_manifest(
    name: str,
    shards: Sequence[ShardSummary],
    settings: Mapping[str, Any],
    files: Mapping[str, str],
    taxonomy: Mapping[str, Any] | None,
    num_tags: tuple[int, int],
    source: Mapping[str, Any],
) -> Manifest:
    """Sum up shards (in order of name). `num_tags` = (num_verbs, num_nouns)."""
    entries = tuple(
        ShardEntry(name=shard.name, sha256=shard.sha256, bytes=shard.bytes, num_clips=shard.num_clips)
        for shard in shards
        if shard.num_clips
    )
    reasons = Counter(rejected.reason.value for shard in shards for rejected in shard.rejected)
    num_clips = sum(shard.num_clips for shard in shards)
    covered = {
        "format": MANIFEST_FORMAT,
        "settings": settings,
        "shards": [entry.sha256 for entry in entries],
        "files": files,
        "taxonomy": taxonomy,
    }
    return Manifest(
        name=name,
        fingerprint=hashlib.sha256(to_json_bytes(covered)).hexdigest(),
        num_clips=num_clips,
        num_planned=num_clips + sum(reasons.values()),
        num_rejected=sum(reasons.values()),
        rejected_by_reason=dict(sorted(reasons.items())),
        repeated_frames=sum(shard.repeated_frames for shard in shards),
        clips_with_repeated_frames=sum(shard.clips_with_repeated_frames for shard in shards),
        bytes=sum(entry.bytes for entry in entries),
        num_frames=settings["num_frames"],
        num_verbs=num_tags[0],
        num_nouns=num_tags[1],
        shards=entries,
        files=dict(files),
        settings=dict(settings),
        taxonomy=dict(taxonomy) if taxonomy is not None else None,
        source=dict(source),
    )


def write_rejected(out_dir: str | StoragePath, shards: Sequence[ShardSummary]) -> StoragePath:
    """Write rejected.jsonl, one clip a line, in plan order; an empty file when nothing was rejected."""
    path = storage_path(out_dir) / REJECTED_FILE
    lines = [
        to_json_bytes({**rejected.model_dump(mode="json"), "shard": shard.name})
        for shard in shards
        for rejected in shard.rejected
    ]
    write_atomically(path, b"".join(lines))
    return path


def write_index(out_dir: str | StoragePath, receipts: Iterable[ShardReceipt]) -> None:
    """Write index.parquet, clips in order of shard, a receipt at a time: a large set does not fit into memory."""
    path = storage_path(out_dir) / INDEX_FILE
    with (
        replaced_whole(path) as partial,
        pq.ParquetWriter(partial, INDEX_SCHEMA, compression="zstd") as writer,
    ):
        rows: list[dict[str, Any]] = []
        number = 0
        for receipt in receipts:
            if not receipt.clips:
                continue
            rows.extend(
                {**clip.model_dump(include=set(INDEX_SCHEMA.names)), "shard": number}
                for clip in receipt.clips
            )
            number += 1
            if len(rows) >= _ROWS_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA))


def _index_rows(receipt: ShardReceipt, number: int) -> pa.Table:
    rows = [{**clip.model_dump(include=set(INDEX_SCHEMA.names)), "shard": number} for clip in receipt.clips]
    return pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)


def indexed_captions(out_dir: str | StoragePath) -> Iterator[str]:
    """Captions of all stored clips."""
    with (storage_path(out_dir) / INDEX_FILE).open("rb") as opened, pq.ParquetFile(opened) as file:
        for batch in file.iter_batches(columns=["caption"]):
            yield from batch["caption"].to_pylist()


def write_manifest(out_dir: str | StoragePath, manifest: Manifest, shard_names: Iterable[str]) -> None:
    """Publish a finished set, whose other files are written, then remove shards that no longer belong to it.

    `shard_names` are those of all receipts: a shard whose clips were all rejected has one too.
    """
    write_atomically(storage_path(out_dir) / MANIFEST_FILE, to_json_bytes(manifest.model_dump(mode="json")))
    current = set(shard_names)
    for path in storage_path(out_dir).iterdir():
        match = _SHARD_FILE.fullmatch(path.name)
        is_stale = match is not None and match.group(1) not in current
        if is_stale or (path.name.startswith(".") and path.name.endswith((".partial", CRASH_SUFFIX))):
            path.unlink(missing_ok=True)


def require_tags(manifest: Manifest) -> None:
    """Raises DataError when no clip of the set has verb and noun classes: positives by action would be the clip alone,
    and EgoNCE would quietly be another loss.
    """
    # Absent in the manifests of earlier versions.
    if manifest.source.get("has_tags") is not False:
        return
    raise DataError(
        f"the clips of {manifest.source['file']} (format {manifest.source['format']}) have no verb and noun classes, "
        "which model.vtc_positives: action (EgoNCE) needs; set model.vtc_positives: identity, or prepare from "
        "annotations that have them"
    )


def unpublish(out_dir: str | StoragePath) -> None:
    """Take the manifest away before shards are replaced: a half-changed set must not look complete."""
    (storage_path(out_dir) / MANIFEST_FILE).unlink(missing_ok=True)


def read_manifest(shards_dir: str | StoragePath) -> Manifest:
    """Read manifest.json. Raises ShardError when it is absent, damaged or of another format version."""
    path = storage_path(shards_dir) / MANIFEST_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ShardError(
            f"read {path}: {error.strerror}; the shards are unfinished or elsewhere. "
            "Run prepare, which goes on where it stopped"
        ) from error
    try:
        found_format = json.loads(content).get("format")
        if found_format != MANIFEST_FORMAT:
            raise ShardError(
                f"read {path}: format {found_format}, expected {MANIFEST_FORMAT}; run prepare again"
            )
        return Manifest.model_validate_json(content)
    except (ValidationError, ValueError, AttributeError) as error:
        raise ShardError(f"read {path}: {error}; run prepare again: it rewrites the file") from error


def verify_set(shards_dir: str | StoragePath, manifest: Manifest, is_full: bool = True) -> list[str]:
    """Names and faults of files that differ from the manifest: sizes always, checksums when `is_full`."""
    if is_full:
        shard_faults = [verify_shard(shards_dir, entry) for entry in manifest.shards]
    else:
        # One listing: a store takes long to answer for thousands of shards one by one.
        sizes = file_sizes(storage_path(shards_dir))
        shard_faults = [_verify_size(entry, sizes.get(f"{entry.name}.tar")) for entry in manifest.shards]
    return [*itertools.chain.from_iterable(shard_faults), *verify_files(shards_dir, manifest)]


def verify_shard(shards_dir: str | StoragePath, entry: ShardEntry) -> list[str]:
    """Faults of one shard and of its receipt; reads it whole."""
    tar_path, receipt_path = shard_paths(shards_dir, entry.name)
    faults = _verify_size(entry, tar_path.stat().st_size if tar_path.is_file() else None)
    if not faults and sha256_of_file(tar_path) != entry.sha256:
        faults.append(f"{tar_path.name}: its SHA-256 differs from the manifest")
    try:
        receipt = read_receipt(receipt_path)
    except ShardError as error:
        faults.append(f"{receipt_path.name}: {error}")
    else:
        if (receipt.sha256, receipt.num_clips) != (entry.sha256, entry.num_clips):
            faults.append(f"{receipt_path.name}: is of another shard than the manifest's")
    return faults


def _verify_size(entry: ShardEntry, found_bytes: int | None) -> list[str]:
    if found_bytes is None:
        return [f"{entry.name}.tar: missing"]
    if found_bytes != entry.bytes:
        return [f"{entry.name}.tar: {found_bytes} bytes, the manifest says {entry.bytes}"]
    return []


def verify_files(shards_dir: str | StoragePath, manifest: Manifest) -> list[str]:
    """Faults of the files beside the shards."""
    faults: list[str] = []
    for name, sha256 in manifest.files.items():
        path = storage_path(shards_dir) / name
        if not path.is_file():
            faults.append(f"{name}: missing")
        elif sha256_of_file(path) != sha256:
            faults.append(f"{name}: its SHA-256 differs from the manifest")
    return faults


def read_index(path: StoragePath) -> pa.Table:
    """index.parquet as a table. Raises OSError or ArrowException."""
    with path.open("rb") as file:
        return pq.read_table(file, schema=INDEX_SCHEMA)


def verify_index(shards_dir: str | StoragePath, manifest: Manifest) -> list[str]:
    """Shards whose rows in the index are not those of their receipt; receipts that cannot be read are left out."""
    path = storage_path(shards_dir) / INDEX_FILE
    try:
        index = read_index(path)
    except (OSError, pa.ArrowException) as error:
        return [f"{INDEX_FILE}: {error}"]
    if index.num_rows != manifest.num_clips:
        return [f"{INDEX_FILE}: {index.num_rows} clips, the manifest has {manifest.num_clips}"]
    faults: list[str] = []
    first = 0
    for number, entry in enumerate(manifest.shards):
        rows = index.slice(first, entry.num_clips)
        first += entry.num_clips
        try:
            receipt = read_receipt(shard_paths(shards_dir, entry.name)[1])
        except ShardError:
            continue
        if not rows.equals(_index_rows(receipt, number)):
            faults.append(f"{INDEX_FILE}: clips of {entry.name} differ from its receipt")
    return faults


def require_whole(shards_dir: str | StoragePath, manifest: Manifest, is_full: bool = True) -> None:
    """Raises ShardError, naming the files, when the set on disk differs from its manifest; see `verify_set`."""
    faults = verify_set(shards_dir, manifest, is_full)
    if faults:
        more = f"; and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
        raise ShardError(
            f"checked {shards_dir}: {'; '.join(faults[:MAX_FAULTS])}{more}. The manifest says otherwise: run "
            "prepare again, which rebuilds what is missing or damaged"
        )
