"""In place of the compiled CPU kernel and the Triton kernels: an exported model attends in plain torch everywhere."""

from typing import Any, NoReturn

_WHY = (
    "an exported model has no attention kernels; set attention_backend: blocks, or load it with this project"
)

# No type of number is the kernels', so that `auto` never takes them.
FUSED_DTYPES = ()


class FusedUnavailableError(RuntimeError):
    """An attention kernel was asked for that is not here."""


def unavailable_reason() -> str:
    """Why there is no kernel."""
    return _WHY


def warn_if_unavailable() -> bool:
    """False, and nothing to warn of: who exported the model knew."""
    return False


def block_attention(*_: Any) -> NoReturn:
    """Raises FusedUnavailableError."""
    raise FusedUnavailableError(_WHY)


def attend_by_triton(*_: Any) -> NoReturn:
    """Raises FusedUnavailableError."""
    raise FusedUnavailableError(_WHY)
