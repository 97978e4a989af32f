"""The three losses in readable form: contrastive (EgoNCE, InfoNCE), video-text matching, masked words.

Everything is computed in float32 whatever the model's precision. Rows are text, columns are video.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

Directions = Literal["sum", "mean"]


def positives_mask(
    verbs_GV: Bool[Tensor, "G V"],
    nouns_GU: Bool[Tensor, "G U"],
    clip_index_G: Int[Tensor, " G"] | None = None,
) -> Bool[Tensor, "G G"]:
    """True where two rows are positives of one another.

    A row is its own positive. So are rows that share at least one verb and at least one noun (EgoNCE,
    arXiv 2206.01670); rows without tags share nothing. With `clip_index_G`, so are rows of the same clip.
    """
    mask = torch.eye(verbs_GV.shape[0], dtype=torch.bool, device=verbs_GV.device)
    mask = mask | ((_shared(verbs_GV) > 0) & (_shared(nouns_GU) > 0))
    if clip_index_G is not None:
        mask = mask | (clip_index_G[:, None] == clip_index_G)
    return mask


def _shared(tags: Tensor) -> Tensor:
    tags = tags.float()
    return tags @ tags.T


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


class Negatives(NamedTuple):
    """For each text a video and for each video a text that do not match; `has_negative` False: row has
    none.
    """

    video_of_text_B: Int[Tensor, " B"]
    text_of_video_B: Int[Tensor, " B"]
    has_negative_B: Bool[Tensor, " B"]


@torch.no_grad()
def sample_negatives(
    logits_BB: Float[Tensor, "B B"],
    positives_BB: Bool[Tensor, "B B"],
    generator: torch.Generator,
    hard: bool = True,
) -> Negatives:
    """Draw one negative for every text and every video, with probability softmax(logits) over the
    non-positives.

    `hard` False draws evenly among them. Positives are masked before the softmax, so a saturated one cannot
    leave a row without mass. The draw is argmax(logits + Gumbel noise), the noise from the keyed CPU
    generator.
    """
    size = logits_BB.shape[0]
    uniform = torch.rand(2, size, size, generator=generator, dtype=torch.float64).clamp_min_(1e-300)
    noise = (-(-uniform.log()).log()).float().to(logits_BB.device)
    logits = logits_BB.float() if hard else torch.zeros_like(logits_BB, dtype=torch.float32)
    forbidden = positives_BB | positives_BB.T
    video_of_text = (logits + noise[0]).masked_fill(forbidden, float("-inf")).argmax(dim=1)
    text_of_video = (logits.T + noise[1]).masked_fill(forbidden, float("-inf")).argmax(dim=1)
    return Negatives(video_of_text, text_of_video, ~forbidden.all(dim=1))


def vtm_loss(logits_Q2: Float[Tensor, "Q 2"], has_negative_B: Bool[Tensor, " B"]) -> Float[Tensor, ""]:
    """Cross-entropy of matching over 3 B pairs: B matching, then B with a wrong video, then B with a wrong
    text.

    Rows without a negative are left out with all their pairs; 0 when no row has one.
    """
    num_rows = has_negative_B.shape[0]
    labels = torch.zeros(3 * num_rows, dtype=torch.long, device=logits_Q2.device)
    labels[:num_rows] = 1
    weights = has_negative_B.float().repeat(3)
    losses = functional.cross_entropy(logits_Q2.float(), labels, reduction="none")
    return (losses * weights).sum() / weights.sum().clamp_min(1)


class MaskedText(NamedTuple):
    """Captions with words hidden, and where."""

    ids_BL: Int[Tensor, "B L"]
    selected_BL: Bool[Tensor, "B L"]


def mask_tokens(
    text_ids_BL: Int[Tensor, "B L"],
    text_mask_BL: Bool[Tensor, "B L"],
    generator: torch.Generator,
    *,
    probability: float,
    vocab_size: int,
    mask_id: int,
    never: tuple[int, ...],
) -> MaskedText:
    """Select each token with `probability`; of those 80 % become mask_id, 10 % a random id, 10 % stay (BERT).

    Padding and the ids in `never` (PAD, CLS) are not selected. Draws come from the keyed CPU generator.
    """
    shape = text_ids_BL.shape
    device = text_ids_BL.device
    draw_BL, fate_BL = torch.rand(2, *shape, generator=generator).to(device)
    random_BL = torch.randint(vocab_size, shape, generator=generator).to(device)
    selected_BL = (draw_BL < probability) & text_mask_BL
    for special in never:
        selected_BL = selected_BL & (text_ids_BL != special)
    hidden = torch.where(fate_BL < 0.8, mask_id, torch.where(fate_BL < 0.9, random_BL, text_ids_BL))
    return MaskedText(torch.where(selected_BL, hidden, text_ids_BL), selected_BL)


def mlm_loss(logits_KV: Float[Tensor, "K V"], targets_K: Int[Tensor, " K"]) -> Float[Tensor, ""]:
    """Mean cross-entropy over the hidden words; 0 when there is none."""
    losses = functional.cross_entropy(logits_KV.float(), targets_K, reduction="sum")
    return losses / max(targets_K.shape[0], 1)
