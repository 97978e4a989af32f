"""The training objective of SViTT-Ego (arXiv 2406.09462): EgoNCE, video-text matching, masked words.

`training_losses` is the objective itself: one batch, one process, one graph. The parts below it are what a step calls
that computes the same over micro-batches and ranks.

A matching pair's negatives are drawn from the whole batch: for each caption a wrong clip, for each clip a wrong
caption, hard ones more often. Means are over the whole batch.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from model.losses import (
    ActionTags,
    MaskedText,
    ego_nce,
    info_nce,
    mask_tokens,
    matching_losses,
    sample_negatives,
    word_losses,
)
from model.row_draws import RowDraws
from model.step_key import StepKey
from model.video_text_model import VideoTextModel


class LossTerms(NamedTuple):
    """Unweighted losses, their weighted sum `total`, and shares right without gradient; all 0-dim float32."""

    total: Float[Tensor, ""]
    vtc: Float[Tensor, ""]
    vtm: Float[Tensor, ""]
    mlm: Float[Tensor, ""]
    vtc_accuracy: Float[Tensor, ""]
    vtm_accuracy: Float[Tensor, ""]
    mlm_accuracy: Float[Tensor, ""]


class Captions(NamedTuple):
    """Captions and the clips they belong to."""

    ids_BL: Int[Tensor, "B L"]
    mask_BL: Tensor  # bool
    clip_index_B: Int[Tensor, " B"]

    def rows(self, where: slice | Tensor) -> "Captions":
        """Some of them."""
        return Captions(*(part[where] for part in self))


class EncodedRows(NamedTuple):
    """Clips and captions after their encoders: tokens and states for the fusion layers, unit-norm features."""

    tokens_BMD: Float[Tensor, "B M D"]
    states_BLD: Float[Tensor, "B L D"]
    video_features_BP: Float[Tensor, "B P"]
    text_features_BP: Float[Tensor, "B P"]


class HiddenWords(NamedTuple):
    """Captions with words hidden; where the hidden ones are in the flattened captions, and what they were."""

    ids_BL: Int[Tensor, "B L"]
    positions_K: Int[Tensor, " K"]
    targets_K: Int[Tensor, " K"]


class Pairs(NamedTuple):
    """Pairs (caption, clip) to fuse. Captions count through the B own rows, then through `foreign`."""

    own: Captions
    match_weight_B: Float[Tensor, " B"] | None  # of the pairs (row, row); None: they are not fused here
    hidden: HiddenWords | None
    foreign: Captions | None
    caption_Q: Int[Tensor, " Q"]
    clip_Q: Int[Tensor, " Q"]
    wrong_weight_Q: Float[Tensor, " Q"]


class PairSums(NamedTuple):
    """Sums over pairs and hidden words, 0-dim float32; how many were right has no gradient."""

    vtm: Float[Tensor, ""]
    mlm: Float[Tensor, ""]
    vtm_right: Float[Tensor, ""]
    mlm_right: Float[Tensor, ""]


def training_losses(
    model: VideoTextModel,
    video_BTCHW: Float[Tensor, "B T 3 H W"],
    captions: Captions,
    tags: ActionTags,
    key: StepKey,
) -> LossTerms:
    """Losses of one batch of (clip, caption) rows, scene neighbours included, with gradient.

    Every draw is a function of `key` and the row's clip; in evaluation only words and negatives are drawn.
    """
    config = model.config
    encoded = encode_rows(model, video_BTCHW, captions, key)
    logits_BB = encoded.text_features_BP @ encoded.video_features_BP.T / model.temperature()
    positives_BB = tags.positives(tags, config.vtc_positives)
    zero = logits_BB.new_zeros(())

    criterion = ego_nce if config.vtc_loss == "ego_nce" else info_nce
    vtc = criterion(logits_BB, positives_BB, config.vtc_directions) if config.vtc_weight else zero
    best_B1 = logits_BB.argmax(dim=1, keepdim=True)

    wrong_clips_B, wrong_captions_B = negatives_of(
        model, logits_BB.detach(), positives_BB, captions.clip_index_B, captions.clip_index_B, key
    )
    weight_B = (~positives_BB.all(dim=1)).float()
    own_B = torch.arange(len(weight_B), device=weight_B.device)
    hidden = hide_words(model, captions, key) if config.mlm_weight else None
    pairs = Pairs(
        own=captions,
        match_weight_B=weight_B if config.vtm_weight else None,
        hidden=hidden and hidden_words(hidden, captions),
        foreign=None,
        caption_Q=torch.cat([own_B, wrong_captions_B]),
        clip_Q=torch.cat([wrong_clips_B, own_B]),
        wrong_weight_Q=weight_B.repeat(2),
    )
    sums = pair_losses(model, encoded.tokens_BMD, encoded.states_BLD, pairs, key)
    num_pairs = (3 * weight_B.sum()).clamp_min(1)
    num_words = max(len(pairs.hidden.targets_K), 1) if pairs.hidden else 1
    vtm, mlm = sums.vtm / num_pairs, sums.mlm / num_words
    return LossTerms(
        total=config.vtc_weight * vtc + config.vtm_weight * vtm + config.mlm_weight * mlm,
        vtc=vtc,
        vtm=vtm,
        mlm=mlm,
        vtc_accuracy=positives_BB.gather(1, best_B1).float().mean() if config.vtc_weight else zero,
        vtm_accuracy=sums.vtm_right / num_pairs,
        mlm_accuracy=sums.mlm_right / num_words,
    )


def encode_rows(
    model: VideoTextModel, video_BTCHW: Float[Tensor, "B T 3 H W"], captions: Captions, key: StepKey
) -> EncodedRows:
    """Both encoders on rows of a batch, with this step's edges, dropout and drop path when training."""
    training, clips_B = model.training, captions.clip_index_B
    video = model.encode_video(
        video_BTCHW,
        key.integer("edges") if training else None,
        draws=key.rows("video", clips_B) if training else None,
    )
    text = model.encode_text(
        captions.ids_BL, captions.mask_BL, key.rows("text", clips_B) if training else None
    )
    return EncodedRows(video.tokens_BMD, text.states_BLD, video.features_BP, text.features_BP)


