"""Settings of the model, checked when they are made, and the numbers that follow from them. No torch here.

Sizes: `ModelConfig.named("base")` is SViTT's published model (arXiv 2304.08809), `small` and `tiny` are for
CPUs.
"""

from collections.abc import Mapping
from math import ceil
from typing import Any, Literal, NamedTuple

from pydantic import Field, PositiveInt, model_validator

from model import cost
from model.cost import keep_count
from model.named_sizes import NAMED_SIZES
from model.settings import FrozenSettings, check_layers, check_offload
from model.text_config import TextConfig


class Gmacs(NamedTuple):
    """Billions of multiply-accumulates of one clip: one pass of each part, and a training step's forward."""

    video: float
    text: float
    fusion: float
    training_forward: float


PruneScore = Literal["cls_attn", "avg_attn", "random"]


class VideoConfig(FrozenSettings, frozen=True):
    """Video encoder. Layers count from 0; `num_random_blocks` None means dense attention."""

    num_frames: PositiveInt = 4
    image_size: PositiveInt = 224
    patch_size: PositiveInt = 16
    width: PositiveInt = 768
    depth: PositiveInt = 12
    num_heads: PositiveInt = 12
    mlp_ratio: float = Field(default=4.0, gt=0)
    drop_path: float = Field(
        default=0.1, ge=0, lt=1, description="rate of the last layer; grows linearly from 0"
    )
    keep_rate: float = Field(
        default=0.7, gt=0, le=1, description="share of patches kept after each pruning layer"
    )
    prune_layers: tuple[int, ...] = (3, 6, 9)
    prune_score: PruneScore = Field(
        default="cls_attn",
        description="attention of CLS, mean attention of all tokens, or keyed random numbers",
    )
    num_local_blocks: int = Field(default=1, ge=0, description="0 or odd; counts the own block")
    num_random_blocks: int | None = Field(default=3, ge=0, description="None: dense attention")
    block_size: PositiveInt = 56
    token_order: Literal["raster", "zcurve", "hilbert"] = "raster"
    circular_window: bool = Field(default=False, description="local blocks wrap round the ends of the clip")
    official_quirks: bool = Field(
        default=False,
        description="attend as the published code does (model/official_attention.py): padded keys take part, local "
        "blocks wrap round and a block may count twice, values and bias of a local window are mirrored",
    )
    layer_scale_init: float = 0.1
    init_std: float = Field(default=0.02, gt=0)
    position_init: Literal["zeros", "normal", "motion"] = "zeros"
    position_init_scale: float = Field(default=1.0, ge=0, description="std of normal, slope of motion")
    absolute_position_std: float = Field(
        default=0.0,
        ge=0,
        description="adds learned embeddings of time and place that start with this spread; 0: none, as published. "
        "A small model trained from scratch learns order from them within minutes when they start as large as patches",
    )
    eval_edge_seed: int = Field(
        default=0, description="random edges of evaluation are a function of this and the layer"
    )
    attention_backend: Literal["auto", "reference", "blocks", "fused", "triton"] = "auto"
    recompute: Literal["none", "all_but_attention", "all"] = Field(
        default="none",
        description="what of a layer is computed again in the backward pass, to save memory; all_but_attention keeps "
        "the results of the attention kernel, the dearest part",
    )
    offload_activations: bool = Field(
        default=False, description="what recomputed layers keep waits in host memory for the backward pass"
    )

    @model_validator(mode="after")
    def _check(self) -> "VideoConfig":
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; "
                f"take {self.image_size // self.patch_size * self.patch_size or self.patch_size}"
            )
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.keep_rate < 1:
            check_layers("prune_layers", self.prune_layers, 0, self.depth)
        if self.num_random_blocks is not None:
            self._check_blocks(self.num_random_blocks)
        self._check_recompute()
        return self

    def _check_recompute(self) -> None:
        check_offload(self.offload_activations, self.recompute)
        plain = "official_quirks" if self.official_quirks else "attention_backend reference"
        if self.recompute == "all_but_attention" and (
            self.official_quirks or self.attention_backend == "reference"
        ):
            raise ValueError(
                f"recompute all_but_attention keeps the results of an attention kernel, and {plain} runs none; "
                "take recompute all"
            )

    def _check_blocks(self, num_random_blocks: int) -> None:
        if self.num_local_blocks and self.num_local_blocks % 2 == 0:
            raise ValueError(
                f"num_local_blocks {self.num_local_blocks} must be 0 or odd: the own block is the middle"
            )
        if self.num_local_blocks + num_random_blocks == 0:
            raise ValueError(
                "num_local_blocks and num_random_blocks are both 0, so patches would see only CLS; "
                "set one of them, or num_random_blocks to null for dense attention"
            )
        if self.block_size > self.num_patches:
            raise ValueError(
                f"block_size {self.block_size} exceeds the {self.num_patches} patches of {self.num_frames} "
                f"frames of {self.image_size} px; take block_size <= {self.num_patches}, "
                "or num_random_blocks null for dense attention"
            )
        if self.official_quirks:
            self._check_quirks(num_random_blocks)

    def _check_quirks(self, num_random_blocks: int) -> None:
        if self.prune_score == "avg_attn":
            raise ValueError(
                "prune_score avg_attn is not part of the published code; take cls_attn or random, "
                "or leave official_quirks off"
            )
        fewest = min(self.blocks_by_layer())
        if num_random_blocks > fewest:
            raise ValueError(
                f"num_random_blocks {num_random_blocks} exceeds the {fewest} blocks that pruning leaves, where the "
                f"published code stops; take at most {fewest}, or leave official_quirks off, which takes all there are"
            )

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patch tokens of a clip before pruning, CLS not counted."""
        return self.num_frames * self.grid**2

    @property
    def table_rows(self) -> int:
        """Rows of the relative position table: all offsets in time, height and width, and three for CLS."""
        return (2 * self.num_frames - 1) * (2 * self.grid - 1) ** 2 + 3

    @property
    def mlp_width(self) -> int:
        """Hidden width of the feed-forward part."""
        return round(self.width * self.mlp_ratio)

    def layer_parameters(self) -> int:
        """Parameters of one layer's matrices."""
        return self.width * (4 * self.width + 2 * self.mlp_width)

    @property
    def is_dense(self) -> bool:
        """True when every patch sees every patch in the layout asked for."""
        return self.num_random_blocks is None

    def prunes_after(self, layer: int) -> bool:
        """True when patches are dropped at the end of this layer."""
        return self.keep_rate < 1 and layer in self.prune_layers

    def tokens_by_layer(self) -> tuple[int, ...]:
        """Alive patch tokens at the start of each layer, and in the last entry those that leave the
        encoder.
        """
        counts = [self.num_patches]
        for layer in range(self.depth):
            kept = keep_count(counts[-1], self.keep_rate) if self.prunes_after(layer) else counts[-1]
            counts.append(kept)
        return tuple(counts)

    def blocks_by_layer(self) -> tuple[int, ...]:
        """Query blocks of each layer (the last may be partly filled); 0 where attention is dense."""
        if self.num_random_blocks is None:
            return (0,) * self.depth
        return tuple(ceil(count / self.block_size) for count in self.tokens_by_layer()[: self.depth])

    def macs(self) -> int:
        """MACs of one forward pass of one clip."""
        layers = zip(self.tokens_by_layer()[: self.depth], self.blocks_by_layer(), strict=True)
        asked = self.num_local_blocks + (self.num_random_blocks or 0)
        embedding = self.num_patches * 3 * self.patch_size**2 * self.width
        return embedding + sum(
            cost.video_layer_macs(
                n,
                self.width,
                self.mlp_width,
                nb,
                self.block_size,
                asked if self.official_quirks else min(asked, nb),
            )
            for n, nb in layers
        )


