"""What a checkpoint folder holds and whether it is whole: manifest, checksums, weights, durable writing.

Nothing here knows of steps being saved or deleted; that is `infra.checkpoint`.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
WEIGHTS_CARD = "model.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})")
_FORMAT = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")


class CheckpointError(Exception):
    """A checkpoint that cannot be written, or is damaged."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A published checkpoint whose checksums were right when it was opened.

    `world_size` is the number of ranks that wrote it; None where an older version did, which kept no record.
    """

    path: Path
    step: int
    meta: dict[str, Any]
    num_bytes: int
    world_size: int | None = None

    def load_weights(self) -> dict[str, Tensor]:
        """The whole model in fp32 on the CPU."""
        return load_weights(self.path)


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What is known of a file since it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The list that makes a folder a checkpoint. Names of files are relative to the folder, parted by `/`."""

    step: int
    meta: Mapping[str, Any]
    files: Mapping[str, FileFacts]
    world_size: int | None

    def to_json(self) -> str:
        found = {"format": _FORMAT, "step": self.step, "meta": dict(self.meta), "world_size": self.world_size}
        files = {name: asdict(facts) for name, facts in self.files.items()}
        return json.dumps({**found, "files": files}, indent=1, sort_keys=True) + "\n"


def open_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one published checkpoint. Raises CheckpointError that names the first faulty file.

    Files that the manifest does not list are not looked at; a warning names them.
    """
    manifest = read_manifest(path)
    named = STEP_FOLDER.fullmatch(path.name)
    if named and int(named.group(1)) != manifest.step:
        raise CheckpointError(f"{path / MANIFEST} is that of step {manifest.step}, not of this folder")
    try:
        for name, facts in manifest.files.items():
            _verify(path / name, facts)
        unlisted = files_of(path).keys() - manifest.files.keys() - {MANIFEST}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if unlisted:
        logger.warning("%s: not in its manifest and ignored: %s", path, ", ".join(sorted(unlisted)))
    num_bytes = sum(facts.bytes for facts in manifest.files.values())
    return Checkpoint(path, manifest.step, dict(manifest.meta), num_bytes, manifest.world_size)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint folder. Raises CheckpointError when it is missing, damaged or of another format."""
    file = path / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    return parse_manifest(text, str(file))


def parse_manifest(text: str, source: str) -> Manifest:
    """The manifest in `text`. Raises CheckpointError, which names `source`, for anything that this version does not
    write; an older version left out `world_size`.
    """
    found = parse_json(text, source)
    if not isinstance(found, dict) or not {"format", "step", "meta", "files"} <= found.keys():
        raise CheckpointError(f"{source} is not a checkpoint manifest")
    if found["format"] != _FORMAT:
        raise CheckpointError(f"{source} has format {found['format']}; this version reads format {_FORMAT}")
    step, meta, world_size = found["step"], found["meta"], found.get("world_size")
    if not is_count(step):
        raise CheckpointError(f"{source}: step is {step!r}, expected a number from 0 on")
    if not isinstance(meta, dict):
        raise CheckpointError(f"{source}: meta is {meta!r}, expected an object")
    if world_size is not None and not (is_count(world_size) and world_size):
        raise CheckpointError(f"{source}: world_size is {world_size!r}, expected a number from 1 on")
    files = parse_files(found["files"], source)
    if not files:
        raise CheckpointError(f"{source} lists no files; a checkpoint cannot be empty")
    return Manifest(step, meta, files, world_size)


def parse_files(found: Any, source: str) -> dict[str, FileFacts]:
    """The files that a manifest or receipt lists. Raises CheckpointError, also for names that lead elsewhere."""
    if not isinstance(found, dict):
        raise CheckpointError(f"{source}: files is {type(found).__name__}, expected an object")
    files = {}
    for name, facts in found.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name or name in (".", MANIFEST):
            raise CheckpointError(f"{source}: {name!r} cannot be the name of a file in a checkpoint")
        if not isinstance(facts, dict) or facts.keys() != {"bytes", "sha256"}:
            raise CheckpointError(f"{source}: {name} has {facts!r}, expected bytes and sha256")
        if not is_count(facts["bytes"]):
            raise CheckpointError(
                f"{source}: {name} has {facts['bytes']!r} bytes, expected a number from 0 on"
            )
        if not isinstance(facts["sha256"], str) or not _SHA256.fullmatch(facts["sha256"]):
            raise CheckpointError(f"{source}: {name} has sha256 {facts['sha256']!r}, expected 64 hex digits")
        files[name] = FileFacts(facts["bytes"], facts["sha256"])
    return files


def parse_json(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} cannot be read: {error}") from error


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 0  # True and False are ints too, but not here


def files_of(folder: Path) -> dict[str, Path]:
    """Name, as manifests have it -> path of every file below a folder."""
    return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if not p.is_dir()}


def save_weights(directory: Path, weights: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Write `model.safetensors` and what describes it as `model.json`; nothing is flushed to disk."""
    save_file(dict(weights), directory / WEIGHTS)
    (directory / WEIGHTS_CARD).write_text(json.dumps(dict(card), indent=1, sort_keys=True) + "\n")


def load_weights(directory: Path) -> dict[str, Tensor]:
    """Read `model.safetensors` of a checkpoint or an export."""
    try:
        return load_file(directory / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"reading {directory / WEIGHTS} failed: {error}") from error


def read_weights_card(directory: Path) -> dict[str, Any]:
    """What `save_weights` wrote beside the weights."""
    try:
        return json.loads((directory / WEIGHTS_CARD).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"reading {directory / WEIGHTS_CARD} failed: {error}") from error


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(file: Path, expected: FileFacts) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    size = file.stat().st_size
    if size != expected.bytes:
        raise CheckpointError(f"{file} has {size} bytes, its manifest says {expected.bytes}")
    if sha256_of(file) != expected.sha256:
        raise CheckpointError(f"{file} does not match its sha256: its content has changed")
