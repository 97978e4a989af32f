"""Mean attention that each patch receives from all tokens: the score of average-attention pruning."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from model.relative_bias import all_pair_rows
from model.sparsity import EdgeLayout


@torch.no_grad()
def average_attention(
    qkv_BN3AE: Float[Tensor, "B N 3 A E"],
    codes: Int[Tensor, "*B n"],
    bias_table: Float[Tensor, "R A"],
    layout: EdgeLayout | None = None,
) -> Float[Tensor, "B n"]:
    """Attention weight of each patch, mean over all N queries (CLS included) and heads; without gradient.

    The weights are those of `sparse_attention`. One head's N x N scores are held at a time: only the layers that
    prune need them.
    """
    q_BANE, k_BANE, _ = qkv_BN3AE.permute(2, 0, 3, 1, 4)
    scale = q_BANE.shape[-1] ** -0.5
    rows = all_pair_rows(codes, bias_table.shape[0])
    hidden_NN = None if layout is None else ~layout.dense_mask()
    total_BN = q_BANE.new_zeros(q_BANE.shape[0], q_BANE.shape[2])
    for head in range(q_BANE.shape[1]):
        scores_BNN = scale * q_BANE[:, head] @ k_BANE[:, head].transpose(-1, -2) + bias_table[:, head][rows]
        if hidden_NN is not None:
            scores_BNN = scores_BNN.masked_fill(hidden_NN, float("-inf"))
        total_BN += scores_BNN.softmax(dim=-1).mean(dim=1)
    return total_BN[:, 1:] / q_BANE.shape[1]
