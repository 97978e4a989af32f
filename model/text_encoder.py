"""Text encoder and fusion layers, BERT's with its weights; captions are `[CLS] words [PAD]`, no
[SEP].

The first `fusion_layer` layers read text alone; the rest also attend to video tokens. The video side of the
cross-attention is computed once a clip and shared by all the captions paired with it.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from model.bert_layers import Attention, Dense, Embeddings, Output, Transform
from model.config import ModelConfig, TextConfig
from model.errors import ModelInputError
from model.lean_mlp import gelu_linear
from model.recompute import LayerRunner
from model.row_draws import RowDraws
from model.sparsity import draw_node_scores, keep_count, select_patches


class Fused(NamedTuple):
    """Text states after the fusion layers, and the patches kept by each pruning (within what it was
    given).
    """

    states_QLD: Float[Tensor, "Q L D"]
    keep_indices: tuple[Int[Tensor, "Q m"], ...]


class TextLayer(nn.Module):
    """A BERT layer whose dropout draws from row keys."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.rate, self.num_heads = config.dropout, config.num_heads
        self.attention = Attention(config.width, config.width)
        self.intermediate = Dense(config.width, config.mlp_width)
        self.output = Output(config.mlp_width, config.width)

    def forward(
        self,
        states_QLD: Float[Tensor, "Q L D"],
        text_mask: Bool[Tensor, "Q 1 1 L"],
        draws: RowDraws | None,
    ) -> Float[Tensor, "Q L D"]:
        """States after the layer; without `draws` nothing is dropped."""
        return self.feed_forward(self.attend_text(states_QLD, text_mask, draws), draws)

    def attend_text(self, states_QLD: Tensor, text_mask: Tensor, draws: RowDraws | None) -> Tensor:
        """Self-attention with its residual and norm."""
        attention = self.attention.self
        q, k, v = (
            _split_heads(project(states_QLD), self.num_heads)
            for project in (attention.query, attention.key, attention.value)
        )
        mixed = attend(q, k, v, text_mask, self.rate, draws and draws.at(0))
        return self.residual(self.attention.output, _join_heads(mixed), states_QLD, draws and draws.at(1))

    def feed_forward(self, states_QLD: Tensor, draws: RowDraws | None) -> Tensor:
        """Two linear maps with their residual and norm."""
        hidden = self.intermediate.dense(states_QLD)
        dense = self.output.dense
        mapped = gelu_linear(hidden, dense.weight, dense.bias)
        return self._add(self.output, mapped, states_QLD, draws and draws.at(2))

    def residual(self, output: Output, mixed: Tensor, states_QLD: Tensor, draws: RowDraws | None) -> Tensor:
        """The output map of an attention, added to what went in."""
        return self._add(output, output.dense(mixed), states_QLD, draws)

    def _add(self, output: Output, mapped: Tensor, states_QLD: Tensor, draws: RowDraws | None) -> Tensor:
        if draws is not None:
            mapped = draws.dropout(mapped, self.rate)
        return output.LayerNorm(mapped + states_QLD)


class FusionLayer(TextLayer):
    """A BERT layer whose cross-attention reads the clip that each caption is paired with."""

    def __init__(self, config: TextConfig, video_width: int) -> None:
        super().__init__(config)
        self.crossattention = Attention(config.width, video_width)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        states_QLD: Float[Tensor, "Q L D"],
        text_mask: Bool[Tensor, "Q 1 1 L"],
        video_BMD: Float[Tensor, "B M D"],
        clip_Q: Int[Tensor, " Q"] | None,
        kept_Qm: Int[Tensor, "Q m"] | None,
        score: str | None,
        draws: RowDraws | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """States after the layer, and each pair's score of its patches if `score` names how to get one."""
        cross = self.crossattention.self
        states_QLD = self.attend_text(states_QLD, text_mask, draws)
        q = _split_heads(cross.query(states_QLD), self.num_heads)
        k = self._video_side(cross.key(video_BMD), clip_Q, kept_Qm)
        v = self._video_side(cross.value(video_BMD), clip_Q, kept_Qm)
        mixed = attend(q, k, v, None, self.rate, draws and draws.at(3))
        scores = _patch_scores(q, k, score) if score else None
        states_QLD = self.residual(
            self.crossattention.output, _join_heads(mixed), states_QLD, draws and draws.at(4)
        )
        return self.feed_forward(states_QLD, draws), scores

    def _video_side(self, video_BMD: Tensor, clip_Q: Tensor | None, kept_Qm: Tensor | None) -> Tensor:
        if clip_Q is not None:
            video_BMD = video_BMD.index_select(0, clip_Q)
        if kept_Qm is not None:
            with_cls = functional.pad(kept_Qm + 1, (1, 0))[..., None]
            video_BMD = video_BMD.gather(1, with_cls.expand(-1, -1, video_BMD.shape[-1]))
        return _split_heads(video_BMD, self.num_heads)


