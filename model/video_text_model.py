"""Video-text model: two encoders, fusion, and the training objective of SViTT-Ego (arXiv 2406.09462)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from model.blocks import NORM_EPS
from model.collectives import all_gather_rows, all_gather_with_gradient, is_distributed, local_rows
from model.config import ModelConfig
from model.losses import ego_nce, info_nce, mask_tokens, mlm_loss, positives_mask, sample_negatives, vtm_loss
from model.sparsity import EdgeLayout
from model.step_key import StepKey
from model.text_encoder import Fused, TextEncoder
from model.video_encoder import VideoEncoder


class VideoOutput(NamedTuple):
    """Normed surviving tokens for the fusion layers, unit-norm features, and what each pruning kept."""

    tokens_BMD: Float[Tensor, "B M D"]
    features_BP: Float[Tensor, "B P"]
    keep_indices: tuple[Int[Tensor, "B m"], ...]


class TextOutput(NamedTuple):
    """Token states for the fusion layers and unit-norm features."""

    states_BLD: Float[Tensor, "B L D"]
    features_BP: Float[Tensor, "B P"]


class LossTerms(NamedTuple):
    """Unweighted losses, their weighted sum `total`, and shares right without gradient; all 0-dim float32."""

    vtc: Float[Tensor, ""]
    vtm: Float[Tensor, ""]
    mlm: Float[Tensor, ""]
    total: Float[Tensor, ""]
    vtc_accuracy: Float[Tensor, ""]
    vtm_accuracy: Float[Tensor, ""]
    mlm_accuracy: Float[Tensor, ""]


class ActionTags(NamedTuple):
    """What decides which rows are positives of one another: multi-hot verbs and nouns, and the clip if
    known.
    """

    verbs_BV: Bool[Tensor, "B V"]
    nouns_BU: Bool[Tensor, "B U"]
    clip_index_B: Int[Tensor, " B"] | None = None

    def gathered(self) -> "ActionTags":
        """The tags of all ranks, rank by rank."""
        if not is_distributed():
            return self
        tags = all_gather_rows(torch.cat([self.verbs_BV, self.nouns_BU], dim=1).to(torch.uint8)).bool()
        clips = None if self.clip_index_B is None else all_gather_rows(self.clip_index_B)
        num_verbs = self.verbs_BV.shape[1]
        return ActionTags(tags[:, :num_verbs], tags[:, num_verbs:], clips)

    def positives(self, rule: str) -> Bool[Tensor, "B B"]:
        """Rows that are positives of one another; rule `identity` looks at the clip only."""
        if rule == "action":
            return positives_mask(*self)
        return positives_mask(self.verbs_BV[:, :0], self.nouns_BU[:, :0], self.clip_index_B)


class _Similarity(NamedTuple):
    """Cosine / temperature of texts (rows) and videos of all ranks, their positives, and this rank's part."""

    logits_GG: Float[Tensor, "G G"]
    positives_GG: Bool[Tensor, "G G"]
    local: slice


