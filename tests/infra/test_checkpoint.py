"""Checkpoints are complete and verified, or they do not exist."""

import json
import logging
import multiprocessing
import os
import random
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from infra.checkpoint import CheckpointError, CheckpointStore, open_checkpoint, read_weights_card


def no_barrier() -> None:
    return None


def save(store: CheckpointStore, step: int, payload: bytes = b"state") -> Path:
    def write(directory: Path) -> None:
        (directory / "engine").mkdir()
        (directory / "engine" / "rank0.pt").write_bytes(payload * 100)

    weights = {"w": torch.full((2, 2), float(step))}
    return store.save(step, write, no_barrier, {"config_hash": "abc"}, weights, {"frames": 4})


def test_a_published_checkpoint_reads_back_with_its_facts_and_weights(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "store")
    path = save(store, 120)
    assert path.name == "step-00000120"
    found = store.newest_good()
    assert found is not None
    assert (found.step, found.meta, found.path) == (120, {"config_hash": "abc"}, path)
    assert torch.equal(found.load_weights()["w"], torch.full((2, 2), 120.0))
    assert read_weights_card(path) == {"frames": 4}
    assert sorted(json.loads((path / "manifest.json").read_text())["files"]) == [
        "engine/rank0.pt",
        "model.json",
        "model.safetensors",
    ]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in (9, 10, 100):
        save(store, step)
    assert store.steps() == [10, 100]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


def test_an_unpublished_save_is_invisible_and_removed_at_the_next_start(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    (store.begin(2, no_barrier) / "half").write_text("x")
    assert store.steps() == [1]
    CheckpointStore(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def damage_manifest_step(path: Path) -> None:
    (path / "manifest.json").write_text("{}")


def flip_one_bit(path: Path) -> None:
    content = bytearray((path / "engine/rank0.pt").read_bytes())
    content[250] ^= 1
    (path / "engine/rank0.pt").write_bytes(content)


MUTATIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "engine file cut": (lambda p: os.truncate(p / "engine/rank0.pt", 10), "has 10 bytes"),
    "engine file empty": (lambda p: os.truncate(p / "engine/rank0.pt", 0), "has 0 bytes"),
    "engine file deleted": (lambda p: (p / "engine/rank0.pt").unlink(), "is missing"),
    "engine file flipped": (flip_one_bit, "does not match its sha256"),
    "weights cut": (lambda p: os.truncate(p / "model.safetensors", 5), "has 5 bytes"),
    "card deleted": (lambda p: (p / "model.json").unlink(), "is missing"),
    "manifest cut": (lambda p: os.truncate(p / "manifest.json", 30), "cannot be read"),
    "manifest empty": (lambda p: os.truncate(p / "manifest.json", 0), "cannot be read"),
    "manifest deleted": (lambda p: (p / "manifest.json").unlink(), "is missing"),
    "manifest of another shape": (damage_manifest_step, "is not a checkpoint manifest"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5)
    newest = save(store, 6)
    mutate, message = MUTATIONS[name]
    mutate(newest)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(newest)
    with caplog.at_level(logging.WARNING):
        found = store.newest_good()
    assert found is not None
    assert found.step == 5
    assert "step 6 is damaged and is skipped" in caplog.text
    save(store, 6)  # the same step again replaces the damaged one
    again = store.newest_good()
    assert again is not None
    assert again.step == 6


def test_without_a_good_checkpoint_there_is_none(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "new")
    assert store.newest_good() is None
    assert CheckpointStore(tmp_path / "absent", rank=1).newest_good() is None


def test_a_full_disk_is_told_before_writing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="free some space or lower"):
        store.begin(1, no_barrier, expected_bytes=2**62)


def test_a_save_that_fails_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)

    def fail(directory: Path) -> None:
        (directory / "part").write_text("x")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        store.save(2, fail, no_barrier, {})
    found = store.newest_good()
    assert found is not None
    assert found.step == 1


def test_two_ranks_write_into_one_checkpoint(tmp_path: Path) -> None:
    barrier = threading.Barrier(2, timeout=10)
    stores = [CheckpointStore(tmp_path, rank=rank) for rank in (0, 1)]

    def wait() -> None:
        barrier.wait()

    def run(rank: int) -> None:
        stores[rank].save(3, lambda d: (d / f"rank{rank}").write_text("x"), wait, {})

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = stores[1].newest_good()
    assert found is not None
    assert sorted(p.name for p in found.path.iterdir()) == ["manifest.json", "rank0", "rank1"]


def write_forever(directory: Path, report: Connection) -> None:
    store = CheckpointStore(directory)
    found = store.newest_good()
    step = found.step if found else 0
    report.send(step)
    while True:
        step += 1
        content = bytes([step % 256]) * 300_000

        def write(folder: Path, content: bytes = content) -> None:
            for i in range(4):
                (folder / str(i)).write_bytes(content)

        store.save(step, write, no_barrier, {"byte": step % 256})


def test_killing_the_writer_at_random_never_costs_the_newest_checkpoint(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")  # a fresh interpreter would spend its life importing
    rng, last_seen = random.Random(0), 0
    for _ in range(25):
        receiver, sender = fork.Pipe(duplex=False)
        child = fork.Process(target=write_forever, args=(tmp_path, sender))
        child.start()
        resumed_at = receiver.recv()
        assert resumed_at >= last_seen
        child.join(rng.uniform(0.0, 0.08))
        child.kill()
        child.join()
        visible = CheckpointStore(tmp_path, rank=1).steps()
        for step in visible:
            assert open_checkpoint(tmp_path / f"step-{step:08d}").meta == {"byte": step % 256}
        last_seen = max(visible, default=0)
        assert last_seen >= resumed_at
    assert last_seen > 0