class ModelConfig(FrozenSettings, frozen=True):
    """The whole model and its three losses. A loss with weight 0 is not computed."""

    video: VideoConfig = VideoConfig()
    text: TextConfig = TextConfig()
    joint_width: PositiveInt = 256
    multimodal_keep_rate: float = Field(default=1.0, gt=0, le=1)
    multimodal_prune_layers: tuple[int, ...] = (9,)
    multimodal_score: PruneScore = "cls_attn"
    temperature: float = Field(default=0.05, gt=0, description="fixed, or the start of the learned one")
    learn_temperature: bool = False
    temperature_range: tuple[float, float] = (0.001, 0.5)
    vtc_weight: float = Field(default=1.0, ge=0)
    vtm_weight: float = Field(default=1.0, ge=0)
    mlm_weight: float = Field(default=1.0, ge=0)
    vtc_loss: Literal["ego_nce", "info_nce"] = Field(
        default="ego_nce", description="mass on all positives, or targets spread evenly over them (SViTT)"
    )
    vtc_positives: Literal["action", "identity"] = "action"
    vtc_directions: Literal["sum", "mean"] = "sum"
    vtm_hard_negatives: bool = True
    mlm_probability: float = Field(default=0.5, gt=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.multimodal_keep_rate < 1:
            check_layers(
                "multimodal_prune_layers",
                self.multimodal_prune_layers,
                self.text.fusion_layer,
                self.text.depth,
            )
        if self.text.num_fusion_layers == 0 and (self.vtm_weight or self.mlm_weight):
            raise ValueError(
                f"text.fusion_layer {self.text.fusion_layer} leaves no fusion layer, which vtm and mlm need; "
                "lower it, or set vtm_weight and mlm_weight to 0"
            )
        if self.vtc_weight == self.vtm_weight == self.mlm_weight == 0:
            raise ValueError(
                "vtc_weight, vtm_weight and mlm_weight are all 0: nothing to train; set one of them"
            )
        return self

    def replaced(
        self, *, video: Mapping[str, Any] | None = None, text: Mapping[str, Any] | None = None, **top: Any
    ) -> "ModelConfig":
        """A checked copy with some fields changed, as in `config.replaced(video={"num_frames": 8})`."""
        return ModelConfig(
            **{
                **dict(self),
                **top,
                "video": VideoConfig(**{**dict(self.video), **(video or {})}),
                "text": TextConfig(**{**dict(self.text), **(text or {})}),
            }
        )

    def num_parameters(self) -> int:
        """Parameters of the model, tied weights counted once."""
        video, text = self.video, self.text
        total = cost.video_parameters(
            video.depth,
            video.width,
            video.mlp_width,
            video.num_heads,
            video.table_rows,
            3 * video.patch_size**2,
        )
        if video.absolute_position_std:
            total += (video.num_frames + video.grid**2) * video.width
        total += cost.text_parameters(
            text.depth,
            text.num_fusion_layers,
            text.width,
            text.mlp_width,
            text.vocab_size,
            text.max_length,
            video.width,
        )
        projections = (video.width + text.width + 2) * self.joint_width
        return total + projections + 2 * text.width + 2 + int(self.learn_temperature)

    def largest_parameter(self) -> int:
        """Elements of the largest one: a matrix of the MLP, the words' or a position table, or the patch projection."""
        video, text = self.video, self.text
        return max(
            video.width * max(video.mlp_width, 3 * video.width, 3 * video.patch_size**2),
            video.table_rows * video.num_heads,
            text.width * max(text.mlp_width, text.vocab_size),
        )

    def fusion_tokens_by_layer(self) -> tuple[int, ...]:
        """Video tokens, CLS included, that each fusion layer sees."""
        counts = [self.video.tokens_by_layer()[-1]]
        for layer in range(self.text.fusion_layer, self.text.depth):
            prunes = self.multimodal_keep_rate < 1 and layer in self.multimodal_prune_layers
            counts.append(keep_count(counts[-1], self.multimodal_keep_rate) if prunes else counts[-1])
        return tuple(count + 1 for count in counts[: self.text.num_fusion_layers])

    def gmacs_per_clip(self, text_length: int) -> Gmacs:
        """Cost of one clip with a caption of `text_length` tokens.

        A training step runs one video pass, two text passes (captions, masked captions) and four fusion
        passes (matching pair, two negatives, masked caption), less where a loss is switched off.
        """
        text = self.text
        layer = cost.text_layer_macs(text_length, text.width, text.mlp_width)
        encode = text.fusion_layer * layer
        fuse = sum(
            layer + cost.cross_attention_macs(text_length, tokens, text.width, self.video.width)
            for tokens in self.fusion_tokens_by_layer()
        )
        has_vtm, has_mlm = self.vtm_weight > 0, self.mlm_weight > 0
        training = self.video.macs() + (1 + has_mlm) * encode + (3 * has_vtm + has_mlm) * fuse
        return Gmacs(self.video.macs() / 1e9, encode / 1e9, fuse / 1e9, training / 1e9)

    @staticmethod
    def named(name: str) -> "ModelConfig":
        """One of the named sizes: large, base (as published), small, tiny."""
        if name not in NAMED_SIZES:
            raise ValueError(f"no model size is called {name!r}; choose one of {', '.join(NAMED_SIZES)}")
        return ModelConfig.model_validate(NAMED_SIZES[name])
