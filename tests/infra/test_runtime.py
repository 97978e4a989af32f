"""Process set-up keeps the user's choices; provenance holds no private facts."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infra import runtime
from infra.runtime import (
    RANK_ENVIRONMENT,
    compute_repeatably,
    environment,
    peak_rss_bytes,
    prepare_process,
    provenance,
)


def test_defaults_are_set_and_the_users_values_kept() -> None:
    environ = {"RAY_AUTH_MODE": "disabled", "CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin"}
    prepare_process(environ)
    assert environ["RAY_AUTH_MODE"] == "disabled"
    assert environ["DS_ACCELERATOR"] == "cpu"
    assert environ["WDS_SECURE"] == "1"
    assert environ["PATH"].endswith("/usr/bin")
    before = dict(environ)
    prepare_process(environ)
    assert environ == before


def test_a_gpu_gets_a_workspace_of_fixed_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_has_gpu", lambda _: True)
    environ: dict[str, str] = {}
    prepare_process(environ)
    assert environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "DS_ACCELERATOR" not in environ


def test_repeatable_operations_are_chosen_without_filling_fresh_memory() -> None:
    try:
        compute_repeatably()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_environment_change_is_undone() -> None:
    os.environ.pop("SVITT_PROBE", None)
    with environment({"SVITT_PROBE": "1", "HOME_OF_NOBODY": None}):
        assert os.environ["SVITT_PROBE"] == "1"
    assert "SVITT_PROBE" not in os.environ


def test_provenance_is_plain_and_holds_no_path(tmp_path: Path) -> None:
    facts = provenance()
    text = json.dumps(facts)
    assert facts["packages"]["torch"].startswith("2.")
    assert str(Path.home()) not in text
    assert facts["commit"] is None or len(facts["commit"]) == 40
    assert provenance(tmp_path)["commit"] is None


def test_peak_memory_is_at_least_what_python_needs() -> None:
    assert peak_rss_bytes() > 5 * 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize(
    ("where", "keeps", "variables"),
    [
        ("the first thread", False, {}),
        ("the first thread", True, {}),
        ("another thread", False, {}),
        ("another thread", True, RANK_ENVIRONMENT),
    ],
)
def test_kept_memory_costs_its_page_faults_once(where: str, keeps: bool, variables: dict[str, str]) -> None:
    # A process of its own, since the setting cannot be taken back. 64 MiB are 16,384 pages of 4 KiB, or 32 large ones.
    # In another thread the setting alone does not do: it is made there both times.
    code = (
        "import resource, threading\n"
        "from infra.runtime import keep_freed_memory\n"
        f"is_set = {keeps or where == 'another thread'}\n"
        "def faults():\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def use():\n"
        "    block = bytearray(64 << 20)\n"
        "    block[::4096] = bytes(len(block) // 4096)\n"
        "def measure():\n"
        "    assert not is_set or keep_freed_memory()\n"
        "    use()\n"
        "    before = faults()\n"
        "    use()\n"
        "    print(faults() - before)\n"
        f"if {where == 'another thread'}:\n"
        "    thread = threading.Thread(target=measure)\n"
        "    thread.start()\n"
        "    thread.join()\n"
        "else:\n"
        "    measure()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, **variables},
    )
    assert (int(done.stdout) < 16) is keeps
