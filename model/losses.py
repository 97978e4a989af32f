"""The three losses in readable form: contrastive (EgoNCE, InfoNCE), video-text matching, masked words.

Everything is computed in float32 whatever the model's precision. Rows are text, columns are video.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from model.collectives import all_gather_rows, is_distributed
from model.row_draws import RowDraws, mix

Directions = Literal["sum", "mean"]
PositiveRule = Literal["action", "identity"]


class ActionTags(NamedTuple):
    """What decides which rows are positives of one another: multi-hot verbs and nouns, and the clip."""

    verbs_BV: Bool[Tensor, "B V"]
    nouns_BU: Bool[Tensor, "B U"]
    clip_index_B: Int[Tensor, " B"]

    def rows(self, where: slice) -> "ActionTags":
        """The tags of some rows."""
        return ActionTags(*(part[where] for part in self))

    def gathered(self) -> "ActionTags":
        """The tags of all ranks, rank by rank."""
        if not is_distributed():
            return self
        tags = all_gather_rows(torch.cat([self.verbs_BV, self.nouns_BU], dim=1).to(torch.uint8)).bool()
        verbs, nouns = tags.split([self.verbs_BV.shape[1], self.nouns_BU.shape[1]], dim=1)
        return ActionTags(verbs, nouns, all_gather_rows(self.clip_index_B))

    def positives(self, columns: "ActionTags", rule: PositiveRule) -> Bool[Tensor, "B C"]:
        """True where a row here and one of `columns` are positives of one another.

        Rows of the same clip are. With rule `action` so are rows that share at least one verb and at least one
        noun (EgoNCE, arXiv 2206.01670); rows without tags share nothing.
        """
        same_clip = self.clip_index_B[:, None] == columns.clip_index_B
        if rule == "identity":
            return same_clip
        shares_verb = _shared(self.verbs_BV, columns.verbs_BV) > 0
        return same_clip | (shares_verb & (_shared(self.nouns_BU, columns.nouns_BU) > 0))


def _shared(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.float() @ columns.float().T


def ego_nce(
    logits_GG: Float[Tensor, "G G"], positives_GG: Bool[Tensor, "G G"], directions: Directions = "sum"
) -> Float[Tensor, ""]:
    """EgoNCE: -log of the probability mass on the positives, mean over rows, both directions.

    `logits_GG` are cosines divided by the temperature. The published code adds the directions (`sum`); `mean`
    halves. Written as logsumexp(all) - logsumexp(positives), which stays finite where softmax, mask, log does
    not.
    """
    logits_GG = logits_GG.float()
    total = _nce_direction(logits_GG, positives_GG) + _nce_direction(logits_GG.T, positives_GG.T)
    return total if directions == "sum" else total / 2


def _nce_direction(logits_GG: Tensor, positives_GG: Tensor) -> Tensor:
    on_positives = logits_GG.masked_fill(~positives_GG, float("-inf")).logsumexp(dim=1)
    return (logits_GG.logsumexp(dim=1) - on_positives).mean()


def info_nce(
    logits_GG: Float[Tensor, "G G"], positives_GG: Bool[Tensor, "G G"], directions: Directions = "mean"
) -> Float[Tensor, ""]:
    """Cross-entropy with targets spread evenly over the positives, mean over rows (SViTT's contrastive loss).

    The published code takes the `mean` of the two directions; `sum` adds them.
    """
    targets = positives_GG.float()
    rows = functional.cross_entropy(logits_GG.float(), targets / targets.sum(dim=1, keepdim=True))
    columns = functional.cross_entropy(logits_GG.float().T, targets.T / targets.T.sum(dim=1, keepdim=True))
    total = rows + columns
    return total if directions == "sum" else total / 2


@torch.no_grad()
def sample_negatives(
    logits_BC: Float[Tensor, "B C"],
    positives_BC: Bool[Tensor, "B C"],
    row_draws: RowDraws,
    column_draws: RowDraws,
    hard: bool = True,
) -> Int[Tensor, " B"]:
    """Draw a column for every row with probability softmax(logits) over the non-positives.

    `hard` False draws evenly among them. Positives are masked before the softmax, so a saturated one cannot
    leave a row without mass; what a row without any negative gets is of no use. The draw is argmax(logits + Gumbel
    noise), the noise a function of the keys of row and column.
    """
    keys_BC = mix(row_draws.keys_B[:, None] + mix(column_draws.keys_B))
    uniform_BC = (keys_BC.double() + (2**31 + 0.5)) / 2**32
    noise_BC = -(-uniform_BC.log()).log()
    scores_BC = noise_BC.float() + logits_BC.float() if hard else noise_BC.float()
    return scores_BC.masked_fill(positives_BC, float("-inf")).argmax(dim=1)


def matching_losses(logits_Q2: Float[Tensor, "Q 2"], is_match_Q: Bool[Tensor, " Q"]) -> Float[Tensor, " Q"]:
    """Cross-entropy of (no match, match) of each pair."""
    return functional.cross_entropy(logits_Q2.float(), is_match_Q.long(), reduction="none")


class MaskedText(NamedTuple):
    """Captions with words hidden, and where."""

    ids_BL: Int[Tensor, "B L"]
    selected_BL: Bool[Tensor, "B L"]


def mask_tokens(
    text_ids_BL: Int[Tensor, "B L"],
    text_mask_BL: Bool[Tensor, "B L"],
    draws: RowDraws,
    *,
    probability: float,
    vocab_size: int,
    mask_id: int,
    never: tuple[int, ...],
) -> MaskedText:
    """Select each token with `probability`; of those 80 % become mask_id, 10 % a random id, 10 % stay (BERT).

    Padding and the ids in `never` (PAD, CLS) are not selected.
    """
    length = text_ids_BL.shape[1]
    draw_BL, fate_BL, random_BL = draws.uniform(3, length).unbind(1)
    random_BL = (random_BL * vocab_size).long()
    selected_BL = (draw_BL < probability) & text_mask_BL
    for special in never:
        selected_BL = selected_BL & (text_ids_BL != special)
    hidden = torch.where(fate_BL < 0.8, mask_id, torch.where(fate_BL < 0.9, random_BL, text_ids_BL))
    return MaskedText(torch.where(selected_BL, hidden, text_ids_BL), selected_BL)


def word_losses(logits_KV: Float[Tensor, "K V"], targets_K: Int[Tensor, " K"]) -> Float[Tensor, " K"]:
    """Cross-entropy of each hidden word."""
    return functional.cross_entropy(logits_KV.float(), targets_K, reduction="none")
