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
import threading
import time
from collections.abc import Callable, Collection, Mapping
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
    """The checkpoints of one stage. All ranks hold one; only rank 0 publishes and deletes.

    What training waits for is the writing of a rank's own files. Flushing, hashing and publishing go on in a thread of
    each rank; ranks meet in the folder itself, over receipts.
    """

    def __init__(
        self,
        directory: Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        keep_last: int = 2,
        generation: int = 0,
        protect: Callable[[], Collection[int]] = tuple,
        receipt_timeout_s: float = 600.0,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; at least 1 checkpoint must be kept")
        self.directory = directory
        self._rank, self._world_size = rank, world_size
        self._keep_last, self._protect = keep_last, protect
        self._generation = generation
        self._receipt_timeout_s = receipt_timeout_s
        self._pending: _Pending | None = None
        if rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        meta: Mapping[str, Any],
        weights: Mapping[str, Tensor] | None = None,
        weights_card: Mapping[str, Any] | None = None,
        *,
        any_rank: Callable[[bool], bool] = bool,
        before_publish: Callable[[], None] = lambda: None,
        on_published: Callable[[Path], None] = lambda path: None,
    ) -> None:
        """Write one checkpoint; every rank calls it with the same `step`. It is published in the background: `wait`.

        `write(directory)` puts this rank's files there; `weights` (rank 0's are used) go into safetensors; `any_rank`
        tells whether a flag is set on any rank. On rank 0, in the background, `before_publish` may raise to keep the
        checkpoint from being published, and `on_published` is told its path. Raises CheckpointError on all ranks when
        one of them could not write; the earlier checkpoints are then as they were.
        """
        self.wait(any_rank)
        folder = self._temporary(step)
        own = folder / f"rank-{self._rank:05d}"
        problem: Exception | None = None
        try:
            self._require_space(weights)
            shutil.rmtree(own, ignore_errors=True)
            own.mkdir(parents=True)
            write(own)
            if self._rank == 0 and weights is not None:
                save_weights(own, weights, weights_card or {})
        except Exception as error:  # whatever an engine or a file system raises, the others must hear of it
            problem = error
        if any_rank(problem is not None):
            shutil.rmtree(own, ignore_errors=True)
            if self._rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            what = (
                f"{type(problem).__name__}: {problem}" if problem else "another rank could not write its part"
            )
            raise CheckpointError(
                f"saving step {step} failed, earlier checkpoints are as they were: {what}"
            ) from problem
        work = _Publication(self, step, meta, before_publish, on_published)
        self._pending = _Pending(work.run)

    def wait(self, any_rank: Callable[[bool], bool] = bool) -> None:
        """Return when the save begun last is published. Collective. Raises CheckpointError on all ranks when it could
        not be; the earlier checkpoints are then as they were.
        """
        pending, self._pending = self._pending, None
        problem = pending.join() if pending is not None else None
        if any_rank(problem is not None):
            what = str(problem) if problem else "another rank could not finish its part"
            raise CheckpointError(f"publishing a checkpoint failed: {what}") from problem

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
        # The generation keeps it apart from what another start of the same step has left, or still writes.
        return self.directory / f"tmp-step-{step:08d}-g{self._generation}"

    def _require_space(self, weights: Mapping[str, Tensor] | None) -> None:
        """On rank 0, for all: what the newest checkpoint takes, or three times the weights before there is one."""
        if self._rank:
            return
        steps = self.steps()
        if steps:
            files = (path for path in self.path_of(steps[-1]).rglob("*") if path.is_file())
            expected = sum(path.stat().st_size for path in files)
        else:
            expected = 3 * sum(tensor.nbytes for tensor in (weights or {}).values())
        free = shutil.disk_usage(self.directory).free
        if free < expected:
            raise CheckpointError(
                f"it takes about {expected / 2**20:.0f} MiB and {self.directory} has {free / 2**20:.0f} MiB free; free "
                "some space or lower checkpoint.keep_last"
            )

    def _retain(self) -> None:
        kept = {*self.steps()[-self._keep_last :], *self._protect()}
        for step in self.steps():
            if step in kept:
                continue
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


class _Pending:
    """Work in a thread, and what it raised."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work, self._problem = work, None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def join(self) -> Exception | None:
        self._thread.join()
        return self._problem

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._problem = error


@dataclass(frozen=True)
class _Publication:
    """The second half of a save, off the training path."""

    store: CheckpointStore
    step: int
    meta: Mapping[str, Any]
    before_publish: Callable[[], None]
    on_published: Callable[[Path], None]

    def run(self) -> None:
        store = self.store
        folder, final = store._temporary(self.step), store.path_of(self.step)
        try:
            self._hand_in(folder, store._rank)
            if store._rank != 0:
                return
            files = self._collect(folder)
            self.before_publish()
            self._publish(folder, final, files)
        except Exception:
            if store._rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        self.on_published(final)
        store._retain()

    def _hand_in(self, folder: Path, rank: int) -> None:
        """This rank's files, flushed and hashed, into the common folder; the receipt says they are all there."""
        own, listed = folder / f"rank-{rank:05d}", {}
        _flush_tree(own)
        for path in sorted(own.rglob("*")):
            if path.is_dir():
                continue
            name = str(path.relative_to(own))
            listed[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, place)  # unlike a rename, it does not replace another rank's
            except FileExistsError:
                raise CheckpointError(f"two ranks wrote a file {name}; one would be lost") from None
        shutil.rmtree(own)
        write_durably(folder / _receipt_name(rank), json.dumps(listed) + "\n")

    def _collect(self, folder: Path) -> dict[str, dict[str, Any]]:
        """What all ranks have handed in, looked at once more."""
        store, files = self.store, {}
        ends_s = time.monotonic() + store._receipt_timeout_s
        waiting = [folder / _receipt_name(rank) for rank in range(store._world_size)]
        while waiting := [path for path in waiting if not path.is_file()]:
            if time.monotonic() > ends_s:
                missing = ", ".join(path.name for path in waiting)
                raise CheckpointError(
                    f"no {missing} of step {self.step} after {store._receipt_timeout_s:.0f} s"
                )
            time.sleep(0.01)
        for rank in range(store._world_size):
            receipt = folder / _receipt_name(rank)
            files.update(json.loads(receipt.read_text()))
            receipt.unlink()
        for name, entry in files.items():
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                raise CheckpointError(
                    f"{name} of step {self.step} has {size} bytes, its rank wrote {entry['bytes']}"
                )
        if not files:
            raise CheckpointError(f"nothing was written for step {self.step}; a checkpoint cannot be empty")
        return files

    def _publish(self, folder: Path, final: Path, files: Mapping[str, Any]) -> None:
        manifest = {
            "format": _FORMAT,
            "step": self.step,
            "meta": dict(self.meta),
            "world_size": self.store._world_size,
            "files": dict(files),
        }
        _flush_tree(folder)
        write_durably(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        if final.exists():  # a damaged one of the same step: this run has computed it again
            os.rename(final, final.with_name(f"tmp-old-{self.step:08d}"))
        os.rename(folder, final)
        flush_directory(self.store.directory)
        shutil.rmtree(final.with_name(f"tmp-old-{self.step:08d}"), ignore_errors=True)


def _receipt_name(rank: int) -> str:
    return f"receipt-{rank:05d}.json"


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
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
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
