"""Checkpoints that are complete and verified, or do not exist.

Layout of a store: `step-00000120/` holds an engine's files, `model.safetensors` + `model.json` (whole weights
in fp32) and `manifest.json` (sha256 and size of every file, facts about the run). Everything is written into
`tmp-...`, flushed to disk, and made visible by one rename. Order comes from step numbers and generations, never from
clocks. What a folder holds stands in `checkpoint_files`, how ranks put it together in `checkpoint_parts`.
"""

import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from infra.checkpoint_files import (
    MANIFEST,
    STEP_FOLDER,
    WEIGHTS,
    WEIGHTS_CARD,
    Checkpoint,
    CheckpointError,
    Manifest,
    files_of,
    load_weights,
    open_checkpoint,
    read_weights_card,
    save_weights,
)
from infra.checkpoint_mirror import Mirror
from infra.checkpoint_parts import collect, hand_in, part_of, whole_of
from infra.durable import flush, write_durably

__all__ = [
    "MANIFEST",
    "WEIGHTS",
    "WEIGHTS_CARD",
    "Checkpoint",
    "CheckpointError",
    "CheckpointStore",
    "load_weights",
    "open_checkpoint",
    "read_weights_card",
    "save_weights",
]

logger = logging.getLogger(__name__)

_TEMPORARY = re.compile(r"tmp-(?P<kind>[a-z]+)-(?P<step>\d+)-g(?P<generation>\d+)")
_SPACE_MARGIN = 1.05


