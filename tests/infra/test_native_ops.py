"""Building DeepSpeed's operations: stale locks, missing tools, what is logged. Nothing is compiled here."""

import logging
import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import deepspeed.accelerator
import pytest
from filelock import FileLock

from infra import native_ops
from infra.native_ops import NativeBuildError


class Builder:
    """Stands for DeepSpeed's builder; as torch does, it would wait for ever on a `lock` file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.has_libaio = False

    def load(self, verbose: bool) -> str:
        assert not (self.folder / "lock").exists(), "would hang"
        self.folder.mkdir(exist_ok=True)
        (self.folder / "cpu_adam.so").touch()
        return "module"

    def has_function(self, function: str, libraries: tuple[str, ...]) -> bool:
        return self.has_libaio


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    found = Builder(tmp_path / "cpu_adam")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    accelerator = SimpleNamespace(create_op_builder=lambda name: found)
    monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", lambda: accelerator)
    return found


def test_a_lock_left_by_a_killed_build_is_deleted(builder: Builder, caplog: pytest.LogCaptureFixture) -> None:
    builder.folder.mkdir()
    (builder.folder / "lock").touch()
    with caplog.at_level(logging.INFO, "infra.native_ops"):
        assert native_ops.load("cpu_adam") == "module"
    assert "left by a build that was killed" in caplog.text
    assert "building DeepSpeed's cpu_adam into" in caplog.text
    assert native_ops.is_built("cpu_adam")
    caplog.clear()
    native_ops.load("cpu_adam")
    assert not caplog.text


def hold(path: str, held: "multiprocessing.synchronize.Event") -> None:
    with FileLock(path):
        held.set()
        multiprocessing.Event().wait(60)


def test_a_build_in_progress_is_waited_for(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_ops, "_FIRST_BUILD_S", 0.1)
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    other = context.Process(target=hold, args=(str(tmp_path / "cpu_adam.guard"), held))
    other.start()
    try:
        assert held.wait(30)
        with pytest.raises(
            NativeBuildError, match=r"waited 0 s for another process that holds .*cpu_adam\.guard"
        ):
            native_ops.load("cpu_adam")
    finally:
        other.kill()
        other.join()
    assert native_ops.load("cpu_adam") == "module"


def test_missing_tools_are_named(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NativeBuildError, match=r"needs libaio with its header.*apt-get install libaio-dev"):
        native_ops.load("async_io")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        NativeBuildError, match=r"needs no-such-compiler, not found on PATH; install a C\+\+ compiler"
    ):
        native_ops.load("cpu_adam")


def test_a_failed_build_tells_its_cause(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(verbose: bool) -> None:
        raise RuntimeError("Error building extension") from OSError("g++: internal error")

    monkeypatch.setattr(builder, "load", fail)
    with pytest.raises(
        NativeBuildError, match=r"building DeepSpeed's cpu_adam in .* failed: g\+\+: internal error"
    ):
        native_ops.load("cpu_adam")


def test_without_a_folder_for_builds_nothing_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    with pytest.raises(
        NativeBuildError, match=r"TORCH_EXTENSIONS_DIR is not set; call runtime\.prepare_process"
    ):
        native_ops.load("cpu_adam")
