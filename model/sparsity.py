"""Which patches are kept (nodes) and which key blocks each query block sees (edges); SViTT, arXiv 2304.08809.

Pure functions on small index tensors. The attention itself is in `attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from model.config import VideoConfig
from model.cost import keep_count
from model.step_key import derive_seed

__all__ = [
    "EdgeLayout",
    "draw_edge_layout",
    "draw_layouts",
    "keep_count",
    "keep_patches",
    "select_patches",
    "token_order",
]


@dataclass(frozen=True, slots=True)
class EdgeLayout:
    """Key blocks of every query block, shared by all samples and heads of a layer.

    `key_blocks_SK[s]` lists the blocks that query block s sees, each at most once; -1 marks an unused place.
    CLS is in no block: it sees everything and everything sees it.
    """

    key_blocks_SK: Int[Tensor, "S K"]
    block_size: int
    num_patches: int

    @property
    def num_blocks(self) -> int:
        """Blocks that the patches are cut into; the last may be partly filled."""
        return -(-self.num_patches // self.block_size)

    @property
    def keys_per_query(self) -> int:
        """Places in the softmax of a patch query: CLS and all listed blocks."""
        return 1 + self.key_blocks_SK.shape[1] * self.block_size

    @staticmethod
    def from_blocks(key_blocks_SK: Int[Tensor, "S K"], block_size: int, num_patches: int) -> "EdgeLayout":
        """Layout from given lists. Raises ValueError for a wrong shape, an unknown block or one listed
        twice.
        """
        layout = EdgeLayout(key_blocks_SK, block_size, num_patches)
        rows = key_blocks_SK.tolist()
        if len(rows) != layout.num_blocks:
            raise ValueError(
                f"layout has {len(rows)} rows, but {num_patches} patches make {layout.num_blocks} blocks"
            )
        for number, row in enumerate(rows):
            used = [block for block in row if block != -1]
            if len(set(used)) != len(used):
                raise ValueError(f"query block {number} lists a key block twice: {row}")
            if any(not 0 <= block < layout.num_blocks for block in used):
                raise ValueError(
                    f"query block {number} lists a block outside 0..{layout.num_blocks - 1}: {row}"
                )
        return layout

    def token_index(self) -> tuple[Int[Tensor, "S W"], Bool[Tensor, "S W"]]:
        """Key tokens of every query block, CLS (token 0) first, and which of them count.

        Tokens past the end of the sequence and unused places are False and point at CLS.
        """
        blocks = self.key_blocks_SK
        offsets = torch.arange(self.block_size, device=blocks.device)
        tokens = (blocks[:, :, None] * self.block_size + offsets).flatten(1)
        valid = (tokens >= 0) & (tokens < self.num_patches)
        tokens = torch.where(valid, tokens + 1, 0)
        return (
            torch.nn.functional.pad(tokens, (1, 0)),
            torch.nn.functional.pad(valid, (1, 0), value=True),
        )

    def dense_mask(self) -> Bool[Tensor, "N N"]:
        """True where a query token (row) sees a key token (column), CLS first."""
        tokens_SW, valid_SW = self.token_index()
        seen_SN = torch.zeros(len(tokens_SW), self.num_patches + 1, dtype=torch.bool, device=tokens_SW.device)
        seen_SN.scatter_(1, tokens_SW, valid_SW)
        seen_SN[:, 0] = True
        patches = seen_SN.repeat_interleave(self.block_size, dim=0)[: self.num_patches]
        return torch.cat([torch.ones_like(patches[:1]), patches])

    def to(self, device: torch.device) -> "EdgeLayout":
        """The same layout on another device."""
        return EdgeLayout(self.key_blocks_SK.to(device), self.block_size, self.num_patches)


def draw_edge_layout(
    num_patches: int, block_size: int, num_local: int, num_random: int, generator: torch.Generator
) -> EdgeLayout:
    """Local blocks in order of offset, then random ones in ascending order.

    Local blocks do not wrap round the ends. Random ones differ from the local ones; where fewer than
    `num_random` blocks are left, all of them are taken, so that no block counts twice (model notes: clamped
    K_r).
    """
    num_blocks = -(-num_patches // block_size)
    half = (num_local - 1) // 2 if num_local else -1
    own = torch.arange(num_blocks)[:, None]
    parts = []
    if num_local:
        local = own + torch.arange(-half, half + 1)
        parts.append(torch.where((local >= 0) & (local < num_blocks), local, -1))
    # Drawn even when no random block is asked for: the stream does not depend on the settings.
    scores = torch.rand(num_blocks, num_blocks, generator=generator)
    scores = scores.masked_fill((own - own.T).abs() <= half, -1.0)
    best = scores.topk(min(num_random, num_blocks), dim=1)
    absent = num_blocks
    chosen = torch.where(best.values >= 0, best.indices, absent).sort(dim=1).values
    chosen = torch.where(chosen == absent, -1, chosen)
    parts.append(chosen[:, : int((chosen >= 0).sum(dim=1).max()) if chosen.numel() else 0])
    return EdgeLayout(torch.cat(parts, dim=1), block_size, num_patches)


def draw_layouts(config: VideoConfig, edge_seed: int) -> list[EdgeLayout | None]:
    """Layouts of all layers for one forward pass, a function of (edge_seed, layer); None where dense."""
    if config.num_random_blocks is None:
        return [None] * config.depth
    layouts: list[EdgeLayout | None] = []
    for layer, num_patches in enumerate(config.tokens_by_layer()[: config.depth]):
        generator = torch.Generator().manual_seed(derive_seed("edges", edge_seed, layer))
        layouts.append(
            draw_edge_layout(
                num_patches, config.block_size, config.num_local_blocks, config.num_random_blocks, generator
            )
        )
    return layouts


def token_order(config: VideoConfig) -> Int[Tensor, " n"]:
    """Clip position (frame by frame, row by row) of every patch in the order in which blocks are cut.

    `raster` leaves them as they are, so that a block is a piece of a few rows of one frame. `zcurve` follows
    a Morton curve with time as the fastest axis, so that a block is a small cube of space and time (SViTT's
    option).
    """
    side = config.grid
    position = torch.arange(config.num_patches)
    if config.token_order == "raster":
        return position
    axes = (position // side**2, position // side % side, position % side)
    bits = max(config.num_frames, side).bit_length()
    key = torch.zeros_like(position)
    for bit in range(bits):
        for place, axis in enumerate(axes):
            key |= (axis >> bit & 1) << (3 * bit + place)
    return key.argsort()


def select_patches(scores_BN: Float[Tensor, "B N"], keep: int) -> Int[Tensor, "B M"]:
    """Positions of the `keep` highest scores of each sample, ascending."""
    return scores_BN.topk(keep, dim=1, sorted=False).indices.sort(dim=1).values


def keep_patches(tokens_BND: Float[Tensor, "B N D"], kept_BM: Int[Tensor, "B M"]) -> Float[Tensor, "B M1 D"]:
    """CLS and the patches at `kept_BM` (CLS not counted)."""
    with_cls = torch.nn.functional.pad(kept_BM + 1, (1, 0))
    num_clips, num_tokens, width = tokens_BND.shape
    offsets = torch.arange(num_clips, device=kept_BM.device)[:, None] * num_tokens
    rows = tokens_BND.reshape(-1, width).index_select(0, (with_cls + offsets).flatten())
    return rows.view(num_clips, -1, width)


def layouts_to(layouts: Sequence[EdgeLayout | None], device: torch.device) -> list[EdgeLayout | None]:
    """All layouts on one device."""
    return [layout if layout is None else layout.to(device) for layout in layouts]
