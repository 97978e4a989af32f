"""The EgoMCQ questions as they stand beside the prepared clips: ids instead of annotations.

A question whose clips were not all stored is counted as unreadable and not listed among the scored ones.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from pipeline.egomcq import Question, probe_questions
from pipeline.errors import ShardError
from pipeline.shards import to_json_bytes
from pipeline.storage import StoragePath, storage_path

QUESTIONS_FORMAT = 1
QUESTIONS_FILE = "questions.json"


@dataclass(frozen=True, slots=True)
class McqQuestion:
    """One readable question. `choices` are clip ids of the set, `answer` a position in them.

    `is_probe` marks an intra question with a distractor that shows the reversed verb on the same noun.
    """

    question_id: int
    kind: Literal["inter", "intra"]
    caption: str
    query_clip_id: str
    choices: tuple[str, ...]
    answer: int
    is_probe: bool


@dataclass(frozen=True, slots=True)
class McqSet:
    """Readable questions in order of their ids, and the ids of those that lost a clip."""

    questions: tuple[McqQuestion, ...]
    unreadable: tuple[int, ...]

    @property
    def num_total(self) -> int:
        return len(self.questions) + len(self.unreadable)


def build_question_set(
    questions: Sequence[Question],
    stored_clip_ids: Collection[str],
    reversed_verbs: Sequence[tuple[int, int]] = (),
) -> McqSet:
    """Split questions into readable ones and those of which a choice is not stored."""
    stored = set(stored_clip_ids)
    probes = {question.question_id for question in probe_questions(questions, reversed_verbs)}
    readable: list[McqQuestion] = []
    unreadable: list[int] = []
    for question in sorted(questions, key=lambda item: item.question_id):
        choices = tuple(choice.clip_id for choice in question.choices)
        if not stored.issuperset(choices):
            unreadable.append(question.question_id)
            continue
        readable.append(
            McqQuestion(
                question_id=question.question_id,
                kind=question.kind,
                caption=question.query.caption,
                query_clip_id=choices[question.answer],
                choices=choices,
                answer=question.answer,
                is_probe=question.question_id in probes,
            )
        )
    return McqSet(tuple(readable), tuple(unreadable))


def questions_to_bytes(question_set: McqSet) -> bytes:
    """The bytes of questions.json."""
    return to_json_bytes({"format": QUESTIONS_FORMAT, **asdict(question_set)})


def read_questions(shards_dir: str | StoragePath) -> McqSet:
    """Read questions.json of a shard set. Raises ShardError when it is absent or of another format."""
    path = storage_path(shards_dir) / QUESTIONS_FILE
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format"] != QUESTIONS_FORMAT:
            raise ShardError(f"read {path}: format {value['format']}, expected {QUESTIONS_FORMAT}")
        questions = tuple(McqQuestion(**{**q, "choices": tuple(q["choices"])}) for q in value["questions"])
        return McqSet(questions, tuple(value["unreadable"]))
    except OSError as error:
        raise ShardError(f"read {path}: {error.strerror}; run prepare with an EgoMCQ file") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(f"read {path}: {error!r}; run prepare again: it rewrites the file") from error
