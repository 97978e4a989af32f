"""Retrieval over a store on chosen features: targets of shared captions, ties, parts of the similarity matrix."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from jobs import retrieval
from jobs.encoder import HeldOutClips
from jobs.ranks import SingleRank
from jobs.retrieval import score_retrieval

EAST, NORTH, WEST = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)


class FakeClips:
    """Chosen features for the clips of a store and its captions."""

    def __init__(
        self, clips: list[tuple[str, tuple[float, float]]], texts: dict[str, tuple[float, float]]
    ) -> None:
        self.store = FakeStore(clips)
        self.ranks = SingleRank()
        self.encoder = SimpleNamespace(tokenizer=self.tokens)
        self._clips, self._texts = clips, texts

    def tokens(self, captions: Sequence[str]) -> tuple[Tensor, None]:
        return torch.tensor([list(caption.lower().ljust(8).encode()) for caption in captions]), None

    def video(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor([self._clips[row][1] for row in rows])

    def text(self, captions: Sequence[str]) -> Tensor:
        return torch.tensor([self._texts[caption] for caption in captions])


class FakeStore:
    def __init__(self, clips: list[tuple[str, Any]]) -> None:
        self._clips = clips

    def __len__(self) -> int:
        return len(self._clips)

    def caption(self, row: int) -> str:
        return self._clips[row][0]


# Two clips are called east, in two spellings; north's clip looks west, and so does west's.
CLIPS = [("east", EAST), ("north", WEST), ("East", NORTH), ("west", WEST)]
TEXTS = {"east": EAST, "north": NORTH, "west": WEST}


@pytest.mark.parametrize("at_once", [1, 6, 2**24])
def test_any_clip_of_a_caption_answers_it_and_parts_do_not_matter(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(retrieval, "_SIMILARITIES_AT_ONCE", at_once)
    metrics = score_retrieval(cast(HeldOutClips, FakeClips(CLIPS, TEXTS))).metrics()
    # east: its clip 0 is best. north: cosine 0 with its clip, clip 0 ties at 0, clip 2 is best, clip 3 ties: last.
    # west: its clip ties with north's: second.
    assert metrics["eval/retrieval/text_to_video_n"] == 3
    assert metrics["eval/retrieval/text_to_video_r1"] == pytest.approx(100 / 3)
    assert metrics["eval/retrieval/text_to_video_r5"] == 100
    assert metrics["eval/retrieval/text_to_video_median_rank"] == 2
    # Clip 0: east. Clip 1: west is best, north second. Clip 2: north, then east and west tie: third. Clip 3: west.
    assert metrics["eval/retrieval/video_to_text_n"] == 4
    assert metrics["eval/retrieval/video_to_text_r1"] == 50
    assert metrics["eval/retrieval/video_to_text_median_rank"] == 1.5
    assert metrics["eval/retrieval/video_to_text_r1_low"] == pytest.approx(15.0, abs=0.05)
    assert metrics["eval/retrieval/video_to_text_r1_high"] == pytest.approx(85.0, abs=0.05)
