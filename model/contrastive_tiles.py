"""Contrastive loss of a large global batch and its gradient, tile by tile, without autograd.

Equals `ego_nce` and `info_nce` of `model.losses` with their gradients, but the G x G logits never exist: as in
flash attention (arXiv 2205.14135) one sweep over tiles collects softmax statistics and a second one computes
every tile again for the gradient. Each rank holds its texts against the videos of all ranks. The features'
encoders are not known here: hand the gradients to `torch.autograd.backward`.

In shapes, a tile has R rows (texts) and C columns (videos).
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from model.collectives import all_gather_rows, local_rows, max_over_ranks, sum_over_ranks
from model.losses import ActionTags, Directions, PositiveRule

_ALL = slice(None)
# Below any logit, yet finite: the difference of two such maxima is a number.
_LOWEST = torch.finfo(torch.float32).min


class ContrastiveResult(NamedTuple):
    """The loss over all ranks' rows and its gradient with respect to this rank's features; all float32.

    Loss, accuracy (texts whose nearest video is a positive) and temperature gradient are the same on every
    rank. Gradients are total: nothing is left to be summed over ranks. An engine that takes the mean over ranks
    of weight gradients wants those of the features times the number of ranks, that of the temperature as it is.
    """

    loss: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]
    text_gradient_BP: Float[Tensor, "B P"]
    video_gradient_BP: Float[Tensor, "B P"]
    temperature_gradient: Float[Tensor, " 1"]


@torch.no_grad()
def contrastive_tiles(
    text_BP: Float[Tensor, "B P"],
    video_BP: Float[Tensor, "B P"],
    temperature_1: Float[Tensor, " 1"],
    tags: ActionTags,
    *,
    loss: Literal["ego_nce", "info_nce"],
    positives: PositiveRule,
    directions: Directions,
    tile: int = 512,
) -> ContrastiveResult:
    """The loss of this rank's B rows among the G = B x ranks gathered ones, and its gradient.

    Every rank must give equally many rows. Beside gathered videos and tags and the gradients, nothing is kept
    that is larger than `tile` x `tile`, and nothing waits for the device.
    """
    num_rows = text_BP.shape[0]
    similarity = _TiledSimilarity(text_BP, video_BP, temperature_1, tags, positives, tile)
    num_columns = len(similarity.video_GP)
    direction = _EgoNce if loss == "ego_nce" else _InfoNce
    by_text = direction(1, num_rows, text_BP.device)
    by_video = direction(0, num_columns, text_BP.device)
    nearest = _Nearest(num_rows, text_BP.device)
    for block in similarity.blocks():
        by_text.add(block)
        by_video.add(block)
        nearest.add(block)
    by_video.combine_ranks()

    text_gradient_BP = torch.zeros_like(similarity.text_BP)
    video_gradient_GP = torch.zeros_like(similarity.video_GP)
    for block in similarity.blocks():
        slope_RC = by_text.slopes(block).add_(by_video.slopes(block))
        text_gradient_BP[block.rows] += slope_RC @ similarity.video_GP[block.columns]
        video_gradient_GP[block.columns] += slope_RC.T @ similarity.text_BP[block.rows]
    # Slopes are those of a sum over rows; the loss is their mean, of the two directions summed or averaged.
    scale_1 = (1 if directions == "sum" else 0.5) / num_columns / similarity.temperature_1
    text_gradient_BP *= scale_1
    video_gradient_BP = sum_over_ranks(video_gradient_GP)[local_rows(num_rows)] * scale_1
    # Logits are t . v / temperature, so that temperature * d/d temperature = - t . d/d t, summed over texts.
    temperature_slope_1 = -(similarity.text_BP * text_gradient_BP).sum() / similarity.temperature_1

    loss_sum = by_text.losses().sum() + by_video.losses()[local_rows(num_rows)].sum()
    sums_3 = sum_over_ranks(torch.cat([torch.stack([loss_sum, nearest.num_right()]), temperature_slope_1]))
    mean_loss = sums_3[0] / num_columns
    return ContrastiveResult(
        mean_loss if directions == "sum" else mean_loss / 2,
        sums_3[1] / num_columns,
        text_gradient_BP,
        video_gradient_BP,
        sums_3[2:],
    )


class _Block(NamedTuple):
    """One tile: where it lies among this rank's texts and all videos, its logits and positives."""

    rows: slice
    columns: slice
    logits_RC: Float[Tensor, "R C"]
    positives_RC: Bool[Tensor, "R C"]

    def part(self, dim: int) -> slice:
        """The rows or columns whose softmax runs along `dim`."""
        return self.rows if dim == 1 else self.columns