class CheckpointStore:
    """The checkpoints of one stage. All ranks hold one on the same folder; only rank 0 publishes and deletes.

    Training waits while its rank writes its own files. Flushing, hashing and publishing go on in a thread of each rank;
    `wait` meets them. `generation` counts the starts of the stage: a newer one removes what an older one has left
    unpublished, never the other way round. Kept are the newest `keep_last` and the steps that `protect()` names.
    `mirror` is a folder or URL for copies; CheckpointError is raised when no installed package opens it. Rank 0 waits
    `receipt_timeout_s` for the parts of the others.
    """

    def __init__(
        self,
        directory: Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        keep_last: int = 2,
        generation: int = 0,
        mirror: str | None = None,
        protect: Callable[[], Collection[int]] = tuple,
        receipt_timeout_s: float = 600.0,
        mirror_delays_s: Sequence[float] = (1.0, 5.0, 25.0),
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; at least 1 checkpoint must be kept")
        self.directory = directory
        self._rank, self._world_size = rank, world_size
        self._keep_last, self._protect = keep_last, protect
        self._generation = generation
        self._receipt_timeout_s = receipt_timeout_s
        self._mirror = None if mirror is None else Mirror(mirror, directory, mirror_delays_s)
        self._pending: _Pending | None = None
        self._damaged: set[int] = set()
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
        any_rank: Callable[[bool], bool],
        before_publish: Callable[[], None] = lambda: None,
        on_published: Callable[[Path], None] = lambda path: None,
    ) -> None:
        """Write one checkpoint, which is then published in the background. Every rank calls it with the same `step`.

        `write(directory)` puts this rank's files into a folder of its own; `weights` (rank 0's are used) go into
        safetensors. `any_rank(flag)` is collective: whether any rank says yes. On rank 0, in the background,
        `before_publish` may raise to keep the checkpoint from being published, and `on_published` is told its path.

        Raises CheckpointError on all ranks when the save before this one failed on any (this one is not begun then),
        when space is short, or when a rank could not write. Earlier checkpoints are as they were.
        """
        self.wait(any_rank)
        folder = self._temporary("step", step)
        self._agreed(step, any_rank, lambda: self._make_room(folder, weights))

        def write_part() -> None:
            part = part_of(folder, self._rank)
            part.mkdir()
            write(part)
            if self._rank == 0 and weights is not None:
                save_weights(part, weights, weights_card or {})

        self._agreed(step, any_rank, write_part)
        self._pending = _Pending(
            step, lambda: self._finish_save(folder, step, meta, before_publish, on_published)
        )

    def wait(self, any_rank: Callable[[bool], bool]) -> None:
        """Return when the save begun last is published; copying to the mirror may go on. Collective.

        Raises CheckpointError on all ranks when any of them could not finish it. It is then not published (unless the
        message says so), nothing of it is left, and earlier checkpoints are as they were.
        """
        pending, self._pending = self._pending, None
        problem = pending.join() if pending else None
        if any_rank(problem is not None):
            step = pending.step if pending else 0
            raise self._failed(step, problem) from problem

    def finish_mirror(self, timeout_s: float = 600.0) -> None:
        """Wait, on this rank alone, for copies under way, before the process ends; a warning when they take longer."""
        if self._mirror is not None and not self._mirror.finish(timeout_s):
            logger.warning("copying to the mirror %s was not done in %.0f s", self._mirror.where, timeout_s)

    def newest_good(self) -> Checkpoint | None:
        """The newest checkpoint whose files match their checksums; damaged ones are named in a warning.

        Where none is good and there is a mirror, the newest good one of the mirror is fetched and published here.
        Raises CheckpointError when the mirror cannot be read: nobody knows then whether there is one.
        """
        found = self._newest_good_here()
        if found is not None or self._mirror is None:
            return found
        self.directory.mkdir(parents=True, exist_ok=True)
        with FileLock(str(self.directory / "mirror.lock")):  # one rank fetches, the others then find it
            return self._newest_good_here() or self._fetch_newest(self._mirror)

    def steps(self) -> list[int]:
        """Steps of the published checkpoints in ascending order, damaged ones included."""
        if not self.directory.is_dir():
            return []
        found = (STEP_FOLDER.fullmatch(path.name) for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(match.group(1)) for match in found if match)

    def path_of(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _temporary(self, kind: str, step: int) -> Path:
        return self.directory / f"tmp-{kind}-{step:08d}-g{self._generation}"

    def _agreed(self, step: int, any_rank: Callable[[bool], bool], action: Callable[[], None]) -> None:
        """Do it on every rank; a failure of one is that of all."""
        problem: Exception | None = None
        try:
            action()
        except Exception as error:  # whatever an engine or a file system raises, the others must hear of it
            problem = error
        if any_rank(problem is not None):
            raise self._failed(step, problem) from problem

    def _failed(self, step: int, problem: Exception | None) -> CheckpointError:
        """What to raise, with what was written removed: no rank is at work on it any more."""
        if self._rank == 0:
            _remove(self._temporary("step", step))
        if isinstance(problem, _PublishedError):
            return CheckpointError(str(problem))
        if problem is None:
            what = "another rank could not do its part; its log says why"
        else:
            what = (
                str(problem)
                if isinstance(problem, CheckpointError)
                else f"{type(problem).__name__}: {problem}"
            )
        return CheckpointError(
            f"saving step {step} in {self.directory} failed, earlier checkpoints are as they were: {what}"
        )

    def _make_room(self, folder: Path, weights: Mapping[str, Tensor] | None) -> None:
        """On rank 0, for all: enough space, and an empty folder."""
        if self._rank != 0:
            return
        sizes = [
            sum(file.stat().st_size for file in files_of(self.path_of(step)).values())
            for step in self.steps()
        ]
        # Of a first save weights and both moments are the least it takes; what else an engine writes it knows alone.
        expected = max(sizes) if sizes else 3 * sum(tensor.nbytes for tensor in (weights or {}).values())
        free = shutil.disk_usage(self.directory).free
        if free < expected * _SPACE_MARGIN:
            raise CheckpointError(
                f"it takes about {expected * _SPACE_MARGIN / 2**20:.0f} MiB and {self.directory} has "
                f"{free / 2**20:.0f} MiB free; free some space or lower checkpoint.keep_last"
            )
        if folder.exists():
            shutil.rmtree(folder)
        whole_of(folder).mkdir(parents=True)

    def _finish_save(
        self,
        folder: Path,
        step: int,
        meta: Mapping[str, Any],
        before_publish: Callable[[], None],
        on_published: Callable[[Path], None],
    ) -> None:
        """In the background: from the written parts to the published checkpoint."""
        hand_in(folder, self._rank)
        if self._rank != 0:
            return
        whole = whole_of(folder)
        files = collect(folder, self._world_size, self._receipt_timeout_s)
        write_durably(whole / MANIFEST, Manifest(step, meta, files, self._world_size).to_json())
        before_publish()  # last of all, so that little time is left for another start to take over
        path = self._put_in_place(whole, step)
        try:
            on_published(path)
        except Exception as error:
            raise _PublishedError(
                f"{path} is published, but recording it failed: {type(error).__name__}: {error}"
            ) from error
        finally:
            _remove(folder)
            self._retain(step)

    def _put_in_place(self, folder: Path, step: int) -> Path:
        """Publish a complete folder by rename. One of the same step gives way, which was damaged or is done again."""
        path, replaced = self.path_of(step), self._temporary("replaced", step)
        if path.exists():
            if replaced.exists():
                shutil.rmtree(replaced)
            os.rename(path, replaced)
        try:
            os.rename(folder, path)
        except OSError:
            if replaced.exists():
                os.rename(replaced, path)
            raise
        self._damaged.discard(step)
        try:
            flush(self.directory)
        except OSError as error:
            raise _PublishedError(f"{path} is published, but a loss of power may undo it: {error}") from error
        _remove(replaced)
        return path

    def _retain(self, published: int) -> None:
        """Delete what is older than the step just published and not to be kept, then have the rest copied.

        Damaged ones do not count. Steps later than the one published are left alone: training went back from them.
        """
        older = [step for step in self.steps() if step <= published]
        whole = [step for step in older if step not in self._damaged]
        try:
            kept = {*whole[-self._keep_last :], *self._protect()}
        except Exception as error:
            logger.warning("nothing is deleted: which to keep failed (%s: %s)", type(error).__name__, error)
            kept = set(older)
        for step in older:
            if step not in kept:
                self._delete(step)
        if self._mirror is not None:
            self._mirror.copy_soon([step for step in whole if step in kept], keep=kept)

    def _delete(self, step: int) -> None:
        doomed = self._temporary("deleted", step)
        try:  # out of sight first: a half-deleted checkpoint must not look like a damaged one
            os.rename(self.path_of(step), doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            logger.warning("old checkpoint %s could not be deleted: %s", doomed, error)
        self._damaged.discard(step)

    def _remove_leftovers(self) -> None:
        for path in sorted(self.directory.glob("tmp-*")):
            named = _TEMPORARY.fullmatch(path.name)
            if named and int(named["generation"]) > self._generation:
                logger.warning("%s is that of a newer start and is left alone", path)
            elif named and named["kind"] == "replaced" and not self.path_of(int(named["step"])).exists():
                logger.warning("%s is put back: what was to replace it was not published", path.name)
                os.rename(path, self.path_of(int(named["step"])))
            else:
                logger.info("removing %s, left by an interrupted save", path.name)
                _remove(path)

    def _newest_good_here(self) -> Checkpoint | None:
        for step in reversed(self.steps()):
            try:
                return open_checkpoint(self.path_of(step))
            except CheckpointError as error:
                self._damaged.add(step)
                logger.warning("checkpoint of step %d is damaged and is skipped: %s", step, error)
        return None

    def _fetch_newest(self, mirror: Mirror) -> Checkpoint | None:
        try:
            for step in reversed(mirror.steps()):
                folder = self._temporary("fetch", step)
                _remove(folder)
                try:
                    mirror.fetch(step, folder)
                    found = open_checkpoint(folder)
                    if found.step != step:
                        raise CheckpointError(f"its manifest is that of step {found.step}")
                except CheckpointError as error:
                    logger.warning(
                        "the mirror's checkpoint of step %d is damaged and is skipped: %s", step, error
                    )
                    _remove(folder)
                    continue
                path = self._put_in_place(folder, step)
                logger.warning(
                    "no good checkpoint in %s; step %d was fetched from %s", path.parent, step, mirror.where
                )
                return replace(found, path=path)
        except Exception as error:  # each storage raises its own kinds
            raise CheckpointError(
                f"there is no good checkpoint in {self.directory}, and fetching one from the mirror "
                f"{mirror.where} failed: {type(error).__name__}: {error}; make it reachable, or "
                "unset checkpoint.mirror to do without"
            ) from error
        return None


class _PublishedError(CheckpointError):
    """Something failed after the checkpoint had been published."""


class _Pending:
    """The second half of a save in its thread, and what it raised."""

    def __init__(self, step: int, work: Callable[[], None]) -> None:
        self.step = step
        self._work = work
        self._problem: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def join(self) -> Exception | None:
        self._thread.join()
        return self._problem

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            logger.error(
                "finishing the checkpoint of step %d failed: %s: %s", self.step, type(error).__name__, error
            )
            self._problem = error


def _remove(path: Path) -> None:
    """Delete a file or folder that no longer matters; what cannot be deleted is said."""
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s could not be removed: %s", path, error)
