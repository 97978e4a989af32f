"""What all settings of the model share: frozen, no unknown field; and checks that several need. No torch here."""

from pydantic import BaseModel


class FrozenSettings(BaseModel, frozen=True, extra="forbid"):
    """Settings that are checked when made and never change; an unknown field is an error."""


def check_layers(name: str, layers: tuple[int, ...], first: int, end: int) -> None:
    """Raise ValueError unless `layers` are ascending numbers in first..end-1."""
    if list(layers) != sorted(set(layers)) or any(not first <= layer < end for layer in layers):
        raise ValueError(f"{name} {list(layers)} must be ascending layer numbers from {first} to {end - 1}")


def check_offload(offload_activations: bool, recompute: str) -> None:
    """Raise ValueError when activations are to be offloaded of layers that are not recomputed."""
    if offload_activations and recompute == "none":
        raise ValueError(
            "offload_activations moves what recomputed layers keep, and recompute none recomputes nothing; "
            "set recompute to all, or offload_activations to false"
        )
