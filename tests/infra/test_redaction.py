"""Secrets are known by name, by place in an address and by value; ordinary settings are left alone."""

import logging
from pathlib import Path

import pytest

from infra.config import TrackingConfig
from infra.config_io import ConfigError, validate
from infra.journal import Journal, flatten
from infra.ledger import Ledger
from infra.redaction import RedactingFilter, is_secret, redacted, secret_in_address
from jobs.recipe import load_recipe


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "api_key",
        "awsSecretAccessKey",
        "AWS_ACCESS_KEY_ID",
        "db.password",
        "passwd",
        "client-secret",
        "SENTRY_DSN",
        "sig",
        "X-Amz-Signature",
        "credentials",
        "apikey",
        "Authorization",
        "private.key",
        "token",
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "keep_rate",
        "tokens_in",
        "tokens_out",
        "key",
        "KeyError",
        "monkey",
        "keyframes",
        "token_order",
        "signal",
    ],
)
def test_names_of_other_things(name: str) -> None:
    assert not is_secret(name)


def test_no_setting_of_a_recipe_is_taken_for_a_secret() -> None:
    flat = flatten(load_recipe("demo").model_dump(mode="json"))
    assert [name for name in flat if is_secret(name)] == []


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("http://me:pw@host:5000/x", "http://***@host:5000/x"),
        (
            "GET https://b/k?X-Amz-Signature=abc&part=1 failed",
            "GET https://b/k?X-Amz-Signature=***&part=1 failed",
        ),
        ("https://b/k?sv=1&sig=abc%2B", "https://b/k?sv=1&sig=***"),
        ("{'Authorization': 'Bearer abc'}", "{'Authorization': 'Bearer ***'}"),
        ("Authorization: Bearer abc", "Authorization: Bearer ***"),
        ('{"api_key": "abc"}', '{"api_key": "***"}'),
        ("run --token=abc --api-key abc", "run --token=*** --api-key abc"),
        ("--set data.password=abc --set seed=1", "--set data.password=*** --set seed=1"),
        (
            "KeyError: 'stage'; keep_rate=0.7; tokens_in: 12",
            "KeyError: 'stage'; keep_rate=0.7; tokens_in: 12",
        ),
        ("see https://host/a@b and s3://bucket/key", "see https://host/a@b and s3://bucket/key"),
        ("the server said canary-77 to that", "the server said *** to that"),
    ],
)
def test_texts_lose_their_secrets_and_nothing_else(text: str, clean: str) -> None:
    assert (
        redacted(text, {"HF_TOKEN": "canary-77", "HOME": "server", "RAY_AUTH_TOKEN_PATH": "/a/path"}) == clean
    )


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("https://me:pw@host", "a password"),
        ("postgresql://me:pw@host/db", "a password"),
        ("https://host/x?token=abc", "token"),
        ("https://host/x?X-Amz-Signature=abc", "X-Amz-Signature"),
        ("https://me@host", None),
        ("s3://bucket/path", None),
        ("sqlite:////tmp/mlflow.db", None),
    ],
)
def test_addresses_that_must_not_be_stored(address: str, what: str | None) -> None:
    assert secret_in_address(address) == what


def test_a_recipe_with_a_password_is_refused_and_the_message_does_not_hold_it() -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        validate(TrackingConfig, {"uri": "http://me:canary@host:5000"}, "recipe.yaml")
    assert "uri: the address http://***@host:5000 holds a password" in str(caught.value)
    assert "canary" not in str(caught.value)


def test_journal_and_ledger_are_written_without_secrets(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.params({"store": {"api_key": "canary", "url": "https://a:canary@b"}, "keep_rate": 0.5})
    journal.tags({"hf_token": "canary", "commit": "abc"})
    journal.close()
    ledger = Ledger(tmp_path / "ledger.jsonl")
    generation = ledger.record_start(1, 1)
    ledger.record_end(1, generation, "error", "OSError: https://b/k?X-Amz-Signature=canary refused")
    ledger.record_stage(1, "failed", reason="password=canary", checkpoint="step-00000010")
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "canary" not in text
    assert text.count("***") == 5
    assert ledger.read().stage(1).facts["checkpoint"] == "step-00000010"


def test_log_lines_and_tracebacks_lose_their_secrets(tmp_path: Path) -> None:
    handler = logging.FileHandler(tmp_path / "log")
    handler.addFilter(RedactingFilter())
    logger = logging.getLogger("test.redaction")
    logger.propagate = False
    logger.addHandler(handler)
    logger.warning("connecting to %s", "http://me:canary@host")
    try:
        raise OSError("token=canary")
    except OSError:
        logger.exception("it failed")
    handler.close()
    text = (tmp_path / "log").read_text()
    assert "connecting to http://***@host" in text
    assert "OSError: token=***" in text
    assert "canary" not in text.replace('raise OSError("token=canary")', "")