def negatives_of(
    model: VideoTextModel,
    logits_BG: Float[Tensor, "B G"],
    positives_BG: Tensor,
    clip_index_B: Int[Tensor, " B"],
    clip_index_G: Int[Tensor, " G"],
    key: StepKey,
    logits_of_videos_BG: Float[Tensor, "B G"] | None = None,
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """A wrong clip for each of B captions and a wrong caption for each of B clips, among the batch's G.

    `logits_BG` are of captions against clips, the other of clips against captions (None: G is B, the transpose).
    """
    hard = model.config.vtm_hard_negatives
    of_videos = logits_BG.T if logits_of_videos_BG is None else logits_of_videos_BG
    captions = ("wrong clip of", "wrong clip")
    videos = ("wrong caption of", "wrong caption")
    wrong = [
        sample_negatives(
            logits, positives_BG, key.rows(rows, clip_index_B), key.rows(columns, clip_index_G), hard
        )
        for logits, (rows, columns) in ((logits_BG, captions), (of_videos, videos))
    ]
    return wrong[0], wrong[1]


def hide_words(model: VideoTextModel, captions: Captions, key: StepKey) -> MaskedText:
    """This step's captions with words hidden."""
    config = model.config
    return mask_tokens(
        captions.ids_BL,
        captions.mask_BL,
        key.rows("hidden words", captions.clip_index_B),
        probability=config.mlm_probability,
        vocab_size=config.text.vocab_size,
        mask_id=config.text.mask_id,
        never=(config.text.pad_id, config.text.cls_id),
    )


def hidden_words(masked: MaskedText, captions: Captions) -> HiddenWords:
    """Where words are hidden, by position: only there is the vocabulary projected."""
    positions_K = masked.selected_BL.flatten().nonzero()[:, 0]
    return HiddenWords(masked.ids_BL, positions_K, captions.ids_BL.flatten()[positions_K])


def pair_losses(
    model: VideoTextModel,
    tokens_BMD: Float[Tensor, "B M D"],
    states_BLD: Float[Tensor, "B L D"],
    pairs: Pairs,
    key: StepKey,
) -> PairSums:
    """Fusion layers over all pairs at once, then the sums of matching and masked-word losses.

    Captions of `foreign` are encoded here; those of own rows come as states.
    """
    config, own, training = model.config, pairs.own, model.training
    own_B = torch.arange(len(tokens_BMD), device=tokens_BMD.device)
    states, masks, clips, draws = [], [], [], []

    def add(states_QLD: Tensor, mask_QL: Tensor, caption_clips_Q: Tensor, clip_Q: Tensor, kind: str) -> None:
        states.append(states_QLD)
        masks.append(mask_QL)
        clips.append(clip_Q)
        of_captions = key.rows(kind, caption_clips_Q)
        draws.append(of_captions.paired(key.rows("fused clip", own.clip_index_B[clip_Q])).keys_B)

    if config.vtm_weight:
        if pairs.match_weight_B is not None:
            add(states_BLD, own.mask_BL, own.clip_index_B, own_B, "fused caption")
        captions, all_states = own, states_BLD
        if pairs.foreign is not None:
            foreign = pairs.foreign
            keyed = key.rows("text", foreign.clip_index_B) if training else None
            encoded = model.text_encoder(foreign.ids_BL, foreign.mask_BL, keyed)
            captions = Captions(*(torch.cat(both) for both in zip(own, foreign, strict=True)))
            all_states = torch.cat([states_BLD, encoded])
        chosen = captions.rows(pairs.caption_Q)
        wrong = all_states[pairs.caption_Q]
        add(wrong, chosen.mask_BL, chosen.clip_index_B, pairs.clip_Q, "fused caption")
    if pairs.hidden is not None:
        keyed = key.rows("masked text", own.clip_index_B) if training else None
        masked = model.text_encoder(pairs.hidden.ids_BL, own.mask_BL, keyed)
        add(masked, own.mask_BL, own.clip_index_B, own_B, "fused masked caption")

    zero = tokens_BMD.new_zeros((), dtype=torch.float32)
    if not states:
        return PairSums(zero, zero, zero, zero)
    seed = key.integer("edges") if training else None
    fused_QLD = model.fuse(
        torch.cat(states),
        torch.cat(masks),
        tokens_BMD,
        torch.cat(clips),
        seed,
        RowDraws(torch.cat(draws)) if training else None,
    ).states_QLD

    vtm, vtm_right, mlm, mlm_right = zero, zero, zero, zero
    if config.vtm_weight:
        num_matches = len(own_B) if pairs.match_weight_B is not None else 0
        weights = [pairs.wrong_weight_Q] if not num_matches else [pairs.match_weight_B, pairs.wrong_weight_Q]
        weight_Q = torch.cat(weights)  # pyright: ignore[reportArgumentType]
        logits_Q2 = model.matching_logits(fused_QLD[: len(weight_Q)])
        is_match_Q = torch.arange(len(weight_Q), device=weight_Q.device) < num_matches
        vtm = (matching_losses(logits_Q2, is_match_Q) * weight_Q).sum()
        vtm_right = ((logits_Q2.detach().argmax(dim=1).bool() == is_match_Q) * weight_Q).sum()
    if pairs.hidden is not None:
        masked_QLD = fused_QLD[-len(own_B) :]
        logits_KV = model.text_encoder.mlm_head(masked_QLD.flatten(0, 1)[pairs.hidden.positions_K])
        mlm = word_losses(logits_KV, pairs.hidden.targets_K).sum()
        mlm_right = (logits_KV.detach().argmax(dim=1) == pairs.hidden.targets_K).sum()
    return PairSums(vtm, mlm, vtm_right, mlm_right)
