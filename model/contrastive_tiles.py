"""Contrastive loss of a large batch and its gradient, tile by tile: the N x N logits never exist whole.

As in Inf-CL (arXiv 2410.17243): one sweep over tiles for the log-sum-exps of rows and columns, a second that makes
each tile again for the gradient. Each rank sweeps its own texts against the videos of all ranks. The reference is
`losses.ego_nce` and `losses.info_nce` under autograd.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from model.collectives import all_gather_rows, local_rows, sum_over_ranks
from model.losses import ActionTags, Directions, PositiveRule

Loss = Literal["ego_nce", "info_nce"]


class ContrastiveResult(NamedTuple):
    """Of the whole batch over all ranks, gradients for this rank's rows. Equal on all ranks but the two of rows."""

    loss: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]  # texts whose most similar video is a positive
    text_gradient_BP: Float[Tensor, "B P"]
    video_gradient_BP: Float[Tensor, "B P"]
    temperature_gradient: Float[Tensor, " 1"]


class _Statistics:
    """Of lines (rows or columns) of the logits: log-sum-exp, and what the loss needs of the positives.

    For EgoNCE that is the log-sum-exp over them; for InfoNCE their number and their mean.
    """

    def __init__(self, num_lines: int, loss: Loss, like: Tensor) -> None:
        self.loss = loss
        start = float("-inf") if loss == "ego_nce" else 0.0
        self.everything = like.new_full((num_lines,), float("-inf"))
        self.positive = like.new_full((num_lines,), start)
        self.count = like.new_zeros(num_lines)

    def add(self, lines: slice, logits: Tensor, positives: Tensor) -> None:
        """Lines stand along the first axis."""
        self.everything[lines] = torch.logaddexp(self.everything[lines], logits.logsumexp(dim=1))
        self.count[lines] += positives.sum(dim=1)
        if self.loss == "ego_nce":
            on_positives = logits.masked_fill(~positives, float("-inf")).logsumexp(dim=1)
            self.positive[lines] = torch.logaddexp(self.positive[lines], on_positives)
        else:
            self.positive[lines] += (logits * positives).sum(dim=1)

    def combine_ranks(self) -> None:
        """For lines of which every rank has seen a part."""
        self.everything = all_gather_rows(self.everything[None]).logsumexp(dim=0)
        self.count = sum_over_ranks(self.count)
        parts = all_gather_rows(self.positive[None])
        self.positive = parts.logsumexp(dim=0) if self.loss == "ego_nce" else parts.sum(dim=0)

    def loss_sum(self) -> Tensor:
        positive = self.positive if self.loss == "ego_nce" else self.positive / self.count
        return (self.everything - positive).sum()

    def gradient(self, lines: slice, logits: Tensor, positives: Tensor) -> Tensor:
        """Of `loss_sum` with respect to a tile of logits, lines along the first axis."""
        share = (logits - self.everything[lines, None]).exp()
        if self.loss == "ego_nce":
            on_positives = (logits - self.positive[lines, None]).masked_fill(~positives, float("-inf"))
            return share - on_positives.exp()
        return share - positives / self.count[lines, None]


@torch.no_grad()
def contrastive_tiles(
    text_BP: Float[Tensor, "B P"],
    video_BP: Float[Tensor, "B P"],
    temperature: Float[Tensor, " 1"],
    tags: ActionTags,
    *,
    loss: Loss,
    positives: PositiveRule,
    directions: Directions,
    tile: int = 512,
) -> ContrastiveResult:
    """Loss of all ranks' rows and its whole gradient for this rank's rows. Every rank has B rows.

    Features are unit-norm, float32; logits are their cosines divided by `temperature`.
    """
    num_rows = len(text_BP)
    video_GP, all_tags = all_gather_rows(video_BP), tags.gathered()
    rows, columns = _Statistics(num_rows, loss, text_BP), _Statistics(len(video_GP), loss, text_BP)
    best_B, best_is_positive_B = text_BP.new_full((num_rows,), float("-inf")), text_BP.new_zeros(num_rows)

    def tiles() -> Iterator[tuple[slice, slice, Tensor, Bool[Tensor, "r c"]]]:
        for row in _slices(num_rows, tile):
            for column in _slices(len(video_GP), tile):
                logits = text_BP[row] @ video_GP[column].T / temperature
                yield row, column, logits, tags.rows(row).positives(all_tags.rows(column), positives)

    for row, column, logits, is_positive in tiles():
        rows.add(row, logits, is_positive)
        columns.add(column, logits.T, is_positive.T)
        highest, where = logits.max(dim=1)
        hit = is_positive.gather(1, where[:, None])[:, 0].float()
        best_is_positive_B[row] = torch.where(highest > best_B[row], hit, best_is_positive_B[row])
        best_B[row] = torch.maximum(best_B[row], highest)
    columns.combine_ranks()

    scale = (1.0 if directions == "sum" else 0.5) / len(video_GP)
    text_gradient, video_gradient = torch.zeros_like(text_BP), torch.zeros_like(video_GP)
    temperature_gradient = torch.zeros_like(temperature)
    for row, column, logits, is_positive in tiles():
        gradient = rows.gradient(row, logits, is_positive)
        gradient += columns.gradient(column, logits.T, is_positive.T).T
        gradient *= scale / temperature
        text_gradient[row] += gradient @ video_GP[column]
        video_gradient[column] += gradient.T @ text_BP[row]
        temperature_gradient -= (gradient * logits).sum()

    sums = sum_over_ranks(torch.stack([rows.loss_sum(), best_is_positive_B.sum()]))
    return ContrastiveResult(
        loss=scale * (sums[0] + columns.loss_sum()),
        accuracy=sums[1] / len(video_GP),
        text_gradient_BP=text_gradient,
        video_gradient_BP=sum_over_ranks(video_gradient)[local_rows(num_rows)],
        temperature_gradient=sum_over_ranks(temperature_gradient),
    )


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
