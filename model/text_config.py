"""Settings of the text side, checked when they are made. No torch here."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from model.settings import FrozenSettings, check_offload


class TextConfig(FrozenSettings, frozen=True):
    """Text encoder (layers before `fusion_layer`) and fusion layers (the rest), all BERT layers."""

    vocab_size: int = Field(default=30522, ge=6)
    width: PositiveInt = 768
    depth: PositiveInt = 12
    fusion_layer: PositiveInt = 9
    num_heads: PositiveInt = 12
    mlp_ratio: float = Field(default=4.0, gt=0)
    max_length: PositiveInt = Field(default=512, description="position embeddings; captions may be shorter")
    dropout: float = Field(default=0.1, ge=0, lt=1)
    init_std: float = Field(default=0.02, gt=0)
    recompute: Literal["none", "all"] = Field(
        default="none",
        description="whether layers are computed again in the backward pass, to save memory; their dropped attention "
        "weights always are",
    )
    offload_activations: bool = Field(
        default=False, description="what recomputed layers keep waits in host memory for the backward pass"
    )
    pad_id: int = 0
    cls_id: int = 2
    mask_id: int = 4

    @model_validator(mode="after")
    def _check(self) -> "TextConfig":
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.fusion_layer > self.depth:
            raise ValueError(f"fusion_layer {self.fusion_layer} exceeds depth {self.depth}")
        for name in ("pad_id", "cls_id", "mask_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"{name} {getattr(self, name)} is outside the vocabulary of {self.vocab_size}"
                )
        check_offload(self.offload_activations, self.recompute)
        return self

    @property
    def mlp_width(self) -> int:
        """Hidden width of the feed-forward part."""
        return round(self.width * self.mlp_ratio)

    @property
    def num_fusion_layers(self) -> int:
        """Layers with cross-attention to video."""
        return self.depth - self.fusion_layer
