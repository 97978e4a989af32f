"""EgoMCQ and the temporal probe on chosen features: counts, ties, unreadable questions, two ranks as one."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from jobs.evaluate import Encoder, Evaluation, EvaluationError, score_egomcq
from jobs.ranks import SingleRank
from model.metrics import McqScore
from pipeline.questions import McqQuestion, McqSet
from pipeline.store import ClipStore

CLIPS = ("a", "b", "c", "d", "e", "f")
ROW_OF = {"a": 10, "b": 11, "c": 12, "d": 13, "e": 14, "f": 15}
EAST, NORTH, WEST, SOUTH = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)
FEATURES = {"a": EAST, "b": NORTH, "c": WEST, "d": SOUTH, "e": EAST, "f": SOUTH}
# Shuffled frames make clip d look like b and the other way round.
SHUFFLED = {**FEATURES, "b": SOUTH, "d": NORTH}
CAPTIONS = {"east": EAST, "north": NORTH, "west": WEST, "south": SOUTH}


class FakeStore:
    """Knows rows by clip id."""

    def rows_of(self, clip_ids: Sequence[str]) -> np.ndarray:
        return np.asarray([ROW_OF[clip_id] for clip_id in clip_ids], dtype=np.int64)


class FakeEncoder:
    """Gives every clip and caption its chosen feature and remembers which rows it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.is_training = True
        config = SimpleNamespace(joint_width=2)
        self.model = SimpleNamespace(config=config, eval=self.leave_training)

    def leave_training(self) -> None:
        self.is_training = False

    def clips(self, store: FakeStore, rows: Sequence[int], frame_order: str = "ordered") -> Tensor:
        self.asked.append(list(rows))
        table = {"ordered": FEATURES, "shuffled": SHUFFLED}[frame_order]
        features = {ROW_OF[clip_id]: feature for clip_id, feature in table.items()}
        return torch.tensor([features[row] for row in rows]).reshape(-1, 2)

    def captions(self, captions: Sequence[str]) -> Tensor:
        return torch.tensor([CAPTIONS[caption] for caption in captions])


class ThreadRanks:
    """Ranks that are threads of one process and meet at a barrier."""

    def __init__(self, rank: int, meeting: Barrier, board: dict[int, Any]) -> None:
        self.rank, self.world_size = rank, meeting.parties
        self._meeting, self._board = meeting, board

    def mean(self, values: list[float]) -> list[float]:
        raise NotImplementedError

    def max(self, values: list[float]) -> list[float]:
        raise NotImplementedError

    def gather(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._meeting.wait(10)
        values = [self._board[rank] for rank in range(self.world_size)]
        self._meeting.wait(10)
        return values

    def barrier(self) -> None:
        raise NotImplementedError


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


def test_two_ranks_encode_disjoint_shares_and_get_what_one_rank_gets() -> None:
    questions = [*INTER, *INTRA, *PROBES]
    alone = score(questions)
    meeting, board = Barrier(2), {}
    encoders = [FakeEncoder(), FakeEncoder()]
    with ThreadPoolExecutor(2) as pool:
        both = list(
            pool.map(
                lambda rank: score(
                    questions, ranks=ThreadRanks(rank, meeting, board), encoder=encoders[rank]
                ),
                range(2),
            )
        )
    assert both == [alone, alone]
    assert encoders[0].asked[0] == [10, 12, 14]
    assert encoders[1].asked[0] == [11, 13, 15]


def test_more_ranks_than_clips_give_the_same_result_too() -> None:
    alone = score(INTRA)
    meeting, board = Barrier(7), {}
    with ThreadPoolExecutor(7) as pool:
        every = list(pool.map(lambda rank: score(INTRA, ranks=ThreadRanks(rank, meeting, board)), range(7)))
    assert every == [alone] * 7


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
