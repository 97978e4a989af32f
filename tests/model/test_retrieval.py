"""Test-time scoring by hand; `test_golden_svitt` compares it with the published code."""

from math import exp, log

import pytest
import torch

from model.errors import ModelInputError
from model.retrieval import NOT_RESCORED, combine_clips, dual_scores, matching_scores, split_clips
from model.video_text_model import VideoTextModel
from tests.model.tiny import tiny_batch, tiny_config


def test_clips_are_runs_or_every_other_frame() -> None:
    frames = torch.arange(6.0).view(1, 6, 1, 1, 1).expand(1, 6, 3, 1, 1)
    runs, interleaved = split_clips(frames, 2), split_clips(frames, 2, "interleaved")
    assert runs[0, :, :, 0, 0, 0].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert interleaved[0, :, :, 0, 0, 0].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_frames_that_are_no_multiple_are_refused_with_the_nearest_that_are() -> None:
    with pytest.raises(ModelInputError, match=r"4 test frames are no multiple of the model's 8; take 8$"):
        split_clips(torch.zeros(1, 4, 3, 2, 2), 8)
    with pytest.raises(ModelInputError, match="take 8 or 12"):
        split_clips(torch.zeros(1, 10, 3, 2, 2), 4)


def test_dual_scores_are_the_mean_cosine_over_clips() -> None:
    clips = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    texts = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    torch.testing.assert_close(dual_scores(clips, texts), torch.tensor([[0.5, 0.7], [1.0, 0.6]]))


def test_clips_are_combined_by_three_rules() -> None:
    logits = torch.tensor([[0.0, 2.0]])
    assert float(combine_clips(logits, "mean")) == 1
    assert float(combine_clips(logits, "max")) == 2
    assert float(combine_clips(logits, "lse")) == pytest.approx(log(1 + exp(2)))
    with pytest.raises(ModelInputError, match="choose lse, mean or max"):
        combine_clips(logits, "concat")  # pyright: ignore[reportArgumentType]


def test_only_the_best_of_each_side_are_rescored_and_passes_do_not_matter() -> None:
    torch.manual_seed(0)
    model = VideoTextModel(tiny_config()).eval()
    batch = tiny_batch(model.config)
    dual = torch.tensor(
        [[0.9, 0.8, 0.1, 0.0, 0.2, 0.3], [0.7, 0.1, 0.6, 0.5, 0.4, 0.0], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]]
    )
    with torch.inference_mode():
        tokens = model.encode_video(batch.video).tokens_BMD.unflatten(0, (3, 2))
        text = model.encode_text(batch.text_ids, batch.text_mask)
        few, many = (
            matching_scores(model, tokens, text, batch.text_mask, dual, k_test=2, pairs_per_pass=size)
            for size in (1, 99)
        )
        pair = model.fuse(text.states_BLD[[1, 1]], batch.text_mask[[1, 1]], tokens[0]).states_QLD
        expected = model.matching_logits(pair)[:, 1].logsumexp(dim=0)
    done = few.video_to_text_VQ != NOT_RESCORED
    assert done.int().tolist() == [[1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]]
    assert ((few.text_to_video_QV != NOT_RESCORED).sum(dim=1) == 2).all()
    torch.testing.assert_close(few.video_to_text_VQ[0, 1], expected)
    torch.testing.assert_close(few.text_to_video_QV, many.text_to_video_QV)
    with pytest.raises(ModelInputError, match="k_test 0"):
        matching_scores(model, tokens, text, batch.text_mask, dual, k_test=0)
