"""Features and matching scores of a real, tiny model on stored clips: the same bits at any number of ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from stored_clips import write_set
from thread_ranks import on_ranks
from torch import Tensor

from jobs.batch_work import normalise
from jobs.encoder import Encoder, HeldOutClips, by_all_ranks
from jobs.ranks import Ranks, SingleRank
from jobs.retrieval import distinct_captions, score_retrieval
from model.video_text_model import VideoTextModel
from pipeline.config import LoaderConfig
from pipeline.loader import eval_batches
from pipeline.store import ClipStore
from pipeline.text import CaptionTokenizer
from tests.model.tiny import tiny_config

BATCH = 5  # 12 clips: two whole batches and one of two


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ClipStore:
    return ClipStore(write_set(tmp_path_factory.mktemp("shards")))


@pytest.fixture(scope="module")
def encoder(store: ClipStore) -> Encoder:
    loader = LoaderConfig(image_size=16, num_threads=1, text_length=8)
    tokenizer = CaptionTokenizer(Path(str(store.shards_dir)) / "vocab.txt", 8)
    torch.manual_seed(0)
    text = {"vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.pad_id, "cls_id": tokenizer.cls_id}
    model = VideoTextModel(tiny_config({"image_size": 16}, text=text))
    # Heads start near 0; scores should differ.
    torch.nn.init.normal_(model.vtm_head.weight)
    return Encoder(model.eval(), tokenizer, loader, BATCH, torch.device("cpu"))


@pytest.mark.parametrize("world_size", [2, 3])
def test_features_are_the_same_bits_at_any_number_of_ranks(
    store: ClipStore, encoder: Encoder, world_size: int
) -> None:
    def features(ranks: Ranks) -> tuple[Tensor, Tensor]:
        clips = HeldOutClips(encoder, store, ranks)
        return clips.video([7, *range(12)]), clips.text([store.caption(row) for row in range(12)])

    ((video, text),) = on_ranks(1, features)
    assert video.shape == (13, 8)
    assert torch.equal(video[0], video[8])
    for other_video, other_text in on_ranks(world_size, features):
        assert torch.equal(other_video, video)
        assert torch.equal(other_text, text)


@pytest.mark.parametrize("world_size", [2, 3])
def test_retrieval_is_the_same_to_the_last_digit_at_any_number_of_ranks(
    store: ClipStore, encoder: Encoder, world_size: int
) -> None:
    def metrics(ranks: Ranks) -> dict[str, float]:
        return score_retrieval(HeldOutClips(encoder, store, ranks)).metrics()

    (alone,) = on_ranks(1, metrics)
    assert alone["eval/retrieval/text_to_video_n"] == alone["eval/retrieval/video_to_text_n"] == 12
    assert on_ranks(world_size, metrics) == [alone] * world_size


def test_a_matching_score_is_the_log_odds_of_one_pair(store: ClipStore, encoder: Encoder) -> None:
    rows_QK = np.array([[0, 3, 5], [7, 1, 2], [11, 4, 0]])
    captions = ["moves cup 3", "moves cup 7", "moves cup 1"]
    found = HeldOutClips(encoder, store, SingleRank()).matches(captions, rows_QK)
    model = encoder.model
    for q, caption in enumerate(captions):
        ids, mask = encoder.tokenizer([caption])
        for k, row in enumerate(rows_QK[q]):
            (batch,) = eval_batches(store, [row], encoder.tokenizer, encoder.loader, 3, 1)
            with torch.no_grad():
                video = model.encode_video(normalise(batch.video_BTCHW, encoder.device, torch.float32))
                fused = model.fuse(model.encode_text(ids, mask).states_BLD, mask, video.tokens_BMD)
                no, yes = model.matching_logits(fused.states_QLD)[0].tolist()
            assert found[q, k].item() == pytest.approx(yes - no, abs=1e-4)
    assert found.std() > 1e-3


@pytest.mark.parametrize("world_size", [2, 3])
def test_matching_scores_are_the_same_bits_at_any_number_of_ranks(
    store: ClipStore, encoder: Encoder, world_size: int
) -> None:
    rows_QK = np.arange(12).reshape(6, 2)
    captions = [f"moves cup {q}" for q in range(6)]

    def scores(ranks: Ranks) -> Tensor:
        return HeldOutClips(encoder, store, ranks).matches(captions, rows_QK)

    (alone,) = on_ranks(1, scores)
    assert alone.shape == (6, 2)
    assert all(torch.equal(other, alone) for other in on_ranks(world_size, scores))


def test_captions_that_are_the_same_tokens_are_one_query(store: ClipStore, encoder: Encoder) -> None:
    captions, caption_of_clip = distinct_captions(store, encoder.tokenizer)
    assert captions == [f"#C C moves cup {i}" for i in range(12)]
    assert caption_of_clip.tolist() == list(range(12))
    # Cut after two tokens all captions are "moves".
    short = CaptionTokenizer(Path(str(store.shards_dir)) / "vocab.txt", 2)
    captions, caption_of_clip = distinct_captions(store, short)
    assert captions == ["#C C moves cup 0"]
    assert caption_of_clip.tolist() == [0] * 12


@pytest.mark.parametrize("num_items", [0, 1, 7])
def test_rows_come_back_in_order_whatever_the_ranks(num_items: int) -> None:
    def doubled(ranks: Ranks) -> list[float]:
        def compute(items: list[int]) -> Tensor:
            return 2 * torch.tensor(items, dtype=torch.float32)

        return by_all_ranks(ranks, range(num_items), 2, compute).tolist()

    for world_size in (1, 2, 3, 5):
        assert on_ranks(world_size, doubled) == [[2.0 * i for i in range(num_items)]] * world_size
