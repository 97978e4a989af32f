"""Checkpoints are complete and verified, or they do not exist."""

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from upath import UPath

from infra.checkpoint import (
    CheckpointError,
    CheckpointStore,
    open_checkpoint,
    read_weights_card,
)
from infra.checkpoint_mirror import Mirror
from infra.durable import write_durably


def alone(flag: bool) -> bool:
    return flag


def write_engine(directory: Path, payload: bytes = b"state") -> None:
    (directory / "engine").mkdir()
    (directory / "engine" / "rank0.pt").write_bytes(payload * 100)


def save(store: CheckpointStore, step: int, payload: bytes = b"state") -> Path:
    weights = {"w": torch.full((2, 2), float(step))}
    meta = {"config_hash": "abc"}
    store.save(step, lambda d: write_engine(d, payload), meta, weights, {"frames": 4}, any_rank=alone)
    store.wait(alone)
    return store.path_of(step)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest_step(store: CheckpointStore) -> int | None:
    found = store.newest_good()
    return found and found.step


def test_a_published_checkpoint_reads_back_with_its_facts_and_weights(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "store")
    path = save(store, 120)
    assert path.name == "step-00000120"
    found = store.newest_good()
    assert found is not None
    assert (found.step, found.meta, found.path) == (120, {"config_hash": "abc"}, path)
    assert found.world_size == 1
    assert torch.equal(found.load_weights()["w"], torch.full((2, 2), 120.0))
    assert read_weights_card(path) == {"frames": 4}
    manifest = json.loads((path / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["engine/rank0.pt", "model.json", "model.safetensors"]
    # printf 'state%.0s' {1..100} | sha256sum
    assert manifest["files"]["engine/rank0.pt"] == {
        "bytes": 500,
        "sha256": "496e4c4ebccb320cff08b6af2b2ed81e472751b600ccc540bb5c09ddf54a03e0",
    }


def test_only_the_newest_are_kept_and_those_that_are_protected(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2, protect=lambda: {7})
    for step in (7, 9, 10, 100):
        save(store, step)
    assert store.steps() == [7, 10, 100]
    assert names_in(tmp_path) == ["step-00000007", "step-00000010", "step-00000100"]


def test_when_it_is_not_known_what_to_keep_nothing_is_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def protect() -> list[int]:
        raise OSError("the ledger cannot be read")

    store = CheckpointStore(tmp_path, keep_last=1, protect=protect)
    save(store, 1)
    save(store, 2)
    assert store.steps() == [1, 2]
    assert "nothing is deleted: which to keep failed (OSError: the ledger cannot be read)" in caplog.text


def test_damaged_ones_do_not_count_as_kept_and_never_cost_a_good_one(tmp_path: Path) -> None:
    writer = CheckpointStore(tmp_path, keep_last=9)
    for step in (5, 8, 10):
        save(writer, step)
    for step in (8, 10):
        os.truncate(tmp_path / f"step-{step:08d}" / "model.safetensors", 3)
    store = CheckpointStore(tmp_path, keep_last=2)
    assert newest_step(store) == 5
    save(store, 9)
    # Step 8 is damaged, 10 lies ahead and is left alone.
    assert store.steps() == [5, 9, 10]
    assert newest_step(store) == 9
    save(store, 10)
    assert store.steps() == [9, 10]
    assert newest_step(store) == 10


def test_leftovers_of_earlier_starts_are_removed_and_those_of_a_later_one_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(CheckpointStore(tmp_path), 1)
    for name in ("tmp-step-00000002", "tmp-step-00000002-g1", "tmp-step-00000002-g2", "tmp-step-00000002-g3"):
        (tmp_path / name / "rank-00000").mkdir(parents=True)
    store = CheckpointStore(tmp_path, generation=2)
    assert store.steps() == [1]
    assert names_in(tmp_path) == ["step-00000001", "tmp-step-00000002-g3"]
    assert "tmp-step-00000002-g3 is that of a newer start and is left alone" in caplog.text


def test_one_that_gave_way_to_an_unpublished_one_is_put_back(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path), 4)
    path.rename(tmp_path / "tmp-replaced-00000004-g0")
    assert newest_step(CheckpointStore(tmp_path, generation=1)) == 4
    assert names_in(tmp_path) == ["step-00000004"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 4, b"first")
    path = save(store, 4, b"again")
    assert (path / "engine/rank0.pt").read_bytes() == b"again" * 100
    assert names_in(tmp_path) == ["step-00000004"]


def test_without_a_good_checkpoint_there_is_none(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "new")
    assert store.newest_good() is None
    assert CheckpointStore(tmp_path / "absent", rank=1).newest_good() is None
    assert not (tmp_path / "absent").exists()


def test_files_that_no_manifest_lists_are_ignored_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(CheckpointStore(tmp_path), 1)
    (path / "engine" / "notes.txt").write_text("x")
    assert open_checkpoint(path).num_bytes == sum(
        (path / name).stat().st_size for name in ("engine/rank0.pt", "model.json", "model.safetensors")
    )
    assert "not in its manifest and ignored: engine/notes.txt" in caplog.text


FACTS = {"bytes": 1, "sha256": "0" * 64}
MANIFEST = {"format": 1, "step": 1, "meta": {}, "world_size": 1, "files": {"a": FACTS}}
STRANGE_MANIFESTS = {
    "a list": ([1], "is not a checkpoint manifest"),
    "no files": ({**MANIFEST, "files": {}}, "lists no files"),
    "files as a list": ({**MANIFEST, "files": ["a"]}, "files is list, expected an object"),
    "another format": ({**MANIFEST, "format": 2}, "has format 2; this version reads format 1"),
    "a step before 0": ({**MANIFEST, "step": -1}, "step is -1"),
    "true for a step": ({**MANIFEST, "step": True}, "step is True"),
    "the step of another folder": ({**MANIFEST, "step": 2}, "is that of step 2, not of this folder"),
    "meta as text": ({**MANIFEST, "meta": "x"}, "meta is 'x'"),
    "no ranks": ({**MANIFEST, "world_size": 0}, "world_size is 0"),
    "a negative size": ({**MANIFEST, "files": {"a": {**FACTS, "bytes": -1}}}, "a has -1 bytes"),
    "a size as text": ({**MANIFEST, "files": {"a": {**FACTS, "bytes": "1"}}}, "a has '1' bytes"),
    "a short hash": ({**MANIFEST, "files": {"a": {**FACTS, "sha256": "0"}}}, "a has sha256 '0'"),
    "no hash": ({**MANIFEST, "files": {"a": {"bytes": 1}}}, "expected bytes and sha256"),
    **{
        f"a file named {name!r}": ({**MANIFEST, "files": {name: FACTS}}, "cannot be the name of a file")
        for name in ("../../x", "/etc/passwd", "a/../b", "", ".", "a//b", "./a", "manifest.json")
    },
}


@pytest.mark.parametrize("name", STRANGE_MANIFESTS)
def test_a_manifest_that_is_not_ours_is_refused(name: str, tmp_path: Path) -> None:
    content, message = STRANGE_MANIFESTS[name]
    path = save(CheckpointStore(tmp_path), 1)
    (path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert message in str(caught.value)
    assert str(path / "manifest.json") in str(caught.value)


def test_a_manifest_nested_beyond_reading_is_refused(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path), 1)
    (path / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(path)


def test_a_manifest_of_before_without_its_number_of_ranks_is_read(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path), 1)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["world_size"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert open_checkpoint(path).world_size is None


def test_publishing_happens_behind_the_back_of_training(tmp_path: Path) -> None:
    may_publish, told = threading.Event(), []
    store = CheckpointStore(tmp_path)
    store.save(
        1,
        write_engine,
        {},
        any_rank=alone,
        before_publish=lambda: may_publish.wait(10) and None,
        on_published=told.append,
    )
    assert store.steps() == []
    may_publish.set()
    store.wait(alone)
    assert told == [tmp_path / "step-00000001"]
    assert store.steps() == [1]


class TwoRanks:
    """Two stores on one folder, called by a thread each, and what they raised."""

    def __init__(self, directory: Path, **settings: float) -> None:
        self._barrier = threading.Barrier(2, timeout=20)
        self._flags = [False, False]
        self.stores = [CheckpointStore(directory, rank=r, world_size=2, **settings) for r in (0, 1)]

    def any_rank(self, rank: int, flag: bool) -> bool:
        self._flags[rank] = flag
        self._barrier.wait()
        found = any(self._flags)
        self._barrier.wait()
        return found

    def save(self, step: int, writes: list[Callable[[Path], object]]) -> list[CheckpointError | None]:
        problems: list[CheckpointError | None] = [None, None]

        def run(rank: int) -> None:
            store = self.stores[rank]

            def any_rank(flag: bool) -> bool:
                return self.any_rank(rank, flag)

            try:
                store.save(step, lambda d: writes[rank](d) and None, {}, any_rank=any_rank)
                store.wait(any_rank)
            except CheckpointError as error:
                problems[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return problems


def test_two_ranks_write_into_one_checkpoint(tmp_path: Path) -> None:
    ranks = TwoRanks(tmp_path)

    def write_of(rank: int) -> Callable[[Path], object]:
        return lambda d: (d / "engine").mkdir() or (d / "engine" / f"rank{rank}.pt").write_text("x")

    writes = [write_of(0), write_of(1)]
    assert ranks.save(3, writes) == [None, None]
    found = ranks.stores[1].newest_good()
    assert found is not None
    assert found.world_size == 2
    assert sorted(str(p.relative_to(found.path)) for p in found.path.rglob("*") if p.is_file()) == [
        "engine/rank0.pt",
        "engine/rank1.pt",
        "manifest.json",
    ]
    assert names_in(tmp_path) == ["step-00000003"]


def test_a_rank_that_is_slow_after_its_receipt_does_not_miss_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 publishes and removes the folder as soon as it has seen the receipts, however far the others have come."""

    def slowly(move: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def moved(source: Path, target: Path) -> None:
            move(source, target)
            end_s = time.monotonic() + 10
            while Path(target).name == "rank-00001.json" and Path(target).parent.exists():
                assert time.monotonic() < end_s, "rank 0 has not published"
                time.sleep(0.005)

        return moved

    monkeypatch.setattr(os, "rename", slowly(os.rename))
    monkeypatch.setattr(os, "replace", slowly(os.replace))
    ranks = TwoRanks(tmp_path)
    assert ranks.save(3, [lambda d: (d / "a").touch(), lambda d: (d / "b").touch()]) == [None, None]
    assert names_in(tmp_path) == ["step-00000003"]


def test_a_file_that_both_ranks_wrote_is_an_error(tmp_path: Path) -> None:
    ranks = TwoRanks(tmp_path)
    problems = ranks.save(3, [lambda d: (d / "same").write_text("x")] * 2)
    assert "both wrote same; one would be lost" in str(problems[0])
    assert "another rank could not do its part" in str(problems[1])
    assert names_in(tmp_path) == []


def test_a_rank_that_cannot_write_fails_all_and_leaves_nothing(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise RuntimeError("the engine has lost its state")

    ranks = TwoRanks(tmp_path)
    calm = [lambda d: (d / "a").touch(), lambda d: (d / "b").touch()]
    assert ranks.save(1, calm) == [None, None]
    problems = ranks.save(2, [lambda d: (d / "a").touch(), fail])
    assert "another rank could not do its part" in str(problems[0])
    assert "RuntimeError: the engine has lost its state" in str(problems[1])
    assert names_in(tmp_path) == ["step-00000001"]
    assert ranks.save(2, calm) == [None, None]
    assert newest_step(ranks.stores[0]) == 2


def test_a_rank_that_fails_in_the_background_is_named_at_once(tmp_path: Path) -> None:
    ranks = TwoRanks(tmp_path)
    problems = ranks.save(2, [lambda d: (d / "a").touch(), lambda d: (d / "manifest.json").touch()])
    assert "rank 1 could not hand in its part: CheckpointError: a rank wrote manifest.json" in str(
        problems[0]
    )
    assert "a rank wrote manifest.json" in str(problems[1])
    assert names_in(tmp_path) == []


def test_a_rank_that_hands_in_nothing_is_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, world_size=3, receipt_timeout_s=0.05)
    store.save(1, write_engine, {}, any_rank=alone)
    with pytest.raises(CheckpointError, match="nothing has come from rank 1, 2; their logs may say why"):
        store.wait(alone)
    assert names_in(tmp_path) == []


def test_a_failed_save_is_told_by_the_next_one_which_may_then_be_tried_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, lambda directory: None, {}, any_rank=alone)
    with pytest.raises(CheckpointError, match=r"saving step 1 .*nothing was written"):
        store.save(2, write_engine, {}, any_rank=alone)
    save(store, 2)
    assert names_in(tmp_path) == ["step-00000002"]


def test_one_that_is_published_but_cannot_be_recorded_says_both(tmp_path: Path) -> None:
    def record(path: Path) -> None:
        raise OSError("the ledger is gone")

    store = CheckpointStore(tmp_path)
    store.save(1, write_engine, {}, any_rank=alone, on_published=record)
    with pytest.raises(CheckpointError, match="step-00000001 is published, but recording it failed: OSError"):
        store.wait(alone)
    assert names_in(tmp_path) == ["step-00000001"]


def write_many(path: Path, text: str) -> None:
    for _ in range(50):
        write_durably(path, text)


def test_processes_that_write_one_file_at_once_all_succeed_and_one_wins(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    texts = [letter * 10_000 for letter in "ab"]
    writers = [fork.Process(target=write_many, args=(tmp_path / "file", text)) for text in texts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert (tmp_path / "file").read_text() in texts
    assert names_in(tmp_path) == ["file"]


@pytest.fixture(autouse=True)
def empty_memory() -> Iterator[None]:
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=["folder", "memory"])
def mirror(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where copies go: a folder, or a store behind a URL."""
    return str(tmp_path / "mirror") if request.param == "folder" else "memory://bucket/run"


def store_with(mirror: str, tmp_path: Path, **settings: int) -> CheckpointStore:
    return CheckpointStore(tmp_path / "here", mirror=mirror, mirror_delays_s=(0.0, 0.0), **settings)


def copies_in(mirror: str) -> list[str]:
    return sorted(path.name for path in UPath(mirror).iterdir())


def test_published_checkpoints_are_copied_and_the_same_are_kept(mirror: str, tmp_path: Path) -> None:
    store = store_with(mirror, tmp_path, keep_last=2)
    for step in (1, 2, 3):
        path = save(store, step)
        store.finish_mirror()
    assert copies_in(mirror) == ["step-00000002", "step-00000003"]
    copy = UPath(mirror) / "step-00000003"
    for name in ("manifest.json", "model.json", "model.safetensors", "engine/rank0.pt"):
        assert (copy / name).read_bytes() == (path / name).read_bytes()


def test_where_none_is_good_the_newest_good_copy_is_fetched(
    mirror: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = store_with(mirror, tmp_path, keep_last=3)
    for step in (1, 2, 3):
        save(writer, step)
        writer.finish_mirror()
    (UPath(mirror) / "step-00000003" / "engine/rank0.pt").write_bytes(b"x" * 500)
    shutil.rmtree(tmp_path / "here")
    stores = [store_with(mirror, tmp_path, rank=rank) for rank in (0, 1)]
    found = [store.newest_good() for store in stores]
    assert found[0] == found[1]
    assert found[0] is not None
    assert found[0].path == tmp_path / "here" / "step-00000002"
    assert torch.equal(found[0].load_weights()["w"], torch.full((2, 2), 2.0))
    assert "the mirror's checkpoint of step 3 is damaged and is skipped" in caplog.text
    assert f"step 2 was fetched from {mirror}" in caplog.text
    assert caplog.text.count("was fetched") == 1
    # Damaged here, whole there.
    os.truncate(found[0].path / "model.json", 1)
    assert newest_step(stores[0]) == 2
    assert names_in(tmp_path / "here") == ["mirror.lock", "step-00000002"]


def test_an_empty_mirror_has_none(mirror: str, tmp_path: Path) -> None:
    assert store_with(mirror, tmp_path).newest_good() is None


def test_a_copy_without_a_manifest_is_none(mirror: str, tmp_path: Path) -> None:
    writer = store_with(mirror, tmp_path)
    save(writer, 1)
    writer.finish_mirror()
    (UPath(mirror) / "step-00000001" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "here")
    assert store_with(mirror, tmp_path).newest_good() is None


def test_copies_that_fail_are_tried_again_and_training_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def refuse(self: object, path: str, *args: object, **kwargs: object) -> None:
        calls.append(path)
        raise ConnectionError("the store does not answer")

    store = store_with("memory://bucket/run", tmp_path, keep_last=3)
    with monkeypatch.context() as broken:
        broken.setattr(MemoryFileSystem, "_open", refuse)
        for step in (1, 2):
            save(store, step)
            store.finish_mirror()
    # Three attempts at the newest after each save.
    assert len(calls) == 6
    assert "Steps 1 are tried again after the next save" in caplog.text
    assert "Steps 1, 2 are tried again after the next save" in caplog.text
    save(store, 3)
    store.finish_mirror()
    assert copies_in("memory://bucket/run") == ["step-00000001", "step-00000002", "step-00000003"]


def test_a_store_that_answers_the_second_time_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = MemoryFileSystem._open
    refused = []

    def refuse_once(self: MemoryFileSystem, path: str, *args: object, **kwargs: object) -> object:
        if not refused:
            refused.append(path)
            raise ConnectionError("the store does not answer")
        return answers(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "_open", refuse_once)
    store = store_with("memory://bucket/run", tmp_path)
    save(store, 1)
    store.finish_mirror()
    assert copies_in("memory://bucket/run") == ["step-00000001"]


def test_a_slow_mirror_holds_up_no_save(mirror: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_copy = threading.Event()
    copy = Mirror._copy_files
    monkeypatch.setattr(Mirror, "_copy_files", lambda *args: may_copy.wait(20) and copy(*args))
    store = store_with(mirror, tmp_path, keep_last=1)
    for step in (1, 2, 3):
        save(store, step)
    assert store.steps() == [3]
    may_copy.set()
    store.finish_mirror()
    # The first two were deleted here before their turn came.
    assert copies_in(mirror) == ["step-00000003"]


def test_damage_is_not_copied(mirror: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = CheckpointStore(tmp_path / "here")
    path = save(plain, 1)
    (path / "engine/rank0.pt").write_bytes(b"x" * 500)
    store = store_with(mirror, tmp_path)
    save(store, 2)
    store.finish_mirror()
    assert "step-00000001 is damaged and is not copied" in caplog.text
    shutil.rmtree(tmp_path / "here")
    os.makedirs(tmp_path / "here")
    assert newest_step(store) == 2
    assert not (UPath(mirror) / "step-00000001" / "manifest.json").exists()


def test_a_mirror_that_cannot_be_read_is_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, *args: object, **kwargs: object) -> None:
        raise ConnectionError("the store does not answer")

    monkeypatch.setattr(MemoryFileSystem, "ls", refuse)
    store = store_with("memory://bucket/run", tmp_path)
    with pytest.raises(CheckpointError, match=r"ConnectionError: .*make it reachable, or unset"):
        store.newest_good()


def test_a_mirror_that_nothing_opens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"xyz://bucket.*s3://bucket/folder works"):
        CheckpointStore(tmp_path, mirror="xyz://bucket")


def test_a_full_disk_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    size = open_checkpoint(store.path_of(1)).num_bytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    with pytest.raises(CheckpointError, match="free some space or lower"):
        store.save(2, lambda directory: pytest.fail("written in spite of it"), {}, any_rank=alone)
    assert names_in(tmp_path) == ["step-00000001"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * size))
    save(store, 2)
    assert store.steps() == [1, 2]


def test_the_room_for_a_first_checkpoint_is_reckoned_from_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * 4000))
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="it takes about 0 MiB"):
        store.save(1, write_engine, {}, {"w": torch.zeros(1000)}, any_rank=alone)
    store.save(1, write_engine, {}, {"w": torch.zeros(900)}, any_rank=alone)
    store.wait(alone)
