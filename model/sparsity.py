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
    "choose_random_blocks",
    "draw_edge_layout",
    "draw_layouts",
    "draw_node_scores",
    "keep_count",
    "keep_patches",
    "local_blocks",
    "select_patches",
]


@dataclass(frozen=True, slots=True)
class EdgeLayout:
    """Key blocks of every query block, shared by all samples and heads of a layer.

    `key_blocks_SK[s]` lists the blocks that query block s sees, each at most once (but for the published code's
    quirks, see `official_attention`); -1 marks an unused place.
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
    def from_blocks(
        key_blocks_SK: Int[Tensor, "S K"], block_size: int, num_patches: int, allow_repeats: bool = False
    ) -> "EdgeLayout":
        """Layout from given lists. Raises ValueError for a wrong shape, an unknown block or, unless allowed, one
        listed twice.
        """
        layout = EdgeLayout(key_blocks_SK, block_size, num_patches)
        rows = key_blocks_SK.tolist()
        if len(rows) != layout.num_blocks:
            raise ValueError(
                f"layout has {len(rows)} rows, but {num_patches} patches make {layout.num_blocks} blocks"
            )
        for number, row in enumerate(rows):
            used = [block for block in row if block != -1]
            if len(set(used)) != len(used) and not allow_repeats:
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


def local_blocks(num_blocks: int, num_local: int, circular: bool = False) -> Int[Tensor, "S Kl"]:
    """Blocks at offsets -(K_l-1)/2 .. (K_l-1)/2 of each block; past the ends -1, or round the ends if `circular`.

    A circular window that is wider than the sequence lists a block more than once.
    """
    own = torch.arange(num_blocks)[:, None]
    if num_local == 0:
        return own[:, :0]
    half = (num_local - 1) // 2
    blocks = own + torch.arange(-half, half + 1)
    if circular:
        return blocks % num_blocks
    return torch.where((blocks >= 0) & (blocks < num_blocks), blocks, -1)


def choose_random_blocks(
    uniform_SS: Float[Tensor, "S S"], local_SK: Int[Tensor, "S Kl"], num_random: int, quirks: bool = False
) -> Int[Tensor, "S Kr"]:
    """The `num_random` blocks of highest number in each row that are not local, ascending.

    Where fewer are left, all of them are taken and the row is filled with -1. With `quirks` the rows are filled with
    local blocks instead, which then count twice (published code).
    """
    num_blocks = uniform_SS.shape[0]
    is_local_SS = torch.zeros(num_blocks, num_blocks + 1, dtype=torch.bool)
    is_local_SS = is_local_SS.scatter_(1, local_SK.where(local_SK >= 0, num_blocks), True)[:, :num_blocks]
    if quirks:
        return uniform_SS.masked_fill(is_local_SS, 0.0).topk(num_random, dim=1).indices.sort(dim=1).values
    best = uniform_SS.masked_fill(is_local_SS, -1.0).topk(min(num_random, num_blocks), dim=1)
    absent = num_blocks
    chosen = torch.where(best.values >= 0, best.indices, absent).sort(dim=1).values
    chosen = torch.where(chosen == absent, -1, chosen)
    return chosen[:, : int((chosen >= 0).sum(dim=1).max()) if chosen.numel() else 0]


def draw_edge_layout(
    num_patches: int,
    block_size: int,
    num_local: int,
    num_random: int,
    generator: torch.Generator,
    *,
    circular: bool = False,
    quirks: bool = False,
) -> EdgeLayout:
    """Local blocks in order of offset, then random ones in ascending order.

    Local blocks do not wrap round the ends unless `circular`. No block is listed twice: where fewer than `num_random`
    blocks are left, all of them are taken (K_r is clamped). `quirks` draws as the published code does: the window
    wraps, and blocks may be listed twice.
    """
    num_blocks = -(-num_patches // block_size)
    local_SK = local_blocks(num_blocks, num_local, circular or quirks)
    # Drawn even when no random block is asked for: the stream does not depend on the settings.
    uniform_SS = torch.rand(num_blocks, num_blocks, generator=generator)
    random_SK = choose_random_blocks(uniform_SS, local_SK, num_random, quirks)
    if not quirks:
        local_SK = _without_repeats(local_SK)
    return EdgeLayout(torch.cat([local_SK, random_SK], dim=1), block_size, num_patches)


def _without_repeats(blocks_SK: Tensor) -> Tensor:
    """-1 in place of a block that stands earlier in its row."""
    same_SKK = blocks_SK[:, :, None] == blocks_SK[:, None, :]
    return blocks_SK.masked_fill(same_SKK.tril(diagonal=-1).any(dim=2), -1)


def draw_layouts(config: VideoConfig, edge_seed: int) -> tuple[EdgeLayout | None, ...]:
    """Layouts of all layers for one forward pass, a function of (edge_seed, layer); None where dense."""
    if config.num_random_blocks is None:
        return (None,) * config.depth
    layouts: list[EdgeLayout | None] = []
    for layer, num_patches in enumerate(config.tokens_by_layer()[: config.depth]):
        layouts.append(
            draw_edge_layout(
                num_patches,
                config.block_size,
                config.num_local_blocks,
                config.num_random_blocks,
                torch.Generator().manual_seed(derive_seed("edges", edge_seed, layer)),
                circular=config.circular_window,
                quirks=config.official_quirks,
            )
        )
    return tuple(layouts)


def draw_node_scores(num_patches: int, seed: int, layer: int) -> Float[Tensor, " n"]:
    """Random scores for pruning, a function of (seed, layer). One draw for all clips of all ranks, so that neither
    the micro-batch nor the world size changes what is kept.
    """
    generator = torch.Generator().manual_seed(derive_seed("nodes", seed, layer))
    return torch.rand(num_patches, generator=generator)


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
