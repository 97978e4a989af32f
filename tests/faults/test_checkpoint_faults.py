"""What damage, full disks, other starts and kills do to checkpoints: nothing but the save under way is ever lost.

Children are forked, so that they need not import torch again; what they write is small.
"""

import errno
import itertools
import mmap
import multiprocessing
import os
import random
import resource
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.checkpoint import CheckpointError, CheckpointStore, open_checkpoint

FORK = multiprocessing.get_context("fork")
FILES = ("engine/rank0.pt", "model.json", "model.safetensors", "manifest.json")


def alone(flag: bool) -> bool:
    return flag


def save(store: CheckpointStore, step: int, num_bytes: int = 5000, **hooks: Any) -> None:
    """A checkpoint whose files say which step they are of."""

    def write(directory: Path) -> None:
        (directory / "engine").mkdir()
        (directory / "engine" / "rank0.pt").write_bytes(bytes([step % 256]) * num_bytes)

    weights = {"w": torch.full((100,), float(step))}
    store.save(step, write, {"byte": step % 256}, weights, {"note": "x" * 100}, any_rank=alone, **hooks)
    store.wait(alone)


def newest_step(store: CheckpointStore) -> int | None:
    found = store.newest_good()
    return found and found.step


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Damage


def flip_64_bytes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    start = min(100, len(content) - 64)
    content[start : start + 64] = bytes(byte ^ 0xFF for byte in content[start : start + 64])
    path.write_bytes(content)


def tear(path: Path) -> None:
    """The size is right, the second half never reached the disk."""
    half = path.stat().st_size // 2
    path.write_bytes(path.read_bytes()[:half] + bytes(path.stat().st_size - half))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "torn": tear,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 2),
    "flipped": flip_64_bytes,
    "emptied": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5)
    save(store, 6)
    newest = store.path_of(6)
    DAMAGES[damage](newest / name)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(newest)
    assert str(newest / name) in str(caught.value)
    assert newest_step(store) == 5
    assert f"checkpoint of step 6 is damaged and is skipped: {newest / name}" in caplog.text
    save(store, 6)
    assert newest_step(store) == 6