class _TiledSimilarity:
    """This rank's texts against the videos of all ranks, a tile at a time."""

    def __init__(
        self,
        text_BP: Tensor,
        video_BP: Tensor,
        temperature_1: Tensor,
        tags: ActionTags,
        rule: PositiveRule,
        tile: int,
    ) -> None:
        self.text_BP, self.temperature_1 = text_BP.float(), temperature_1.float()
        self.video_GP = all_gather_rows(video_BP.float())
        self._tags, self._tile = tags.gathered(), tile
        self._rule: PositiveRule = rule

    def blocks(self) -> Iterator[_Block]:
        """All tiles, those of the same texts after one another."""
        num_rows, num_columns = len(self.text_BP), len(self.video_GP)
        first = local_rows(num_rows).start
        for rows in _parts(num_rows, self._tile):
            gathered_rows = slice(first + rows.start, first + rows.stop)
            for columns in _parts(num_columns, self._tile):
                yield _Block(
                    rows,
                    columns,
                    self.text_BP[rows] @ self.video_GP[columns].T / self.temperature_1,
                    self._tags.rows(gathered_rows).positives(self._tags.rows(columns), self._rule),
                )


def _parts(size: int, tile: int) -> Iterator[slice]:
    return (slice(start, min(start + tile, size)) for start in range(0, size, tile))


