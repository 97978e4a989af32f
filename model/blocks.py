"""One layer of the video encoder: pre-norm attention and feed-forward with LayerScale and drop path
(BEiT).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from model.attention import Backend, sparse_attention
from model.average_attention import average_attention
from model.config import VideoConfig
from model.lean_mlp import gelu_linear
from model.official_attention import official_attention
from model.row_draws import RowDraws
from model.sparsity import EdgeLayout

NORM_EPS = 1e-12


class VideoAttention(nn.Module):
    """Projections and position table around `sparse_attention`. Query and value have a bias, the key has
    none.
    """

    def __init__(self, config: VideoConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.backend: Backend = config.attention_backend
        self.quirky_window = config.num_local_blocks if config.official_quirks else None
        self.scores_by_average = config.prune_score == "avg_attn"
        # Rows: query, key, value. One matrix, because one large product is faster than three.
        self.qkv_weight = nn.Parameter(torch.empty(3 * width, width))
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.bias_table = nn.Parameter(torch.zeros(config.table_rows, config.num_heads))
        self.output = nn.Linear(width, width)

    def forward(
        self,
        tokens_BND: Float[Tensor, "B N D"],
        codes: Int[Tensor, "*B n"],
        layout: EdgeLayout | None,
        with_scores: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed tokens (B, N, D), and the patches' scores for pruning (B, n) if asked for: attention of CLS, or of
        all tokens, by `prune_score`.
        """
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = functional.linear(tokens_BND, self.qkv_weight, bias).unflatten(-1, (3, self.num_heads, -1))
        by_cls = with_scores and not self.scores_by_average
        if self.quirky_window is not None and layout is not None:
            mixed, scores = official_attention(
                qkv, codes, self.bias_table, layout, self.quirky_window, with_cls_scores=by_cls
            )
        else:
            mixed, scores = sparse_attention(
                qkv, codes, self.bias_table, layout, backend=self.backend, with_cls_scores=by_cls
            )
        if with_scores and self.scores_by_average:
            scores = average_attention(qkv, codes, self.bias_table, layout)
        return self.output(mixed.flatten(2)), scores


class PatchEmbedding(nn.Module):
    """Linear map of square patches, weights in the shape of a convolution of that size and stride.

    A matrix product over cut-out patches, because on a CPU it takes a third of the convolution's time.
    """

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, patch_size, patch_size))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, video_BTCHW: Float[Tensor, "B T 3 H W"]) -> Float[Tensor, "B n D"]:
        """Patch tokens frame by frame, row by row."""
        size = self.weight.shape[-1]
        patches = video_BTCHW.unflatten(4, (-1, size)).unflatten(3, (-1, size)).permute(0, 1, 3, 5, 2, 4, 6)
        return functional.linear(patches.flatten(4).flatten(1, 3), self.weight.flatten(1), self.bias)


class VideoBlock(nn.Module):
    """x += drop_path(scale * attention(norm x)); x += drop_path(scale * mlp(norm x))."""

    def __init__(self, config: VideoConfig, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.attention_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.attention = VideoAttention(config)
        self.attention_scale = nn.Parameter(torch.full((config.width,), config.layer_scale_init))
        self.mlp_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.mlp_in = nn.Linear(config.width, config.mlp_width)
        self.mlp_out = nn.Linear(config.mlp_width, config.width)
        self.mlp_scale = nn.Parameter(torch.full((config.width,), config.layer_scale_init))

    def forward(
        self,
        tokens_BND: Float[Tensor, "B N D"],
        codes: Int[Tensor, "*B n"],
        layout: EdgeLayout | None,
        with_scores: bool,
        draws: RowDraws | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens after the layer (B, N, D), and scores of the patches (B, n) if asked for.

        Drop path is on when `draws` are given.
        """
        mixed, scores = self.attention(self.attention_norm(tokens_BND), codes, layout, with_scores)
        tokens_BND = torch.addcmul(
            tokens_BND, mixed, self._branch_scale(self.attention_scale, draws and draws.at(0))
        )
        hidden = gelu_linear(self.mlp_in(self.mlp_norm(tokens_BND)), self.mlp_out.weight, self.mlp_out.bias)
        tokens_BND = torch.addcmul(
            tokens_BND, hidden, self._branch_scale(self.mlp_scale, draws and draws.at(1))
        )
        return tokens_BND, scores

    def _branch_scale(self, scale_D: Tensor, draws: RowDraws | None) -> Tensor:
        """LayerScale times the drop path of each clip: 0 for a dropped branch, 1 / (1 - rate) for a kept
        one.
        """
        if draws is None or self.drop_path == 0:
            return scale_D
        kept_B11 = draws.keep(self.drop_path, 1, 1).to(scale_D.dtype)
        return scale_D * (kept_B11 / (1 - self.drop_path))
