"""Secrets of the environment, of recipes and of error messages are in no file of a run and of its MLflow."""

import logging
from pathlib import Path

import pytest
from small_runs import OVERRIDES
from tracked_runs import Clock, dump_runs, play, tracked_run

from infra.config_io import ConfigError
from infra.journal import Journal
from infra.ledger import Ledger
from jobs.pretrain import log_to_file
from jobs.rebuild import rebuild_run
from jobs.recipe import load_recipe
from jobs.tracking import tracking_uri

CANARIES = {
    "AWS_SECRET_ACCESS_KEY": "canary-of-the-store",
    "MLFLOW_TRACKING_PASSWORD": "canary-of-the-server",
    "HF_TOKEN": "canary-of-the-hub",
}


@pytest.mark.parametrize(
    "override",
    [
        "tracking.uri=http://me:canary@127.0.0.1:5000",
        "data.shards=https://127.0.0.1/c?X-Amz-Signature=canary",
        "checkpoint.mirror=s3://me:canary@bucket/runs",
    ],
)
def test_a_recipe_with_a_secret_in_an_address_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="put secrets into the environment") as caught:
        load_recipe("demo", (*OVERRIDES, override))
    assert override.partition("=")[0] in str(caught.value)
    assert "canary" not in str(caught.value)


def test_no_file_of_a_run_and_of_its_store_holds_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    run = tracked_run(tmp_path)
    with_secrets = " ".join(CANARIES.values())
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    log_to_file(run.log_file(1, 1, 0))
    added = [handler for handler in root.handlers if handler not in before[1]]

    def restore() -> None:
        root.setLevel(before[0])
        for handler in added:
            root.removeHandler(handler)
            handler.close()

    request.addfinalizer(restore)
    said_between = iter(range(10))

    def speak_of_secrets() -> None:
        number = next(said_between)
        journal = Journal(run.journal(0))
        journal.tags({f"answer.{number}": f"{with_secrets} of https://me:canary@host/x?sig=canary"})
        journal.params({f"p{number}": {"api_key": "canary", "command": "--token=canary"}})
        journal.close()
        logging.getLogger("jobs").error("refused: %s at %s", with_secrets, "https://me:canary@host")
        ledger = Ledger(run.ledger_file)
        ledger.record_end(1, 1, "error", f"rank 0: OSError: {with_secrets} password=canary")

    play(run, Clock(), between=speak_of_secrets)
    rebuild_run(run)
    tags = dump_runs(tracking_uri(run.recipe()))["small"]["tags"]
    assert tags["answer.0"] == "*** *** *** of https://***@host/x?sig=***", "it was written, and redacted"
    assert "refused: *** *** *** at https://***@host" in run.log_file(1, 1, 0).read_text()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"ledger.jsonl", "journal.jsonl", "mlflow.db", "recipe.yaml"} <= {path.name for path in files}
    assert [path for path in files if b"canary" in path.read_bytes()] == []
