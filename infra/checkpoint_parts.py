"""How the parts that ranks have written become one folder, off the training path.

Ranks meet in the file system alone. The folder of a save in progress holds

    rank-00000/       what a rank has written and not handed in yet
    rank-00000.json   its receipt: names, sizes and sha256 of what it has handed in, or what went wrong
    whole/            the checkpoint to be
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infra.checkpoint_files import (
    MANIFEST,
    CheckpointError,
    FileFacts,
    files_of,
    parse_files,
    parse_json,
    sha256_of,
)
from infra.durable import flush

logger = logging.getLogger(__name__)

_POLL_S = 0.01


def part_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}"


def whole_of(folder: Path) -> Path:
    return folder / "whole"


def hand_in(folder: Path, rank: int) -> None:
    """Flush, hash and move a rank's files into the whole; the receipt says that they are there.

    When that fails the receipt says so instead, and the error is raised.
    """
    try:
        files = _hand_in_files(part_of(folder, rank), whole_of(folder))
    except Exception as error:
        try:
            _write_receipt(folder, rank, {"error": f"{type(error).__name__}: {error}"})
        except OSError as untold:
            logger.error("rank 0 could not be told, and will wait for this rank in vain: %s", untold)
        raise
    _write_receipt(folder, rank, {"files": {name: asdict(facts) for name, facts in files.items()}})


def collect(folder: Path, world_size: int, timeout_s: float) -> dict[str, FileFacts]:
    """What all ranks have handed in, every file of which is there with its size.

    Raises CheckpointError when a rank reports an error or nothing at all for `timeout_s`, when two ranks wrote a file
    of one name, and when a file is not as its receipt says.
    """
    ends_s = time.monotonic() + timeout_s
    files: dict[str, FileFacts] = {}
    waiting = list(range(world_size))
    while waiting:
        for rank in [rank for rank in waiting if _receipt_of(folder, rank).is_file()]:
            part = _read_receipt(folder, rank)
            if doubles := sorted(part.keys() & files.keys()):
                raise CheckpointError(
                    f"rank {rank} and one before it both wrote {', '.join(doubles)}; one would be lost: give the "
                    "files of each rank names of their own"
                )
            files |= part
            waiting.remove(rank)
        if waiting and time.monotonic() > ends_s:
            raise CheckpointError(
                f"after {timeout_s:.0f} s nothing has come from rank {', '.join(map(str, waiting))}; their logs may "
                "say why"
            )
        if waiting:
            time.sleep(_POLL_S)
    if not files:
        raise CheckpointError("nothing was written; a checkpoint cannot be empty")
    _require_sizes(whole_of(folder), files)
    return files


def _hand_in_files(part: Path, whole: Path) -> dict[str, FileFacts]:
    files, folders = {}, {whole}
    for name, path in files_of(part).items():
        if name == MANIFEST:
            raise CheckpointError(f"a rank wrote {MANIFEST}, which is the name of the list of files")
        flush(path)
        files[name] = FileFacts(path.stat().st_size, sha256_of(path))
        place = whole / name
        place.parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, place)
        folders |= {whole / above for above in Path(name).parents}
    for folder in folders:
        flush(folder)
    shutil.rmtree(part)
    return files


def _require_sizes(whole: Path, files: Mapping[str, FileFacts]) -> None:
    for name, facts in files.items():
        size = (whole / name).stat().st_size if (whole / name).is_file() else None
        if size != facts.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(f"{name} {found}, the rank that wrote it says {facts.bytes} bytes")


def _receipt_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def _write_receipt(folder: Path, rank: int, content: Mapping[str, Any]) -> None:
    """Whole or absent, and the last that a rank does here: as soon as it is seen, rank 0 may publish and remove the
    folder. It need not outlive a loss of power, which ends the save with it.
    """
    receipt = _receipt_of(folder, rank)
    unfinished = receipt.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.rename(unfinished, receipt)


def _read_receipt(folder: Path, rank: int) -> dict[str, FileFacts]:
    path = _receipt_of(folder, rank)
    found = parse_json(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(found, dict) or found.keys() not in ({"files"}, {"error"}):
        raise CheckpointError(f"{path} is not a receipt")
    if "error" in found:
        raise CheckpointError(f"rank {rank} could not hand in its part: {found['error']}")
    return parse_files(found["files"], str(path))
