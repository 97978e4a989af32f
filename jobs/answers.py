"""What a model answered to every EgoMCQ question, kept beside its stage: for paired tests, and to look at."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float
from torch import Tensor

from model.metrics import egomcq_predictions
from model.paired_bootstrap import PairedDifference, paired_bootstrap
from pipeline.atomic import replaced_whole
from pipeline.questions import McqQuestion

FORMAT = 1
# In the folder of a stage, by how the questions were scored.
ANSWERS_FILES = {"dual": "answers.parquet", "matching": "answers-vtm.parquet"}
_FACTS_KEY = b"svitt_answers"
_SCHEMA = pa.schema(
    [
        ("question_id", pa.int64()),
        ("kind", pa.string()),
        ("is_probe", pa.bool_()),
        ("caption", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("answer", pa.int8()),
        ("prediction", pa.int8()),
    ]
)


class AnswersError(Exception):
    """Answers that cannot be read, or that do not fit together."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One question: the clip ids to choose from, the score of each (float32), the right place among them and the one
    predicted, -1 where no score is greater than all others.
    """

    question_id: int
    kind: Literal["inter", "intra"]
    is_probe: bool
    caption: str
    choices: tuple[str, ...]
    scores: tuple[float, ...]
    answer: int
    prediction: int

    @property
    def is_correct(self) -> bool:
        return self.prediction == self.answer


@dataclass(frozen=True, slots=True)
class AnswerSheet:
    """All answers of one checkpoint, in order of the questions, and where they come from (stage, step, ...)."""

    answers: tuple[Answer, ...]
    facts: dict[str, Any]


def make_answers(questions: Sequence[McqQuestion], scores_QK: Float[Tensor, "Q K"]) -> tuple[Answer, ...]:
    """Questions with their scores."""
    predictions = egomcq_predictions(scores_QK).tolist()
    return tuple(
        Answer(q.question_id, q.kind, q.is_probe, q.caption, q.choices, tuple(scores), q.answer, prediction)
        for q, scores, prediction in zip(questions, scores_QK.tolist(), predictions, strict=True)
    )


def write_answers(path: Path, answers: Sequence[Answer], facts: Mapping[str, Any]) -> None:
    """Writes a Parquet file, whole or not at all: one row a question, `facts` as JSON in its schema."""
    table = pa.Table.from_pylist([asdict(answer) for answer in answers], schema=_SCHEMA)
    meta = json.dumps({"format": FORMAT, **facts}, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_whole(path) as partial:
        pq.write_table(
            table.replace_schema_metadata({_FACTS_KEY: meta.encode()}), partial, compression="zstd"
        )


def read_answers(path: Path) -> AnswerSheet:
    """Reads what `write_answers` wrote. Raises AnswersError when there is no such file or it is another one."""
    if not path.is_file():
        raise AnswersError(f"read {path}: there is no such file; svitt evaluate RUN_DIR writes it")
    try:
        table = pq.read_table(path)
        facts = json.loads((table.schema.metadata or {})[_FACTS_KEY])
        if facts.pop("format") != FORMAT:
            raise AnswersError(f"read {path}: it has another format than {FORMAT}; run svitt evaluate again")
        rows = table.to_pylist()
        answers = [
            Answer(**{**row, "choices": tuple(row["choices"]), "scores": tuple(row["scores"])})
            for row in rows
        ]
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise AnswersError(
            f"read {path}: {error!r}; expected answers as svitt evaluate writes them, run it again"
        ) from error
    return AnswerSheet(tuple(answers), facts)


def compare_answers(
    a: AnswerSheet, b: AnswerSheet, kind: Literal["inter", "intra"], seed: int = 0, n: int = 10_000
) -> PairedDifference:
    """How much more often a is right than b on the questions of one kind, see `paired_bootstrap`.

    Raises AnswersError when the two were not asked the same questions, or none of this kind.
    """
    asked_a, asked_b = ({q.question_id: q for q in sheet.answers if q.kind == kind} for sheet in (a, b))
    for number in sorted(asked_a.keys() | asked_b.keys()):
        own, other = asked_a.get(number), asked_b.get(number)
        if own is None or other is None or (own.choices, own.answer) != (other.choices, other.answer):
            raise AnswersError(
                f"compared the {kind} answers of {len(asked_a)} and {len(asked_b)} questions: question {number} is not "
                "the same in both; score both runs on one set of shards (svitt evaluate)"
            )
    if not asked_a:
        raise AnswersError(f"there are no {kind} questions among the answers to compare")
    order = sorted(asked_a)
    return paired_bootstrap(
        [asked_a[q].is_correct for q in order], [asked_b[q].is_correct for q in order], seed, n
    )
