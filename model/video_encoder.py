"""The sparse video encoder of SViTT (arXiv 2304.08809): patches of all frames and one CLS, attended jointly.

Edge sparsity: block layouts per layer. Node sparsity: after some layers only the patches that CLS attends to
most are kept. As published there is no temporal embedding, order is known only through the relative position
tables; `absolute_position_std` adds embeddings of time and place.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from model.attention import token_codes
from model.blocks import NORM_EPS, PatchEmbedding, VideoAttention, VideoBlock
from model.config import VideoConfig
from model.errors import ModelInputError
from model.recompute import LayerRunner
from model.row_draws import RowDraws
from model.sparsity import (
    EdgeLayout,
    draw_layouts,
    draw_node_scores,
    keep_count,
    keep_patches,
    layouts_to,
    select_patches,
)
from model.token_order import token_order

# Offsets (time, height, width) of the query from its preferred key: 1 in time looks one frame back.
MOTION_OFFSETS: tuple[tuple[int, int, int] | None, ...] = (
    (1, 0, 0),
    (-1, 0, 0),
    (1, 0, 1),
    (1, 0, -1),
    (0, 0, 0),
    None,
    (1, 1, 0),
    (1, -1, 0),
    (-1, 0, 1),
    (-1, 0, -1),
    (2, 0, 0),
    None,
)


class VideoEncoding(NamedTuple):
    """Surviving tokens, CLS first, without a final norm; their pooled vector; what each pruning kept.

    `keep_indices` has one entry per pruning layer: positions in the clip (frame by frame, row by row),
    in the order of the tokens, which is ascending for `raster`.
    """

    tokens_BMD: Float[Tensor, "B M D"]
    pooled_BD: Float[Tensor, "B D"]
    keep_indices: tuple[Int[Tensor, "B m"], ...]


class VideoEncoder(nn.Module):
    """Patch embedding, sparse layers, and the norm of the mean over surviving patches."""

    def __init__(self, config: VideoConfig) -> None:
        super().__init__()
        self.config = config
        self.run_layer = LayerRunner(config.recompute, config.offload_activations)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.patch_embed = PatchEmbedding(config.patch_size, config.width)
        if config.absolute_position_std:
            self.time_embedding = nn.Parameter(torch.zeros(config.num_frames, config.width))
            self.place_embedding = nn.Parameter(torch.zeros(config.grid**2, config.width))
        rates = [config.drop_path * layer / max(config.depth - 1, 1) for layer in range(config.depth)]
        self.layers = nn.ModuleList(VideoBlock(config, rate) for rate in rates)
        self.pooled_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.register_buffer(
            "codes", token_codes(config.num_frames, config.grid, config.grid), persistent=False
        )
        self.register_buffer("order", token_order(config), persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal of `init_std` for matrices and CLS, zero biases, position tables by
        `position_init`.
        """
        std = self.config.init_std
        nn.init.trunc_normal_(self.cls_token, std=std)
        if self.config.absolute_position_std:
            nn.init.normal_(self.time_embedding, std=self.config.absolute_position_std)
            nn.init.normal_(self.place_embedding, std=self.config.absolute_position_std)
        for module in self.modules():
            if isinstance(module, nn.Linear | PatchEmbedding):
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
        attentions = [module for module in self.modules() if isinstance(module, VideoAttention)]
        for number, attention in enumerate(attentions):
            nn.init.trunc_normal_(attention.qkv_weight, std=std)
            init_bias_table(attention.bias_table, self.config, number)

    def forward(
        self,
        video_BTCHW: Float[Tensor, "B T 3 H W"],
        edge_seed: int | None = None,
        layouts: Sequence[EdgeLayout | None] | None = None,
        draws: RowDraws | None = None,
    ) -> VideoEncoding:
        """Encode normalised clips; drop path is on when `draws` are given.

        Random edges and random pruning are a function of `edge_seed` (None: the fixed seed of evaluation); edges
        may be given instead, as `layouts` of all layers. Raises ModelInputError when the clip's shape is not the
        configured one, or when it holds values that are not finite (see `check_finite`).
        """
        config = self.config
        self._check(video_BTCHW)
        seed = config.eval_edge_seed if edge_seed is None else edge_seed
        if layouts is None:
            layouts = draw_layouts(config, seed)
        layouts = layouts_to(layouts, video_BTCHW.device)
        tokens = self._embed(video_BTCHW)
        clip_codes: Tensor = self.codes  # pyright: ignore[reportAssignmentType]
        # Clip positions of the alive patches: (n,) while all clips hold the same, (B, n) after the first pruning.
        positions: Tensor = self.order  # pyright: ignore[reportAssignmentType]
        codes = clip_codes[positions]
        keep_indices: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            prunes = config.prunes_after(number)
            with_scores = prunes and config.prune_score != "random"
            tokens, scores = self.run_layer(
                layer, tokens, codes, layouts[number], with_scores, draws and draws.at(number)
            )
            if prunes:
                if scores is None:
                    scores = draw_node_scores(tokens.shape[1] - 1, seed, number).to(tokens.device)
                    scores = scores.expand(len(tokens), -1)
                kept = select_patches(scores, keep_count(scores.shape[1], config.keep_rate))
                tokens = keep_patches(tokens, kept)
                positions = positions[kept] if positions.dim() == 1 else positions.gather(1, kept)
                keep_indices.append(positions)
                codes = clip_codes[positions]
        pooled = self.pooled_norm(tokens[:, 1:].mean(dim=1))
        return VideoEncoding(tokens, pooled, tuple(keep_indices))

    def _embed(self, video_BTCHW: Tensor) -> Tensor:
        patches = self.patch_embed(video_BTCHW.to(self.cls_token.dtype))
        if self.config.absolute_position_std:
            patches = patches + (self.time_embedding[:, None] + self.place_embedding).flatten(0, 1)
        if self.config.token_order != "raster":
            patches = patches.index_select(1, self.order)  # pyright: ignore[reportArgumentType]
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)

    def _check(self, video_BTCHW: Tensor) -> None:
        config = self.config
        side = config.image_size
        if video_BTCHW.dim() != 5:
            raise ModelInputError(
                f"a video batch has axes (B, T, 3, H, W); got shape {tuple(video_BTCHW.shape)}"
            )
        num_frames = video_BTCHW.shape[1]
        if num_frames != config.num_frames:
            raise ModelInputError(
                f"clips have {num_frames} frames, the position tables are for {config.num_frames}; "
                f"sample {config.num_frames} frames, or build the model with num_frames={num_frames} "
                "and load the weights with model.weights.load_for_num_frames"
            )
        if tuple(video_BTCHW.shape[2:]) != (3, side, side):
            raise ModelInputError(
                f"frames have shape {tuple(video_BTCHW.shape[2:])}, the model takes (3, {side}, {side}); "
                "change image_size of the loader or of the model"
            )
        if not torch.compiler.is_compiling():
            check_finite(video_BTCHW, self.training)