def test_a_file_that_cannot_be_read_is_damage_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5)
    save(store, 6)
    healthy = Path.open

    def failing(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == store.path_of(6) / "engine/rank0.pt":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return healthy(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", failing)
    assert newest_step(store) == 5


# Full disks and other starts


def in_child(action: Callable[[], None]) -> int:
    """The exit code of a forked process that did it: 0, or 1 after an exception, which is printed."""
    child = FORK.Process(target=action)
    child.start()
    child.join(60)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def test_a_disk_that_fills_up_in_a_save_costs_that_save_alone(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 1)

    def fill_up() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        store = CheckpointStore(tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        with pytest.raises(
            CheckpointError, match=r"saving step 2 .*earlier checkpoints are as they were: OSError"
        ):
            save(store, 2, num_bytes=200_000)
        assert names_in(tmp_path) == ["step-00000001"]
        save(store, 3)

    assert in_child(fill_up) == 0
    assert newest_step(CheckpointStore(tmp_path)) == 3


def test_a_start_that_is_fenced_publishes_and_deletes_nothing(tmp_path: Path) -> None:
    class TakenOverError(Exception):
        """What a ledger may raise."""

    def require_newest() -> None:
        raise TakenOverError("start 2 has taken over from start 1")

    told: list[Path] = []
    old = CheckpointStore(tmp_path, keep_last=1, generation=1)
    save(old, 1)
    save(CheckpointStore(tmp_path, keep_last=2, generation=2), 2)
    with pytest.raises(CheckpointError, match="TakenOverError: start 2 has taken over") as caught:
        save(old, 3, before_publish=require_newest, on_published=told.append)
    assert isinstance(caught.value.__cause__, TakenOverError)
    assert told == []
    assert names_in(tmp_path) == ["step-00000001", "step-00000002"]


def test_two_starts_that_save_the_same_step_do_not_mix(tmp_path: Path) -> None:
    """The older one is in the middle of its save when the newer one begins, saves and publishes."""
    older = CheckpointStore(tmp_path, generation=1)

    def write(directory: Path) -> None:
        (directory / "old").write_text("old")
        save(CheckpointStore(tmp_path, generation=2), 7)
        assert not directory.exists()

    older.save(7, write, {}, any_rank=alone)
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        older.wait(alone)
    assert open_checkpoint(tmp_path / "step-00000007").meta == {"byte": 7}
    assert names_in(tmp_path) == ["step-00000007"]


# One file operation after the other


@pytest.fixture
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill costs nothing that was not flushed, so flushing, which takes most of the time, is only counted."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Operations:
    """Counts what a process does to the files of a folder and, armed, does something else at the n-th."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self.count = 0
        self.at: Callable[[int], None] = lambda number: None
        flush = os.fsync

        def counted_flush(descriptor: int) -> None:
            self._tick()
            flush(descriptor)

        os.fsync = counted_flush
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        is_ours = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate") or (
            event == "open" and len(arguments) > 2 and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        # rmtree names what it removes relative to a descriptor.
        if is_ours and (str(arguments[0]).startswith(self._folder) or event in ("os.remove", "os.rmdir")):
            self._tick()

    def _tick(self) -> None:
        self.count += 1
        self.at(self.count)


SAVES: dict[str, tuple[int, int]] = {"a new step": (1, 2), "the newest step again": (2, 2)}
MAX_OPERATIONS = 500


def save_with(folder: Path, steps: tuple[int, int], at: Callable[[int], None]) -> None:
    """In a child: the second of two saves, with something at one of its file operations."""
    store = CheckpointStore(folder, keep_last=1)
    save(store, steps[0])
    operations = Operations(folder)
    operations.at = at
    save(store, steps[1])


@pytest.mark.usefixtures("unflushed")
@pytest.mark.parametrize("kind", SAVES)
def test_killed_between_any_two_file_operations_a_good_checkpoint_is_there(kind: str, tmp_path: Path) -> None:
    steps = SAVES[kind]

    def killed_at(number: int, folder: Path) -> int:
        return in_child(lambda: save_with(folder, steps, lambda n: os._exit(9) if n == number else None))

    newest_steps: list[int | None] = []
    for number in range(1, MAX_OPERATIONS):
        folder = tmp_path / str(number)
        code = killed_at(number, folder)
        store = CheckpointStore(folder, keep_last=1, generation=1)
        newest_steps.append(newest_step(store))
        assert newest_steps[-1] in steps, f"killed at operation {number}"
        assert not list(folder.glob("tmp-*"))
        if code == 0:
            break
        save(store, 3)
        assert names_in(folder) == ["step-00000003"]
    # As many operations as that at least: folders, files, flushes, receipt, manifest, renames, what is deleted.
    assert 25 < len(newest_steps) < MAX_OPERATIONS - 1
    assert newest_steps == sorted(newest_steps)
    assert newest_steps[-1] == steps[1]


@pytest.mark.usefixtures("unflushed")
@pytest.mark.parametrize("kind", SAVES)
def test_when_the_folder_is_read_only_from_any_operation_on_a_good_checkpoint_is_there(
    kind: str, tmp_path: Path
) -> None:
    steps = SAVES[kind]

    def fails_from(number: int, folder: Path) -> bool:
        def fail(n: int) -> None:
            if n >= number:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        def attempt() -> None:
            try:
                save_with(folder, steps, fail)
            except CheckpointError:
                os._exit(7)

        code = in_child(attempt)
        assert code in (0, 7)
        return code == 7

    outcomes: list[bool] = []
    while len(outcomes) < MAX_OPERATIONS and outcomes[-10:] != [False] * 10:
        folder = tmp_path / str(len(outcomes))
        outcomes.append(fails_from(len(outcomes) + 1, folder))
        if not outcomes[-1]:  # a save that succeeds is there without a restart
            assert newest_step(CheckpointStore(folder, rank=1)) == steps[1]
        store = CheckpointStore(folder, keep_last=1, generation=1)
        assert newest_step(store) in steps, f"from operation {len(outcomes)} on"
        save(store, 3)
        assert names_in(folder) == ["step-00000003"]
    # Until it is published a save fails, from then on it does not: what cannot be deleted is only said.
    assert 25 < outcomes.count(True) < MAX_OPERATIONS
    assert outcomes == sorted(outcomes, reverse=True)


@pytest.mark.usefixtures("unflushed")
def test_killed_between_any_two_file_operations_of_copying_a_good_copy_is_there(tmp_path: Path) -> None:
    def copy(folder: Path, number: int) -> None:
        store = CheckpointStore(folder / "here", keep_last=1, mirror=str(folder / "there"))
        save(store, 1)
        store.finish_mirror()
        operations = Operations(folder / "there")
        operations.at = lambda n: os._exit(9) if n == number else None
        save(store, 2)
        store.finish_mirror()

    def copy_killed_at(number: int, folder: Path) -> int:
        return in_child(lambda: copy(folder, number))

    newest_steps: list[int | None] = []
    for number in range(1, MAX_OPERATIONS):
        folder = tmp_path / str(number)
        code = copy_killed_at(number, folder)
        elsewhere = CheckpointStore(folder / "elsewhere", mirror=str(folder / "there"))
        newest_steps.append(newest_step(elsewhere))
        if code == 0:
            break
        again = CheckpointStore(folder / "here", keep_last=1, mirror=str(folder / "there"))
        save(again, 3)
        again.finish_mirror()
        assert names_in(folder / "there") == ["step-00000003"]
    assert 10 < len(newest_steps) < MAX_OPERATIONS - 1
    assert newest_steps == sorted(newest_steps)
    assert set(newest_steps) == {1, 2}


# Random kills


class Acknowledged:
    """A number that a child writes and that outlives it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def write(self, step: int) -> None:
        self._memory[:8] = struct.pack("q", step)

    def read(self) -> int:
        return struct.unpack("q", self._memory[:8])[0]


def write_forever(folder: Path, generation: int, acknowledged: Acknowledged) -> None:
    """Two ranks, each a thread, that continue from the newest checkpoint and save one step after the other."""
    barrier, flags = threading.Barrier(2), [False, False]
    stores = [
        CheckpointStore(folder, rank=rank, world_size=2, generation=generation, keep_last=2)
        for rank in (0, 1)
    ]
    found = stores[0].newest_good()
    first = found.step + 1 if found else 1

    def train(rank: int) -> None:
        def any_rank(flag: bool) -> bool:
            flags[rank] = flag
            barrier.wait()
            result = any(flags)
            barrier.wait()
            return result

        def write(directory: Path) -> None:
            for number in range(2):
                (directory / f"{rank}-{number}").write_bytes(bytes([step % 256]) * 300_000)

        for step in itertools.count(first):
            stores[rank].save(step, write, {"byte": step % 256}, any_rank=any_rank)
            stores[rank].wait(any_rank)
            if rank == 0:
                acknowledged.write(step)

    other = threading.Thread(target=train, args=(1,))
    other.start()
    train(0)


def kill_at_random(folder: Path, num_kills: int, seed: int) -> str:
    """Kills the writer again and again. After each kill the newest checkpoint must be whole, and no older than what the
    writer was told is published. Returns a line that counts.
    """
    draw, acknowledged = random.Random(seed), Acknowledged()
    num_mid_save, num_lost, began_s = 0, 0, time.monotonic()
    for generation in range(1, num_kills + 1):
        child = FORK.Process(target=write_forever, args=(folder, generation, acknowledged))
        child.start()
        # From before the first save to some saves later.
        child.join(draw.uniform(0.0, 0.15))
        assert child.exitcode is None, "the writer ended by itself"
        child.kill()
        child.join()
        num_mid_save += any(folder.glob("tmp-step-*"))
        steps = CheckpointStore(folder, rank=1).steps()
        try:
            newest = open_checkpoint(folder / f"step-{steps[-1]:08d}") if steps else None
        except CheckpointError as error:
            newest = None
            print(f"kill {generation}: {error}")
        newest_step = newest.step if newest else 0
        num_lost += newest_step < acknowledged.read() or (newest is None and bool(steps))
        assert newest is None or newest.meta == {"byte": newest_step % 256}
    assert acknowledged.read() > 0
    assert num_mid_save > num_kills / 10
    assert num_lost == 0
    took_s = time.monotonic() - began_s
    return (
        f"{num_kills} SIGKILLs in {took_s:.0f} s, {num_mid_save} in the middle of a save; {acknowledged.read()} steps "
        f"published; lost: {num_lost}"
    )


def test_60_random_kills_never_cost_the_newest_checkpoint(tmp_path: Path) -> None:
    kill_at_random(tmp_path, num_kills=60, seed=0)


@pytest.mark.faults
def test_1000_random_kills_never_cost_the_newest_checkpoint(tmp_path: Path) -> None:
    print("\n" + kill_at_random(tmp_path, num_kills=1000, seed=1))