def attend(
    q: Float[Tensor, "Q h L d"],
    k: Float[Tensor, "Q h M d"],
    v: Float[Tensor, "Q h M d"],
    mask: Bool[Tensor, "Q 1 1 M"] | None,
    rate: float,
    draws: RowDraws | None,
) -> Float[Tensor, "Q h L d"]:
    """Scaled dot product attention; with `draws`, weights are dropped with probability `rate`.

    Fused attention takes its dropout from a generator, so with `draws` the weights are written out, and computed
    again in the backward pass instead of kept.
    """
    if q.is_meta and (draws is None or rate == 0):
        # Somebody finds out what memory it takes: the meta device has no fused attention and would keep the weights.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)[0]
    if draws is None or rate == 0:
        return functional.scaled_dot_product_attention(q, k, v, mask)
    return checkpoint(
        _dropped_attention, q, k, v, mask, rate, draws.keys_B, use_reentrant=False, preserve_rng_state=False
    )  # pyright: ignore[reportReturnType]


def _dropped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rate: float, keys_Q: Tensor
) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return RowDraws(keys_Q).dropout(scores.softmax(dim=-1), rate) @ v


@torch.no_grad()
def _patch_scores(q: Tensor, k: Tensor, score: str) -> Tensor:
    rows = q[:, :, :1] if score == "cls_attn" else q
    weights = (rows * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1)
    return weights[..., 1:].mean(dim=(1, 2))


def _split_heads(states: Tensor, num_heads: int) -> Tensor:
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _join_heads(mixed: Tensor) -> Tensor:
    return mixed.transpose(1, 2).flatten(2)


class TiedDecoder(nn.Module):
    """Linear map to the vocabulary whose matrix is the word embedding. The state dict holds the matrix only
    once.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(weight.shape[0]))
        self.register_state_dict_post_hook(_drop_tied_weight)
        self.register_load_state_dict_pre_hook(_restore_tied_weight)

    def forward(self, states_KD: Float[Tensor, "K D"]) -> Float[Tensor, "K V"]:
        """Logits over the vocabulary."""
        return functional.linear(states_KD, self.weight, self.bias)


def _drop_tied_weight(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    state.pop(prefix + "weight", None)


def _restore_tied_weight(
    module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object, *rest: object
) -> None:
    # Loading must not report the matrix as missing; the tied parameter itself is loaded with the embeddings.
    state[prefix + "weight"] = module.weight  # pyright: ignore[reportArgumentType]


class MlmHead(nn.Module):
    """BERT's head for masked words: transform, then the tied decoder."""

    def __init__(self, config: TextConfig, word_embeddings: nn.Parameter) -> None:
        super().__init__()
        self.transform = Transform(config.width)
        self.decoder = TiedDecoder(word_embeddings)

    def forward(self, states_KD: Float[Tensor, "K D"]) -> Float[Tensor, "K V"]:
        """Logits over the vocabulary."""
        return self.decoder(self.transform(states_KD))


