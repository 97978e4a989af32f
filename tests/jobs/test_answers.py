"""Answers to a file and back, and two sheets against each other."""

from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs.answers import (
    Answer,
    AnswersError,
    AnswerSheet,
    compare_answers,
    make_answers,
    read_answers,
    write_answers,
)
from pipeline.questions import McqQuestion


def answer(number: int, prediction: int, right: int = 0, kind: Literal["inter", "intra"] = "intra") -> Answer:
    return Answer(number, kind, False, "moves cup", ("a", "b"), (0.5, 0.25), right, prediction)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    question = McqQuestion(7, "inter", "moves cup", "b", ("a", "b", "c"), 1, True)
    answers = make_answers([question], torch.tensor([[0.1, 0.7, 0.2]]))
    path = tmp_path / "stage-1" / "answers.parquet"
    write_answers(path, answers, {"stage": 1, "step": 40})
    sheet = read_answers(path)
    assert sheet == AnswerSheet(answers, {"stage": 1, "step": 40})
    (found,) = sheet.answers
    assert (found.question_id, found.prediction, found.is_correct, found.is_probe) == (7, 1, True, True)
    # float32 survives bit by bit.
    assert torch.tensor(found.scores).equal(torch.tensor([0.1, 0.7, 0.2]))
    assert [entry.name for entry in path.parent.iterdir()] == ["answers.parquet"]


def test_files_that_are_no_answers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AnswersError, match="there is no such file; svitt evaluate"):
        read_answers(tmp_path / "absent.parquet")
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"x": [1]}), other)
    with pytest.raises(AnswersError, match="expected answers as svitt evaluate writes them"):
        read_answers(other)
    other.write_text("no parquet")
    with pytest.raises(AnswersError, match="expected answers as svitt evaluate writes them"):
        read_answers(other)


def test_two_sheets_are_compared_question_by_question_on_one_kind() -> None:
    a = AnswerSheet((answer(1, 0), answer(2, 0), answer(3, 1), answer(4, 0, kind="inter")), {})
    # The other order of questions; wrong at 1, right at 2 and at 3.
    b = AnswerSheet((answer(3, 0), answer(2, 0), answer(1, -1), answer(4, 1, kind="inter")), {})
    intra, inter = compare_answers(a, b, "intra"), compare_answers(a, b, "inter")
    assert (intra.num_pairs, intra.num_only_a, intra.num_only_b, intra.difference) == (3, 1, 1, 0)
    assert (inter.num_pairs, inter.num_only_a, inter.num_only_b, inter.difference) == (1, 1, 0, 100)


def test_sheets_of_other_questions_are_not_compared() -> None:
    sheet = AnswerSheet((answer(1, 0), answer(2, 0)), {})
    for other in ((answer(1, 0),), (answer(1, 0), answer(2, 0, right=1))):
        with pytest.raises(AnswersError, match="question 2 is not the same in both"):
            compare_answers(sheet, AnswerSheet(other, {}), "intra")
    with pytest.raises(AnswersError, match="no inter questions"):
        compare_answers(sheet, sheet, "inter")
