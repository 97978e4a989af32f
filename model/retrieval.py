"""Test-time scoring of SViTT: videos of several clips, ranked by cosine, the best re-scored by the matching head.

Pure functions on features and tokens: encoding the clips is the caller's.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from model.errors import ModelInputError
from model.video_text_model import TextOutput, VideoTextModel

Ensemble = Literal["lse", "mean", "max"]
ClipLayout = Literal["consecutive", "interleaved"]
NOT_RESCORED = -100.0


class MatchingScores(NamedTuple):
    """Class-1 logits combined over clips; -100 outside the `k_test` best of each row by the dual score."""

    video_to_text_VQ: Float[Tensor, "V Q"]
    text_to_video_QV: Float[Tensor, "Q V"]


def split_clips(
    video_BFCHW: Float[Tensor, "B F 3 H W"], num_frames: int, layout: ClipLayout = "consecutive"
) -> Float[Tensor, "B K T 3 H W"]:
    """Cut the frames of each video into K clips of `num_frames`: runs, or every K-th frame when `interleaved`.

    Raises ModelInputError when the frames are no multiple of `num_frames`.
    """
    total = video_BFCHW.shape[1]
    num_clips, rest = divmod(total, num_frames)
    if rest or num_clips == 0:
        nearest = [count * num_frames for count in (num_clips, num_clips + 1) if count]
        raise ModelInputError(
            f"{total} test frames are no multiple of the model's {num_frames}; take {' or '.join(map(str, nearest))}"
        )
    if layout == "interleaved":
        return video_BFCHW.unflatten(1, (num_frames, num_clips)).transpose(1, 2)
    return video_BFCHW.unflatten(1, (num_clips, num_frames))


def dual_scores(
    clip_features_VKP: Float[Tensor, "V K P"], text_features_QP: Float[Tensor, "Q P"]
) -> Float[Tensor, "V Q"]:
    """Mean over the clips of each video of the cosine with each text, float32, without temperature.

    Features are unit-norm, as `encode_video` and `encode_text` return them.
    """
    return torch.einsum("vkp,qp->vkq", clip_features_VKP.float(), text_features_QP.float()).mean(dim=1)


@torch.no_grad()
def matching_scores(
    model: VideoTextModel,
    clip_tokens_VKMD: Float[Tensor, "V K M D"],
    text: TextOutput,
    text_mask_QL: Bool[Tensor, "Q L"],
    dual_VQ: Float[Tensor, "V Q"],
    *,
    k_test: int = 128,
    ensemble: Ensemble = "lse",
    pairs_per_pass: int = 256,
) -> MatchingScores:
    """Re-score the `k_test` best texts of each video and videos of each text with fusion layers and matching head.

    `ensemble` combines the logits of a video's clips: log-sum-exp, mean or max. A pair that both directions want is
    computed once. Raises ModelInputError for a `k_test` below 1.
    """
    if k_test < 1:
        raise ModelInputError(f"k_test {k_test} leaves nothing to re-score; take at least 1")
    best_texts_VQ = _best(dual_VQ, k_test)
    best_videos_VQ = _best(dual_VQ.T, k_test).T
    video_P, text_P = (best_texts_VQ | best_videos_VQ).nonzero(as_tuple=True)
    num_clips = clip_tokens_VKMD.shape[1]
    clips = clip_tokens_VKMD.flatten(0, 1)
    scores_VQ = torch.full_like(dual_VQ, NOT_RESCORED)
    for part in torch.arange(len(video_P), device=video_P.device).split(pairs_per_pass):
        logits_PK = _match_logits(model, clips, num_clips, text, text_mask_QL, video_P[part], text_P[part])
        scores_VQ[video_P[part], text_P[part]] = combine_clips(logits_PK, ensemble)
    return MatchingScores(
        scores_VQ.masked_fill(~best_texts_VQ, NOT_RESCORED),
        scores_VQ.T.masked_fill(~best_videos_VQ.T, NOT_RESCORED),
    )


def combine_clips(logits_PK: Float[Tensor, "P K"], ensemble: Ensemble) -> Float[Tensor, " P"]:
    """One score of the logits of K clips. Raises ModelInputError for an unknown rule."""
    if ensemble == "lse":
        return logits_PK.logsumexp(dim=1)
    if ensemble == "mean":
        return logits_PK.mean(dim=1)
    if ensemble == "max":
        return logits_PK.max(dim=1).values
    raise ModelInputError(f"no rule for clips is called {ensemble!r}; choose lse, mean or max")


def _best(scores: Tensor, count: int) -> Tensor:
    """True at the `count` highest of each row."""
    chosen = scores.topk(min(count, scores.shape[1]), dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)


def _match_logits(
    model: VideoTextModel,
    clips_XMD: Tensor,
    num_clips: int,
    text: TextOutput,
    text_mask_QL: Tensor,
    video_P: Int[Tensor, " P"],
    text_P: Int[Tensor, " P"],
) -> Float[Tensor, "P K"]:
    rows = text_P.repeat_interleave(num_clips)
    clip = (video_P[:, None] * num_clips + torch.arange(num_clips, device=video_P.device)).flatten()
    states_XLD = model.fuse(text.states_BLD[rows], text_mask_QL[rows], clips_XMD, clip).states_QLD
    return model.matching_logits(states_XLD)[:, 1].float().view(-1, num_clips)