class TextEncoder(nn.Module):
    """Embeddings, text layers, fusion layers and MLM head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text = config.text
        self.config = config
        self.run_layer = LayerRunner(text.recompute, text.offload_activations)
        self.embeddings = Embeddings(text)
        self.layers = nn.ModuleList(TextLayer(text) for _ in range(text.fusion_layer))
        self.layers.extend(FusionLayer(text, config.video.width) for _ in range(text.num_fusion_layers))
        words = self.embeddings.word_embeddings.weight
        assert isinstance(words, nn.Parameter)
        self.mlm_head = MlmHead(text, words)
        self.init_weights()

    def init_weights(self) -> None:
        """BERT's: normal of `init_std` for matrices and embeddings, zero biases and padding row, unit
        norms.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.text.init_std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.embeddings.word_embeddings.weight[self.config.text.pad_id].zero_()

    def forward(
        self,
        text_ids_BL: Int[Tensor, "B L"],
        text_mask_BL: Bool[Tensor, "B L"],
        draws: RowDraws | None = None,
    ) -> Float[Tensor, "B L D"]:
        """States after the text layers; dropout is on when `draws` are given.

        Raises ModelInputError for captions without tokens or too long.
        """
        self._check(text_ids_BL, text_mask_BL)
        states = self.embeddings(text_ids_BL)
        if draws is not None:
            states = draws.dropout(states, self.config.text.dropout)
        for number, layer in enumerate(self.layers[: self.config.text.fusion_layer]):
            states = self.run_layer(layer, states, text_mask_BL[:, None, None], draws and draws.at(number))
        return states

    def fuse(
        self,
        states_QLD: Float[Tensor, "Q L D"],
        text_mask_QL: Bool[Tensor, "Q L"],
        video_BMD: Float[Tensor, "B M D"],
        clip_Q: Int[Tensor, " Q"] | None = None,
        seed: int | None = None,
        draws: RowDraws | None = None,
    ) -> Fused:
        """Fusion layers over pairs: text row q with video row clip_Q[q] (None: row q); dropout if `draws` are given.

        With multimodal pruning, each pair keeps the patches that its text attends to most in a pruning layer;
        the layers after it see only those. CLS of the video always stays. Random pruning is a function of `seed`
        (None: the fixed seed of evaluation), the same for all pairs.
        """
        config = self.config
        seed = config.video.eval_edge_seed if seed is None else seed
        kept: Tensor | None = None
        keep_indices: list[Tensor] = []
        mask = text_mask_QL[:, None, None]
        for number in range(config.text.fusion_layer, config.text.depth):
            prunes = config.multimodal_keep_rate < 1 and number in config.multimodal_prune_layers
            score = config.multimodal_score if prunes and config.multimodal_score != "random" else None
            layer = self.layers[number]
            states_QLD, scores = self.run_layer(
                layer, states_QLD, mask, video_BMD, clip_Q, kept, score, draws and draws.at(number)
            )
            if prunes:
                if scores is None:
                    alive = (video_BMD if kept is None else kept).shape[1] - (kept is None)
                    scores = draw_node_scores(alive, seed, number).to(video_BMD.device)
                    scores = scores.expand(len(states_QLD), -1)
                chosen = select_patches(scores, keep_count(scores.shape[1], config.multimodal_keep_rate))
                keep_indices.append(chosen)
                kept = chosen if kept is None else kept.gather(1, chosen)
        return Fused(states_QLD, tuple(keep_indices))

    def _check(self, text_ids_BL: Tensor, text_mask_BL: Tensor) -> None:
        limit = self.config.text.max_length
        if text_ids_BL.shape != text_mask_BL.shape or text_ids_BL.dim() != 2:
            raise ModelInputError(
                "ids and mask must both be (B, L); "
                f"got {tuple(text_ids_BL.shape)} and {tuple(text_mask_BL.shape)}"
            )
        if text_mask_BL.dtype != torch.bool:
            raise ModelInputError(f"text_mask must be bool (True at tokens), got {text_mask_BL.dtype}")
        if text_ids_BL.shape[1] > limit:
            raise ModelInputError(
                f"captions are padded to {text_ids_BL.shape[1]} tokens, the model has {limit} positions; "
                "lower text_length of the loader or raise text.max_length"
            )
        has_tokens = text_mask_BL.any(dim=1)
        if text_mask_BL.device.type != "cpu":
            # On an accelerator the check must not stop the stream: it is asserted there.
            torch._assert_async(has_tokens.all(), "a caption has no tokens")  # pyright: ignore
        elif not bool(has_tokens.all()):
            rows = (~has_tokens).nonzero().flatten().tolist()
            raise ModelInputError(
                f"captions in rows {rows} have no tokens: text_mask is False throughout; reject them"
            )
