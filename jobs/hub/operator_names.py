"""Names of torch operators that two exported models in one process, or this project beside them, do not share."""

import hashlib


def operator_name(name: str) -> str:
    """`name` in a namespace of this folder's own."""
    return f"svitt_{hashlib.sha256(str(__package__).encode()).hexdigest()[:12]}::{name}"