class VideoTextModel(nn.Module):
    """Dual encoder with fusion. `forward` is one training loss; `encode_video`, `encode_text`, `fuse` the
    parts.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.video_encoder = VideoEncoder(config.video)
        self.video_norm = nn.LayerNorm(config.video.width, eps=NORM_EPS)
        self.text_encoder = TextEncoder(config)
        self.video_projection = nn.Linear(config.video.width, config.joint_width)
        self.text_projection = nn.Linear(config.text.width, config.joint_width)
        self.vtm_head = nn.Linear(config.text.width, 2)
        # Shape (1,): sharded optimizers refuse parameters without an axis. A fixed one is no parameter.
        self.learned_temperature = (
            nn.Parameter(torch.full((1,), config.temperature)) if config.learn_temperature else None
        )

    def encode_video(
        self,
        video_BTCHW: Float[Tensor, "B T 3 H W"],
        edge_seed: int | None = None,
        layouts: Sequence[EdgeLayout | None] | None = None,
    ) -> VideoOutput:
        """Encode normalised clips; `edge_seed` None means the fixed edges of evaluation."""
        encoding = self.video_encoder(video_BTCHW, edge_seed, layouts)
        features_BP = _unit(self.video_projection(encoding.pooled_BD))
        return VideoOutput(self.video_norm(encoding.tokens_BMD), features_BP, encoding.keep_indices)

    def encode_text(self, text_ids_BL: Int[Tensor, "B L"], text_mask_BL: Bool[Tensor, "B L"]) -> TextOutput:
        """Encode captions; the feature is read at [CLS]."""
        states_BLD = self.text_encoder(text_ids_BL, text_mask_BL)
        return TextOutput(states_BLD, _unit(self.text_projection(states_BLD[:, 0])))

    def fuse(
        self,
        states_QLD: Float[Tensor, "Q L D"],
        text_mask_QL: Bool[Tensor, "Q L"],
        video_tokens_BMD: Float[Tensor, "B M D"],
        clip_Q: Int[Tensor, " Q"] | None = None,
        seed: int | None = None,
    ) -> Fused:
        """Fusion layers over pairs (text row q, video row clip_Q[q]); `seed` is that of random pruning."""
        return self.text_encoder.fuse(states_QLD, text_mask_QL, video_tokens_BMD, clip_Q, seed)

    def matching_logits(self, states_QLD: Float[Tensor, "Q L D"]) -> Float[Tensor, "Q 2"]:
        """Scores of (no match, match) of fused pairs."""
        return self.vtm_head(states_QLD[:, 0])

    def temperature(self) -> Float[Tensor, " 1"]:
        """What cosines are divided by, float32, within `temperature_range`."""
        if self.learned_temperature is None:
            return torch.full((1,), self.config.temperature, device=self.video_projection.weight.device)
        learned = self.learned_temperature.float()
        # The value is clamped, the gradient passes, so that a temperature at the border can come back.
        return learned + (learned.clamp(*self.config.temperature_range) - learned).detach()

    def forward(
        self,
        video_BTCHW: Float[Tensor, "B T 3 H W"],
        text_ids_BL: Int[Tensor, "B L"],
        text_mask_BL: Bool[Tensor, "B L"],
        verbs_BV: Bool[Tensor, "B V"],
        nouns_BU: Bool[Tensor, "B U"],
        key: StepKey,
        clip_index_B: Int[Tensor, " B"] | None = None,
    ) -> LossTerms:
        """Training losses of one batch; rows are (clip, caption) pairs, scene neighbours included.

        Contrastive features are gathered over ranks, which must hold equally many rows. Every draw is a
        function of `key`; dropout reads torch's global generator, which is seeded from the key here and put
        back afterwards. Rows with equal `clip_index_B` are positives of one another whatever their tags.
        """
        config = self.config
        tags = ActionTags(verbs_BV, nouns_BU, clip_index_B)
        with _keyed_random_state(key, video_BTCHW.device):
            edge_seed = key.all_ranks().integer("edges") if self.training else None
            video = self.encode_video(video_BTCHW, edge_seed)
            text, masked = self._encode_texts(text_ids_BL, text_mask_BL, key)
            similarity = self._similarity(text, video, tags)
            states_QLD = self._fuse_pairs(text, masked, text_mask_BL, video, similarity, key, edge_seed)
        zero = similarity.logits_GG.new_zeros(())
        vtc, vtc_accuracy = self._vtc(similarity) if config.vtc_weight else (zero, zero)
        vtm, vtm_accuracy = self._vtm(states_QLD, similarity) if config.vtm_weight else (zero, zero)
        mlm, mlm_accuracy = self._mlm(states_QLD, masked, text_ids_BL) if masked else (zero, zero)
        total = config.vtc_weight * vtc + config.vtm_weight * vtm + config.mlm_weight * mlm
        return LossTerms(vtc, vtm, mlm, total, vtc_accuracy, vtm_accuracy, mlm_accuracy)

    def _encode_texts(
        self, text_ids_BL: Tensor, text_mask_BL: Tensor, key: StepKey
    ) -> tuple[TextOutput, "_MaskedStates | None"]:
        """Captions and, when mlm is on, the same captions with words hidden, in one pass."""
        config = self.config
        if not config.mlm_weight:
            return self.encode_text(text_ids_BL, text_mask_BL), None
        masked = mask_tokens(
            text_ids_BL,
            text_mask_BL,
            key.generator("mlm"),
            probability=config.mlm_probability,
            vocab_size=config.text.vocab_size,
            mask_id=config.text.mask_id,
            never=(config.text.pad_id, config.text.cls_id),
        )
        states = self.text_encoder(torch.cat([text_ids_BL, masked.ids_BL]), text_mask_BL.repeat(2, 1))
        plain_BLD, masked_BLD = states.chunk(2)
        features_BP = _unit(self.text_projection(plain_BLD[:, 0]))
        return TextOutput(plain_BLD, features_BP), _MaskedStates(masked_BLD, masked.selected_BL)

    def _similarity(self, text: TextOutput, video: VideoOutput, tags: ActionTags) -> _Similarity:
        """Over all ranks when the contrastive loss needs it, else over this rank's rows."""
        num_rows, width = text.features_BP.shape
        features = torch.cat([text.features_BP, video.features_BP], dim=1)
        local = slice(0, num_rows)
        if self.config.vtc_weight:
            features, tags, local = all_gather_with_gradient(features), tags.gathered(), local_rows(num_rows)
        logits_GG = features[:, :width] @ features[:, width:].T / self.temperature()
        return _Similarity(logits_GG, tags.positives(self.config.vtc_positives), local)

    def _fuse_pairs(
        self,
        text: TextOutput,
        masked: "_MaskedStates | None",
        text_mask_BL: Tensor,
        video: VideoOutput,
        similarity: _Similarity,
        key: StepKey,
        edge_seed: int | None,
    ) -> Tensor:
        """States of all pairs in one pass: with vtm B matching, B wrong videos, B wrong texts; then B masked
        texts.
        """
        local, own_B = similarity.local, torch.arange(len(text_mask_BL), device=text_mask_BL.device)
        states, masks, clips = [], [], []
        if self.config.vtm_weight:
            negatives = sample_negatives(
                similarity.logits_GG[local, local].detach(),
                similarity.positives_GG[local, local],
                key.generator("vtm_negatives"),
                self.config.vtm_hard_negatives,
            )
            states += [text.states_BLD, text.states_BLD, text.states_BLD[negatives.text_of_video_B]]
            masks += [text_mask_BL, text_mask_BL, text_mask_BL[negatives.text_of_video_B]]
            clips += [own_B, negatives.video_of_text_B, own_B]
        if masked:
            states, masks, clips = [*states, masked.states_BLD], [*masks, text_mask_BL], [*clips, own_B]
        if not states:
            return text.states_BLD[:0]
        pairs = (torch.cat(states), torch.cat(masks), video.tokens_BMD, torch.cat(clips))
        return self.fuse(*pairs, edge_seed).states_QLD

    def _vtc(self, similarity: _Similarity) -> tuple[Tensor, Tensor]:
        criterion = ego_nce if self.config.vtc_loss == "ego_nce" else info_nce
        loss = criterion(similarity.logits_GG, similarity.positives_GG, self.config.vtc_directions)
        best_G1 = similarity.logits_GG.detach().argmax(dim=1, keepdim=True)
        return loss, similarity.positives_GG.gather(1, best_G1).float().mean()

    def _vtm(self, states_QLD: Tensor, similarity: _Similarity) -> tuple[Tensor, Tensor]:
        has_negative_B = ~similarity.positives_GG[similarity.local, similarity.local].all(dim=1)
        logits_Q2 = self.matching_logits(states_QLD[: 3 * len(has_negative_B)])
        loss = vtm_loss(logits_Q2, has_negative_B)
        says_match = logits_Q2.detach().argmax(dim=1).bool()
        is_match = torch.arange(len(says_match), device=says_match.device) < len(has_negative_B)
        counted = has_negative_B.repeat(3)
        right = ((says_match == is_match) & counted).sum() / counted.sum().clamp_min(1)
        return loss, right

    def _mlm(self, states_QLD: Tensor, masked: "_MaskedStates", text_ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        selected_BL = masked.selected_BL
        logits_KV = self.text_encoder.mlm_head(states_QLD[-len(selected_BL) :][selected_BL])
        targets_K = text_ids_BL[selected_BL]
        right = (logits_KV.detach().argmax(dim=1) == targets_K).sum() / max(len(targets_K), 1)
        return mlm_loss(logits_KV, targets_K), right


class _MaskedStates(NamedTuple):
    states_BLD: Tensor
    selected_BL: Tensor


def _unit(projected: Tensor) -> Tensor:
    return functional.normalize(projected.float(), dim=-1)


@contextmanager
def _keyed_random_state(key: StepKey, device: torch.device) -> Iterator[None]:
    """Dropout and drop path of this step draw from the key; torch's own generators are left as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(key.integer("dropout"))
        yield
