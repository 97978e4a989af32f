"""EgoMCQ and the temporal probe on chosen features: counts, ties, unreadable questions, two ranks as one."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from thread_ranks import on_ranks
from torch import Tensor

from jobs.encoder import HeldOutClips
from jobs.evaluate import (
    Encoder,
    Evaluation,
    EvaluationError,
    score_by_matching,
    score_egomcq,
    score_questions,
)
from jobs.ranks import SingleRank
from model.metrics import McqScore
from pipeline.questions import McqQuestion, McqSet
from pipeline.store import ClipStore

CLIPS = ("a", "b", "c", "d", "e", "f")
ROW_OF = {"a": 10, "b": 11, "c": 12, "d": 13, "e": 14, "f": 15}
EAST, NORTH, WEST, SOUTH = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)
FEATURES = {"a": EAST, "b": NORTH, "c": WEST, "d": SOUTH, "e": EAST, "f": SOUTH}
# Shuffled frames make clip d look like b and the other way round; backwards a looks like c too.
SHUFFLED = {**FEATURES, "b": SOUTH, "d": NORTH}
REVERSED = {**FEATURES, "a": WEST, "b": SOUTH, "c": EAST, "d": NORTH}
CAPTIONS = {"east": EAST, "north": NORTH, "west": WEST, "south": SOUTH}


class FakeStore:
    """Knows rows by clip id."""

    def rows_of(self, clip_ids: Sequence[str]) -> np.ndarray:
        return np.asarray([ROW_OF[clip_id] for clip_id in clip_ids], dtype=np.int64)


class FakeEncoder:
    """Gives every clip and caption its chosen feature and remembers which rows it was asked for."""

    batch_size = captions_per_batch = 2

    def __init__(self, vtm_weight: float = 1.0) -> None:
        self.asked: list[list[int]] = []
        self.matched: list[list[int]] = []
        self.is_training = True
        text = SimpleNamespace(num_fusion_layers=2)
        config = SimpleNamespace(joint_width=2, vtm_weight=vtm_weight, text=text)
        self.model = SimpleNamespace(config=config, eval=self.leave_training)

    def leave_training(self) -> None:
        self.is_training = False

    def clips(self, store: FakeStore, rows: Sequence[int], frame_order: str = "ordered") -> Tensor:
        self.asked.append(list(rows))
        table = {"ordered": FEATURES, "shuffled": SHUFFLED, "reversed": REVERSED}[frame_order]
        features = {ROW_OF[clip_id]: feature for clip_id, feature in table.items()}
        return torch.tensor([features[row] for row in rows]).reshape(-1, 2)

    def captions(self, captions: Sequence[str]) -> Tensor:
        return torch.tensor([CAPTIONS[caption] for caption in captions]).reshape(-1, 2)

    def questions_per_batch(self, num_choices: int) -> int:
        return 2

    def matches(self, store: FakeStore, captions: Sequence[str], rows_QK: np.ndarray) -> Tensor:
        """The matching head takes the clip of the highest row, whatever the caption says."""
        self.matched += rows_QK.tolist()
        return torch.from_numpy(rows_QK).float()


def question(
    kind: Literal["inter", "intra"], caption: str, choices: str, answer: int, is_probe: bool = False
) -> McqQuestion:
    return McqQuestion(0, kind, caption, choices[answer], tuple(choices), answer, is_probe)


# Right; right; wrong (c is west, the answer d is south).
INTER = (
    question("inter", "east", "abcdf", 0),
    question("inter", "north", "abcdf", 1),
    question("inter", "west", "abcdf", 3),
)
# Right; tied with e, so wrong.
INTRA = (question("intra", "south", "abcde", 3), question("intra", "east", "abcde", 0))
# North among b and d: right in order. Shuffled, d is north and b south: wrong. West stays right either way.
PROBES = (
    question("intra", "north", "abcde", 1, is_probe=True),
    question("intra", "west", "abcde", 2, is_probe=True),
)


def score(
    questions: Sequence[McqQuestion],
    unreadable: Sequence[int] = (),
    allowed: float = 0.0,
    ranks: Any = None,
    encoder: FakeEncoder | None = None,
) -> Evaluation:
    return score_egomcq(
        cast(Encoder, encoder or FakeEncoder()),
        cast(ClipStore, FakeStore()),
        McqSet(tuple(questions), tuple(unreadable)),
        ranks or SingleRank(),
        allowed,
    )


def counts(found: McqScore) -> tuple[int, int, int]:
    return found.num_scored, found.num_correct, found.num_ties


def test_questions_are_counted_by_kind_and_a_tie_is_wrong_and_counted() -> None:
    evaluation = score([*INTER, *INTRA])
    assert counts(evaluation.scores["eval/egomcq/inter_video"]) == (3, 2, 0)
    assert counts(evaluation.scores["eval/egomcq/intra_video"]) == (2, 1, 1)
    assert evaluation.num_unreadable == 0


def test_metrics_are_flat_and_in_percent() -> None:
    metrics = score([*INTER, *INTRA]).metrics()
    assert metrics["eval/egomcq/inter_video_acc"] == pytest.approx(200 / 3)
    assert metrics["eval/egomcq/inter_video_n"] == 3
    assert metrics["eval/egomcq/intra_video_acc"] == 50
    assert metrics["eval/egomcq/intra_video_ties"] == 1
    # Wilson, 1 of 2: 0.5 -+ 1.96 / (1 + 1.96^2 / 2) * sqrt(0.5 * 0.5 / 2 + 1.96^2 / 16) = 0.5 -+ 0.4055
    assert metrics["eval/egomcq/intra_video_low"] == pytest.approx(9.45, abs=0.01)
    assert metrics["eval/egomcq/intra_video_high"] == pytest.approx(90.55, abs=0.01)
    assert metrics["eval/egomcq/num_unreadable"] == 0
    assert not any(name.startswith("eval/temporal_probe") for name in metrics)


def test_the_probe_scores_its_questions_in_order_and_shuffled() -> None:
    evaluation = score([*INTER, *INTRA, *PROBES])
    assert counts(evaluation.scores["eval/temporal_probe/ordered"]) == (2, 2, 0)
    assert counts(evaluation.scores["eval/temporal_probe/shuffled"]) == (2, 1, 0)
    assert evaluation.metrics()["eval/temporal_probe/margin"] == 50
    # Backwards d is north and a is west, so the answers b and c lose.
    assert counts(evaluation.scores["eval/temporal_probe/reversed"]) == (2, 0, 0)
    # Probes are intra questions and stay among them.
    assert counts(evaluation.scores["eval/egomcq/intra_video"]) == (4, 3, 1)


def test_a_kind_without_questions_is_absent() -> None:
    metrics = score(INTRA).metrics()
    assert "eval/egomcq/inter_video_acc" not in metrics
    assert metrics["eval/egomcq/intra_video_n"] == 2


def test_every_clip_is_encoded_once_however_many_questions_show_it() -> None:
    encoder = FakeEncoder()
    score([*INTER, *INTRA], encoder=encoder)
    assert encoder.asked == [[10, 11, 12, 13, 14, 15]]
    assert not encoder.is_training


def test_the_probe_in_order_encodes_no_clip_again() -> None:
    encoder = FakeEncoder()
    score([*INTER, *PROBES], encoder=encoder)
    # All clips in order; those of the probe (a to e) shuffled, then backwards.
    assert encoder.asked == [[10, 11, 12, 13, 14, 15], [10, 11, 12, 13, 14], [10, 11, 12, 13, 14]]


def test_two_ranks_encode_disjoint_shares_and_get_what_one_rank_gets() -> None:
    questions = [*INTER, *INTRA, *PROBES]
    alone = score(questions)
    encoders = [FakeEncoder(), FakeEncoder()]
    both = on_ranks(2, lambda ranks: score(questions, ranks=ranks, encoder=encoders[ranks.rank]))
    assert both == [alone, alone]
    # Batches of two in turn.
    assert encoders[0].asked[0] == [10, 11, 14, 15]
    assert encoders[1].asked[0] == [12, 13]


def test_more_ranks_than_clips_give_the_same_result_too() -> None:
    alone = score(INTRA)
    assert on_ranks(7, lambda ranks: score(INTRA, ranks=ranks)) == [alone] * 7


def test_unreadable_questions_up_to_the_allowed_share_are_counted_and_not_scored() -> None:
    evaluation = score([*INTER], unreadable=[7], allowed=0.25)  # 1 of 4
    assert evaluation.num_unreadable == 1
    assert counts(evaluation.scores["eval/egomcq/inter_video"]) == (3, 2, 0)
    assert evaluation.metrics()["eval/egomcq/num_unreadable"] == 1


def test_more_unreadable_questions_than_allowed_are_refused_with_the_numbers() -> None:
    with pytest.raises(EvaluationError, match=r"1 of 4 EgoMCQ questions lost a clip .*allowed: 24\.0%"):
        score([*INTER], unreadable=[7], allowed=0.24)


def test_no_readable_question_is_refused_whatever_is_allowed() -> None:
    with pytest.raises(EvaluationError, match="2 of 2 EgoMCQ questions lost a clip"):
        score([], unreadable=[1, 2], allowed=1.0)


def test_answers_hold_scores_and_predictions_and_a_tie_predicts_nothing() -> None:
    answers = score([*INTER, *INTRA]).answers
    assert [answer.prediction for answer in answers] == [0, 1, 2, 3, -1]
    assert [answer.is_correct for answer in answers] == [True, True, False, True, False]
    # East against east, north, west, south and south.
    assert answers[0].scores == (1, 0, -1, 0, 0)
    assert (answers[4].kind, answers[4].caption, answers[4].choices) == ("intra", "east", tuple("abcde"))


def matched(encoder: FakeEncoder, ranks: Any = None) -> Evaluation:
    clips = HeldOutClips(cast(Encoder, encoder), cast(ClipStore, FakeStore()), ranks or SingleRank())
    return score_by_matching(clips, McqSet((*INTER, *INTRA), ()), 0.0)


def test_the_matching_head_scores_all_five_clips_under_a_name_of_its_own() -> None:
    evaluation = matched(FakeEncoder())
    # It takes f of a, b, c, d, f, which no inter question asks for, and e of a, b, c, d, e.
    assert {name: counts(found) for name, found in evaluation.scores.items()} == {
        "eval/egomcq_vtm/inter_video": (3, 0, 0),
        "eval/egomcq_vtm/intra_video": (2, 0, 0),
    }
    assert [answer.prediction for answer in evaluation.answers] == [4] * 5
    assert evaluation.answers[0].scores == (10, 11, 12, 13, 15)


def test_questions_for_the_matching_head_are_dealt_out_and_come_back_in_order() -> None:
    alone = matched(FakeEncoder())
    encoders = [FakeEncoder() for _ in range(3)]
    every = on_ranks(3, lambda ranks: matched(encoders[ranks.rank], ranks))
    assert every == [alone] * 3
    assert [len(encoder.matched) for encoder in encoders] == [2, 2, 1]


def test_a_model_without_a_trained_matching_head_is_refused() -> None:
    with pytest.raises(EvaluationError, match=r"vtm_weight 0\.0: it has no matching head"):
        matched(FakeEncoder(vtm_weight=0.0))


def test_without_the_probe_frames_are_shown_in_order_only() -> None:
    encoder = FakeEncoder()
    clips = HeldOutClips(cast(Encoder, encoder), cast(ClipStore, FakeStore()), SingleRank())
    evaluation = score_questions(clips, McqSet(PROBES, ()), 0.0, with_probe=False)
    assert list(evaluation.scores) == ["eval/egomcq/intra_video"]
    assert len(encoder.asked) == 1
