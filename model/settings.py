"""What all settings of the model share: frozen, no unknown field; and the check of layer lists. No torch here."""

from pydantic import BaseModel


class FrozenSettings(BaseModel, frozen=True, extra="forbid"):
    """Settings that are checked when made and never change; an unknown field is an error."""


def check_layers(name: str, layers: tuple[int, ...], first: int, end: int) -> None:
    """Raise ValueError unless `layers` are ascending numbers in first..end-1."""
    if list(layers) != sorted(set(layers)) or any(not first <= layer < end for layer in layers):
        raise ValueError(f"{name} {list(layers)} must be ascending layer numbers from {first} to {end - 1}")
