"""Process set-up keeps the user's choices; provenance holds no private facts."""

import json
import os
from pathlib import Path

from infra.runtime import environment, peak_rss_bytes, prepare_process, provenance


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
