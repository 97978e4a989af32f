"""Secrets kept out of whatever is written: journals, ledgers, logs, tracking servers, reports.

They are known by the names they stand under (`api_key: ...`, `?X-Amz-Signature=...`), by their place in an address
(`https://user:password@host`), and by value where an environment variable of such a name holds them.
"""

import logging
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

HIDDEN = "***"

# Words of a name. `key` is one after another (`api_key`), `token` one at the end: `hf_token`, but `token_order`.
_SECRET_WORDS = frozenset(
    ("secret", "password", "passwd", "passphrase", "pwd", "apikey", "credential", "credentials", "dsn")
) | {"signature", "sig", "authorization"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_ADDRESS_PASSWORD = re.compile(
    r"(?<![a-z0-9+.\-])(?P<scheme>[a-z][a-z0-9+.\-]{0,30}://)(?P<user>[^\s/?#'\"]*)@", re.IGNORECASE
)
# Names begin where a word does and are bounded, so that a long text takes a time that is linear in its length.
# name=value and name: value, quoted or not, in addresses, command lines, headers and the text of errors.
_NAME_AND_SIGN = re.compile(
    r"""(?<![A-Za-z0-9_.])(?P<name>[A-Za-z_][A-Za-z0-9_.\-]{0,200})["']?\s{0,4}(?:=|:(?!//))\s{0,4}"""
)
_VALUE = re.compile(r"""(?P<before>["']?(?:(?:Bearer|Basic)\s+)?)[^\s"'&,;)\]}]+""")
_SHORTEST_VALUE = 6  # shorter ones would be struck out of ordinary words


@lru_cache(maxsize=4096)
def is_secret(name: str) -> bool:
    """Whether a value of this name is not to be written: `HF_TOKEN`, `awsAccessKeyId`, `api-key`, `sig`."""
    words = [word.lower() for word in _WORD.findall(name)]
    return "token" in words[-1:] or "key" in words[1:] or not _SECRET_WORDS.isdisjoint(words)


def redacted(text: str, environ: Mapping[str, str] | None = None) -> str:
    """The text without passwords in addresses, values of secret names, and values of secret environment variables
    (`environ`, by default this process's).
    """
    for value in secret_values(os.environ if environ is None else environ):
        text = text.replace(value, HIDDEN)
    text = _ADDRESS_PASSWORD.sub(rf"\g<scheme>{HIDDEN}@", text)
    clean, at = [], 0
    for match in _NAME_AND_SIGN.finditer(text):
        value = _VALUE.match(text, match.end()) if match.start() >= at and is_secret(match["name"]) else None
        if value is not None:
            clean += [text[at : value.end("before")], HIDDEN]
            at = value.end()
    return "".join(clean) + text[at:]


def redacted_mapping(values: Mapping[str, Any]) -> dict[str, Any]:
    """A flat mapping, its secret values hidden and its texts redacted; a dotted name is secret by any of its parts."""
    return {
        name: HIDDEN if is_secret(name) else redacted(value) if isinstance(value, str) else value
        for name, value in values.items()
    }


def secret_values(environ: Mapping[str, str]) -> list[str]:
    """What environment variables of secret names hold, the longest first; paths to files with secrets are none."""
    found = {
        value
        for name, value in environ.items()
        if is_secret(name) and len(value) >= _SHORTEST_VALUE and not value.startswith("/")
    }
    return sorted(found, key=len, reverse=True)


def secret_in_address(text: str) -> str | None:
    """What makes an address unfit for being stored: `a password` or the name of a query parameter; None where nothing
    does.
    """
    if (match := _ADDRESS_PASSWORD.search(text)) and ":" in match["user"]:
        return "a password"
    _, mark, query = text.partition("?")
    if mark and "://" in text:
        return next(
            (part.partition("=")[0] for part in query.split("&") if is_secret(part.partition("=")[0])), None
        )
    return None


class RedactingFilter(logging.Filter):
    """Redacts every line a handler writes, with the text of its exception."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage()), None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = redacted(record.exc_text)
        return True
