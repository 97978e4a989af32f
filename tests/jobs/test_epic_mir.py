"""EPIC-KITCHENS-100's retrieval over a store, on chosen features: hand-computed scores, and clips without frames."""

from typing import cast

import pytest
import torch
from torch import Tensor

from jobs.encoder import HeldOutClips
from jobs.epic_mir import mir_lines, score_multi_instance
from jobs.evaluate import EvaluationError
from jobs.ranks import SingleRank
from pipeline.clip import make_record
from pipeline.epic_retrieval import RetrievalSet

EAST, NORTH, WEST = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)
# b shares its noun with the others and not its verb: relevance 1/2. c shows what a shows.
A, B, C = (
    make_record("P01_11", start_s, start_s + 1, start_s, caption, (verb,), (0,))
    for start_s, caption, verb in ((0.0, "take plate", 0), (2.0, "wash plate", 1), (4.0, "grab plate", 0))
)
VIDEO = {A.clip_id: EAST, B.clip_id: (0.8, 0.6), C.clip_id: WEST}
TEXT = {"take plate": EAST, "wash plate": NORTH}
BENCHMARK = RetrievalSet((A, B, C), ("take plate", "wash plate"), (0, 1))


class FakeStore:
    shards_dir = "shards/epic"

    def __init__(self, clip_ids: list[str]) -> None:
        self._clip_ids = clip_ids

    def __len__(self) -> int:
        return len(self._clip_ids)

    def clip_id(self, row: int) -> str:
        return self._clip_ids[row]


class FakeClips:
    ranks = SingleRank()

    def __init__(self, *clip_ids: str) -> None:
        self.store = FakeStore(list(clip_ids))

    def video(self, rows: list[int]) -> Tensor:
        return torch.tensor([VIDEO[self.store.clip_id(row)] for row in rows])

    def text(self, captions: list[str]) -> Tensor:
        return torch.tensor([TEXT[caption] for caption in captions])


def scored(*clip_ids: str, allowed: float = 0.5) -> dict[str, float]:
    clips = cast(HeldOutClips, FakeClips(*clip_ids))
    return score_multi_instance(clips, BENCHMARK, allowed).metrics()


def test_scores_are_those_computed_by_hand_whatever_the_order_of_the_store() -> None:
    """ "take plate" ranks a, b, c of relevance 1, 1/2, 1; "wash plate" b, then a and c; a finds its caption first, b
    and c find the half relevant one before it.
    """
    found = scored(C.clip_id, A.clip_id, B.clip_id)
    assert found == scored(A.clip_id, B.clip_id, C.clip_id)
    gain = {1: 1.0, 2: 0.6309298, 3: 0.5}
    expected = {
        "text_to_video_map": 100 * ((1 + 2 / 3) / 2 + 1) / 2,
        "text_to_video_official_map": 100 * ((1 + 2.5 / 3) / 2 + 1) / 2,
        "text_to_video_ndcg": 50
        * ((gain[1] + gain[2] / 2 + gain[3]) / (gain[1] + gain[2] + gain[3] / 2) + 1),
        "video_to_text_map": 100 * (1 + 0.5 + 0.5) / 3,
        "video_to_text_official_map": 100 * (1 + 0.75 + 0.75) / 3,
        "video_to_text_ndcg": 100 * (1 + 2 * (gain[1] / 2 + gain[2]) / (gain[1] + gain[2] / 2)) / 3,
        "text_to_video_n": 2,
        "video_to_text_n": 3,
        "num_unreadable": 0,
    }
    for kind in ("map", "official_map", "ndcg"):
        expected[f"mean_{kind}"] = (expected[f"text_to_video_{kind}"] + expected[f"video_to_text_{kind}"]) / 2
    assert {name.removeprefix("eval/epic_mir/"): value for name, value in found.items()} == pytest.approx(
        expected
    )
    assert mir_lines(found)[0] == (
        "EPIC-KITCHENS-100 text to video: mAP 95.8 as the official code has it, 91.7 without partial relevance; "
        "nDCG 98.3 (n 2)"
    )


def test_a_clip_without_frames_is_left_out_and_a_caption_goes_only_with_its_last_right_clip() -> None:
    without_a = scored(B.clip_id, C.clip_id)
    assert without_a["eval/epic_mir/num_unreadable"] == 1
    assert without_a["eval/epic_mir/text_to_video_n"] == 2  # c answers a's caption
    assert mir_lines(without_a)[-1] == "1 of its clips have no frames and were left out"
    without_b = scored(A.clip_id, C.clip_id)
    assert without_b["eval/epic_mir/text_to_video_n"] == 1
    assert without_b["eval/epic_mir/mean_map"] == 100


def test_shards_of_something_else_are_refused() -> None:
    with pytest.raises(EvaluationError, match=r"3 of the 3 clips .* are not in shards/epic .*allowed: 50"):
        scored("another")
    with pytest.raises(EvaluationError, match=r"1 of the 3 clips"):
        scored(A.clip_id, B.clip_id, allowed=0.1)