class _LogSumExp:
    """Running log-sum-exp of N rows or columns, kept as maximum and sum: their logarithm would round
    away what the softmax needs of large logits.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.max_N = torch.full((size,), _LOWEST, device=device)
        self.sum_N = torch.zeros(size, device=device)

    def add(self, part: slice, dim: int, logits_RC: Tensor) -> None:
        """Take a tile in, along `dim`; -inf counts for nothing."""
        old_max, new_max = self.max_N[part], torch.maximum(self.max_N[part], logits_RC.amax(dim))
        added = (logits_RC - new_max.unsqueeze(dim)).exp_().sum(dim)
        self.sum_N[part] = self.sum_N[part] * (old_max - new_max).exp() + added
        self.max_N[part] = new_max

    def combine_ranks(self) -> None:
        max_N = max_over_ranks(self.max_N)
        self.sum_N = sum_over_ranks(self.sum_N * (self.max_N - max_N).exp())
        self.max_N = max_N


class _EgoNce:
    """EgoNCE of every text over the videos (dim 1) or of every video over the texts (dim 0).

    With the log-sum-exps of a row's negatives and positives, n and p, the loss is log(1 + exp(n - p)). Its
    slope in a logit is sigmoid(n - p) times the softmax among the negatives, or minus that among the
    positives. A softmax over all would cancel where the positives hold nearly all of it.
    """

    def __init__(self, dim: int, size: int, device: torch.device) -> None:
        self._dim = dim
        self._positives, self._negatives = _LogSumExp(size, device), _LogSumExp(size, device)

    def add(self, block: _Block) -> None:
        part, logits_RC, positives_RC = block.part(self._dim), block.logits_RC, block.positives_RC
        self._positives.add(part, self._dim, logits_RC.masked_fill(~positives_RC, float("-inf")))
        self._negatives.add(part, self._dim, logits_RC.masked_fill(positives_RC, float("-inf")))

    def combine_ranks(self) -> None:
        """For columns, of which every rank has seen its own texts only."""
        self._positives.combine_ranks()
        self._negatives.combine_ranks()

    def losses(self) -> Float[Tensor, " N"]:
        return functional.softplus(self._margin(_ALL))

    def slopes(self, block: _Block) -> Float[Tensor, "R C"]:
        """Of the summed losses in the logits of a tile."""
        part, positives_RC = block.part(self._dim), block.positives_RC
        weight_N = self._margin(part).sigmoid()
        positives, negatives = self._positives, self._negatives
        max_RC = self._chosen(positives_RC, positives.max_N[part], negatives.max_N[part])
        scale_RC = self._chosen(
            positives_RC, -weight_N / positives.sum_N[part], weight_N / negatives.sum_N[part]
        )
        return (block.logits_RC - max_RC).exp_().mul_(scale_RC)

    def _margin(self, part: slice) -> Tensor:
        """By how much the negatives' log-sum-exp exceeds the positives'; -inf without negatives."""
        positives, negatives = self._positives, self._negatives
        ratio_N = negatives.sum_N[part].log() - positives.sum_N[part].log()
        return negatives.max_N[part] - positives.max_N[part] + ratio_N

    def _chosen(self, positives_RC: Tensor, of_positives_N: Tensor, of_negatives_N: Tensor) -> Tensor:
        return torch.where(
            positives_RC, of_positives_N.unsqueeze(self._dim), of_negatives_N.unsqueeze(self._dim)
        )


class _InfoNce:
    """InfoNCE of every text over the videos (dim 1) or of every video over the texts (dim 0).

    The loss of a row is the log-sum-exp of its logits less the mean of its positives', the slope in a logit
    its softmax less the target.
    """

    def __init__(self, dim: int, size: int, device: torch.device) -> None:
        self._dim = dim
        self._all = _LogSumExp(size, device)
        self._positive_sum_N, self._num_positives_N = torch.zeros(2, size, device=device)

    def add(self, block: _Block) -> None:
        part = block.part(self._dim)
        self._all.add(part, self._dim, block.logits_RC)
        self._positive_sum_N[part] += block.logits_RC.where(block.positives_RC, 0).sum(self._dim)
        self._num_positives_N[part] += block.positives_RC.sum(self._dim)

    def combine_ranks(self) -> None:
        """For columns, of which every rank has seen its own texts only."""
        self._all.combine_ranks()
        self._positive_sum_N = sum_over_ranks(self._positive_sum_N)
        self._num_positives_N = sum_over_ranks(self._num_positives_N)

    def losses(self) -> Float[Tensor, " N"]:
        return self._all.max_N - self._positive_sum_N / self._num_positives_N + self._all.sum_N.log()

    def slopes(self, block: _Block) -> Float[Tensor, "R C"]:
        """Of the summed losses in the logits of a tile."""
        part = block.part(self._dim)
        max_N, sum_N = self._all.max_N[part], self._all.sum_N[part]
        softmax_RC = (block.logits_RC - max_N.unsqueeze(self._dim)).exp_().div_(sum_N.unsqueeze(self._dim))
        return softmax_RC.sub_(block.positives_RC / self._num_positives_N[part].unsqueeze(self._dim))


class _Nearest:
    """Whether the video with the largest logit of every text is a positive; of equal ones the first counts."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._logit_B = torch.full((num_rows,), float("-inf"), device=device)
        self._is_positive_B = torch.zeros(num_rows, dtype=torch.bool, device=device)

    def add(self, block: _Block) -> None:
        logit_R, index_R = block.logits_RC.max(dim=1)
        is_positive_R = block.positives_RC.gather(1, index_R[:, None])[:, 0]
        is_nearer_R = logit_R > self._logit_B[block.rows]
        self._logit_B[block.rows] = torch.where(is_nearer_R, logit_R, self._logit_B[block.rows])
        self._is_positive_B[block.rows] = torch.where(
            is_nearer_R, is_positive_R, self._is_positive_B[block.rows]
        )

    def num_right(self) -> Float[Tensor, ""]:
        return self._is_positive_B.float().sum()