def check_finite(video_BTCHW: Tensor, is_training: bool) -> None:
    """Raise ModelInputError that names the clips with NaN or infinite values.

    Clips on an accelerator are not looked at in training: reading the answer would stop the stream in every step, the
    frames were uint8 until the step normalised them, and a loss that is not finite is caught by the engine.
    """
    if is_training and video_BTCHW.device.type != "cpu":
        return
    # A sum is not finite when any of its terms is not, and unlike a mask it writes nothing.
    sums_B = video_BTCHW.flatten(1).sum(dim=1, dtype=torch.float64)
    if not bool(sums_B.isfinite().all()):
        rows = (~sums_B.isfinite()).nonzero().flatten().tolist()
        raise ModelInputError(
            f"clips in rows {rows} hold NaN or infinite values; look at their normalisation, "
            "or reject the clips they were decoded from"
        )


@torch.no_grad()
def init_bias_table(table_RA: Tensor, config: VideoConfig, layer: int) -> None:
    """Fill the relative position table of one layer.

    `zeros`: as BEiT; all order is then learned from nothing. `normal`: N(0, position_init_scale). `motion`:
    each head starts with a preferred offset in time and space (bias -scale * city-block distance from it),
    the heads of successive layers going through `MOTION_OFFSETS`, one head in six without preference. Order
    and direction of movement then show in the features from the first step; meant for small models trained
    from scratch.
    """
    nn.init.zeros_(table_RA)
    if config.position_init == "normal":
        nn.init.normal_(table_RA, std=config.position_init_scale)
    if config.position_init != "motion":
        return
    time = torch.arange(2 * config.num_frames - 1, device=table_RA.device) - (config.num_frames - 1)
    space = torch.arange(2 * config.grid - 1, device=table_RA.device) - (config.grid - 1)
    offsets_R3 = torch.cartesian_prod(time, space, space)
    num_heads = table_RA.shape[1]
    for head in range(num_heads):
        preferred = MOTION_OFFSETS[(layer * num_heads + head) % len(MOTION_OFFSETS)]
        if preferred is not None:
            distance = (offsets_R3 - offsets_R3.new_tensor(preferred)).abs().sum(dim=1)
            table_RA[:-3, head] = -config.position_init_scale * distance.to(table_RA.dtype)
