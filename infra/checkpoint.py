"""Checkpoints that are complete and verified, or do not exist.

Layout of a store: `step-00000120/` holds an engine's files, `model.safetensors` + `model.json` (whole weights
in fp32) and `manifest.json` (sha256 and size of every file, facts about the run). Everything is written into
`tmp-...`, flushed to disk, and made visible by one rename. Order comes from step numbers, never from clocks.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
WEIGHTS_CARD = "model.json"
_FORMAT = 1
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointError(Exception):
    """A checkpoint that cannot be written, or is damaged."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A published checkpoint whose checksums were right when it was opened."""

    path: Path
    step: int
    meta: dict[str, Any]
    num_bytes: int

    def load_weights(self) -> dict[str, Tensor]:
        """The whole model in fp32 on the CPU."""
        return load_weights(self.path)


class CheckpointStore:
    """The checkpoints of one stage. All ranks hold one; only rank 0 publishes and deletes."""

    def __init__(self, directory: Path, keep_last: int = 2, rank: int = 0) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; at least 1 checkpoint must be kept")
        self.directory = directory
        self._keep_last = keep_last
        self._rank = rank
        if rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        barrier: Callable[[], None],
        meta: Mapping[str, Any],
        weights: Mapping[str, Tensor] | None = None,
        weights_card: Mapping[str, Any] | None = None,
        expected_bytes: int = 0,
    ) -> Path:
        """Write and publish one checkpoint; every rank calls it with the same `step`.

        `write(directory)` puts this rank's files there; `weights` (rank 0's are used) go into safetensors;
        `barrier` waits for all ranks. Returns the published path. Raises CheckpointError, after which the
        earlier checkpoints are as they were.
        """
        directory = self.begin(step, barrier, expected_bytes)
        write(directory)
        if self._rank == 0 and weights is not None:
            save_weights(directory, weights, weights_card or {})
        return self.publish(step, barrier, meta)

    def begin(self, step: int, barrier: Callable[[], None], expected_bytes: int = 0) -> Path:
        """Make the empty temporary directory of a step. All ranks call it."""
        directory = self._temporary(step)
        if self._rank == 0:
            free = shutil.disk_usage(self.directory).free
            if free < expected_bytes:
                raise CheckpointError(
                    f"saving step {step} needs about {expected_bytes / 2**20:.0f} MiB and {self.directory} "
                    f"has {free / 2**20:.0f} MiB free; free some space or lower checkpoint.keep_last"
                )
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
        barrier()
        return directory

    def publish(self, step: int, barrier: Callable[[], None], meta: Mapping[str, Any]) -> Path:
        """Make a step visible once every rank has written its files. All ranks call it.

        Each rank's files are on disk before the barrier; rank 0 then adds the manifest and renames.
        """
        directory, final = self._temporary(step), self.path_of(step)
        _flush_tree(directory)
        barrier()
        if self._rank == 0:
            self._publish(directory, final, step, meta)
            self._retain()
        barrier()
        return final

    def newest_good(self) -> Checkpoint | None:
        """The newest checkpoint whose files match their checksums; damaged ones are named in a warning."""
        for step in reversed(self.steps()):
            path = self.path_of(step)
            try:
                checkpoint = open_checkpoint(path)
            except CheckpointError as error:
                logger.warning("checkpoint of step %d is damaged and is skipped: %s", step, error)
                continue
            return checkpoint
        return None

    def steps(self) -> list[int]:
        """Steps of the published checkpoints in ascending order, damaged ones included."""
        if not self.directory.is_dir():
            return []
        found = (_STEP.fullmatch(path.name) for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(match.group(1)) for match in found if match)

    def path_of(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _temporary(self, step: int) -> Path:
        return self.directory / f"tmp-step-{step:08d}"

    def _publish(self, directory: Path, final: Path, step: int, meta: Mapping[str, Any]) -> None:
        files = {
            str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }
        if not files:
            raise CheckpointError(f"nothing was written for step {step}; a checkpoint cannot be empty")
        manifest = {"format": _FORMAT, "step": step, "meta": dict(meta), "files": files}
        write_durably(directory / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        if final.exists():  # a damaged one of the same step: this run has computed it again
            shutil.rmtree(final)
        os.rename(directory, final)
        flush_directory(self.directory)

    def _retain(self) -> None:
        for step in self.steps()[: -self._keep_last]:
            doomed = self.directory / f"tmp-old-{step:08d}"
            try:  # out of sight first: a half-deleted checkpoint must not look like a damaged one
                os.rename(self.path_of(step), doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                logger.warning("old checkpoint %s could not be deleted: %s", doomed, error)

    def _remove_leftovers(self) -> None:
        for path in self.directory.glob("tmp-*"):
            logger.info("removing %s, left by an interrupted save", path.name)
            shutil.rmtree(path, ignore_errors=True)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one published checkpoint. Raises CheckpointError that names the first faulty file."""
    manifest = _read_manifest(path)
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{file} has {size} bytes, its manifest says {expected['bytes']}")
        if sha256_of(file) != expected["sha256"]:
            raise CheckpointError(f"{file} does not match its sha256: its content has changed")
    num_bytes = sum(entry["bytes"] for entry in manifest["files"].values())
    return Checkpoint(path, manifest["step"], manifest["meta"], num_bytes)


def save_weights(directory: Path, weights: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Write `model.safetensors` and what describes it as `model.json`."""
    save_file(dict(weights), directory / WEIGHTS)
    write_durably(directory / WEIGHTS_CARD, json.dumps(dict(card), indent=1, sort_keys=True) + "\n")


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


def write_durably(path: Path, text: str) -> None:
    """Write a file that is whole and on disk, or absent: fsync under another name, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    flush_directory(path.parent)


def flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        try:
            flush_directory(path)  # fsync works the same on files
        except FileNotFoundError:  # another rank's temporary file
            continue
    flush_directory(directory)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or not {"format", "step", "meta", "files"} <= manifest.keys():
        raise CheckpointError(f"{file} is not a checkpoint manifest")
    if manifest["format"] != _FORMAT:
        raise CheckpointError(f"{file} has format {manifest['format']}; this version reads format {_FORMAT}")
    return manifest
