"""Reads and builds EgoMCQ files: one caption, five clips, which clip is it? (arXiv 2206.01670, section 4)

Type 1 is inter-video (five clips of five videos), type 2 intra-video (five consecutive clips of one video).
The reader is strict: a file whose types contradict its video uids stops the run, since swapped names are the
best known error around this benchmark.
"""

import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.clip import ClipRecord, make_record
from pipeline.egoclip import parse_tags
from pipeline.errors import DataError
from pipeline.storage import StoragePath

Kind = Literal["inter", "intra"]
KIND_OF_TYPE: dict[int, Kind] = {1: "inter", 2: "intra"}
TYPE_OF_KIND = {kind: number for number, kind in KIND_OF_TYPE.items()}
NUM_CHOICES = 5
_CLIP_KEYS = ("video_uid", "clip_start", "clip_end", "clip_text", "narration_time", "tag_noun", "tag_verb")
_QUERY_KEYS = ("clip_text", "tag_noun", "tag_verb")


class EgoMcqError(DataError):
    """An EgoMCQ file that cannot be trusted; the message names the question."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question. query has the caption and tags asked for and the times of the right choice."""

    question_id: int
    kind: Kind
    query: ClipRecord
    choices: tuple[ClipRecord, ...]
    answer: int


def read_egomcq(path: StoragePath) -> list[Question]:
    """Reads an EgoMCQ JSON file, questions in order of their numbers.

    Raises EgoMcqError, naming the question, for a missing key, a type other than 1 or 2, not exactly five
    choices, an answer outside 0..4, unreadable times or tags, and a type that its video uids contradict.
    Negative clip starts are set to 0, as every public loader does.
    """
    if not path.is_file():
        raise EgoMcqError(f"no EgoMCQ file at {path}; `svitt clips` writes one from held-out videos")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EgoMcqError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise EgoMcqError(
            f"{path} holds a {type(value).__name__}, expected an object of questions '0', '1', ..."
        )
    questions = []
    for key, entry in value.items():
        if not key.isdecimal():
            raise EgoMcqError(f"{path}: question id {key!r} is not a number")
        try:
            questions.append(_question(int(key), entry))
        except (KeyError, TypeError, ValueError) as error:
            raise EgoMcqError(f"{path}: question {key}: {_reason(error)}") from error
    return sorted(questions, key=lambda question: question.question_id)


def build_egomcq(
    records: Sequence[ClipRecord],
    rng: random.Random,
    num_inter: int | None = None,
    num_intra: int | None = None,
) -> dict[str, Any]:
    """Builds questions from the clips of one annotation pass; returns EgoMCQ JSON, inter questions first.

    Every clip is the query of at most one inter and one intra question. Inter: four clips of four other
    videos. Intra: five consecutive clips of the video, the place of the query among them drawn. No two
    choices of a question share a caption, or all their tags. The place of the answer is balanced over 0..4.
    Limits of None: as many as the clips allow; a clip that allows no question is left out.
    """
    by_video: dict[str, list[ClipRecord]] = defaultdict(list)
    for record in records:
        by_video[record.video_uid].append(record)
    for clips in by_video.values():
        clips.sort(key=lambda record: (record.narration_s, record.clip_id))
    queries = [record for uid in sorted(by_video) for record in by_video[uid]]
    made: list[tuple[Kind, ClipRecord, list[ClipRecord]]] = []
    limits: dict[Kind, int | None] = {"inter": num_inter, "intra": num_intra}
    for kind, limit in limits.items():
        order = list(queries)
        rng.shuffle(order)
        count = 0
        for query in order:
            if limit is not None and count >= limit:
                break
            others = (
                _inter_others(query, by_video, rng)
                if kind == "inter"
                else _intra_others(query, by_video, rng)
            )
            if others is not None:
                made.append((kind, query, others))
                count += 1
    return _with_answers(made, rng)


def probe_questions(
    questions: Iterable[Question], reversed_verbs: Sequence[tuple[int, int]]
) -> list[Question]:
    """Returns the intra questions with a distractor that has the query's reversed verb and a noun of it."""
    reverse = dict(reversed_verbs) | {second: first for first, second in reversed_verbs}
    return [item for item in questions if item.kind == "intra" and _has_reversed(item, reverse)]


def _has_reversed(question: Question, reverse: dict[int, int]) -> bool:
    wanted = {reverse[verb] for verb in question.query.verbs if verb in reverse}
    nouns = set(question.query.nouns)
    return any(
        wanted & set(choice.verbs) and nouns & set(choice.nouns)
        for index, choice in enumerate(question.choices)
        if index != question.answer
    )


def _are_distinct(clips: Sequence[ClipRecord]) -> bool:
    captions = {clip.caption for clip in clips}
    # Two wordings of one action are the same answer; without tags only the words can tell clips apart.
    tags = [(frozenset(clip.verbs), frozenset(clip.nouns)) for clip in clips if clip.verbs or clip.nouns]
    return len(captions) == len(clips) and len(set(tags)) == len(tags)


def _inter_others(
    query: ClipRecord, by_video: dict[str, list[ClipRecord]], rng: random.Random
) -> list[ClipRecord] | None:
    uids = [uid for uid in sorted(by_video) if uid != query.video_uid]
    rng.shuffle(uids)
    chosen = [query]
    for uid in uids:
        fitting = [clip for clip in by_video[uid] if _are_distinct([*chosen, clip])]
        if fitting:
            chosen.append(rng.choice(fitting))
        if len(chosen) == NUM_CHOICES:
            return chosen[1:]
    return None


def _intra_others(
    query: ClipRecord, by_video: dict[str, list[ClipRecord]], rng: random.Random
) -> list[ClipRecord] | None:
    clips = by_video[query.video_uid]
    place = next(index for index, clip in enumerate(clips) if clip.clip_id == query.clip_id)
    starts = list(range(max(0, place - NUM_CHOICES + 1), min(place, len(clips) - NUM_CHOICES) + 1))
    rng.shuffle(starts)
    for start in starts:
        window = clips[start : start + NUM_CHOICES]
        if _are_distinct(window):
            return [clip for clip in window if clip is not query]
    return None


def _with_answers(
    made: list[tuple[Kind, ClipRecord, list[ClipRecord]]], rng: random.Random
) -> dict[str, Any]:
    totals = Counter(kind for kind, _, _ in made)
    answers: dict[str, list[int]] = {}
    for kind, total in totals.items():
        answers[kind] = [index % NUM_CHOICES for index in range(total)]
        rng.shuffle(answers[kind])
    questions: dict[str, Any] = {}
    for kind, query, others in made:
        answer = answers[kind].pop()
        rng.shuffle(others)
        choices = [*others[:answer], query, *others[answer:]]
        questions[str(len(questions))] = {
            "answer": answer,
            "types": TYPE_OF_KIND[kind],
            "query": _clip_json(query),
            "choices": {str(index): _clip_json(clip) for index, clip in enumerate(choices)},
        }
    return questions


def _clip_json(clip: ClipRecord) -> dict[str, Any]:
    return {
        "video_uid": clip.video_uid,
        "clip_start": clip.start_s,
        "clip_end": clip.end_s,
        "clip_text": clip.caption,
        "narration_time": clip.narration_s,
        "tag_noun": str(list(clip.nouns)),
        "tag_verb": str(list(clip.verbs)),
    }


def _reason(error: Exception) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)


def _question(question_id: int, entry: dict[str, Any]) -> Question:
    if not isinstance(entry, dict):
        raise TypeError(f"is a {type(entry).__name__}, expected an object")
    kind = KIND_OF_TYPE.get(entry["types"]) if type(entry["types"]) is int else None
    if kind is None:
        raise ValueError(f"types is {entry['types']!r}, expected 1 (inter-video) or 2 (intra-video)")
    answer = entry["answer"]
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < NUM_CHOICES:
        raise ValueError(f"answer is {answer!r}, expected 0..{NUM_CHOICES - 1}")
    found = entry["choices"]
    places = [str(index) for index in range(NUM_CHOICES)]
    if not isinstance(found, dict) or sorted(found) != places:
        keys = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"choices has {keys}, expected exactly {places}")
    choices = tuple(_choice(found[place], place) for place in places)
    uids = {choice.video_uid for choice in choices}
    expected = NUM_CHOICES if kind == "inter" else 1
    if len(uids) != expected:
        raise ValueError(
            f"types is {TYPE_OF_KIND[kind]} ({kind}-video), so its choices should come from {expected} "
            f"video(s), but they come from {len(uids)}: {sorted(uids)}. 1 is inter-video, 2 is intra-video; "
            "a file with the two swapped must be corrected, not scored"
        )
    return Question(question_id, kind, _query(entry["query"], choices[answer]), choices, answer)


def _query(entry: dict[str, Any], right: ClipRecord) -> ClipRecord:
    _require_keys(entry, _QUERY_KEYS, "query")
    return make_record(
        right.video_uid,
        right.start_s,
        right.end_s,
        right.narration_s,
        str(entry["clip_text"]),
        _tags(entry["tag_verb"]),
        _tags(entry["tag_noun"]),
    )


def _choice(entry: dict[str, Any], place: str) -> ClipRecord:
    _require_keys(entry, _CLIP_KEYS, f"choice {place}")
    start_s, end_s, narration_s = (
        _seconds(entry[name], f"{name} of choice {place}")
        for name in ("clip_start", "clip_end", "narration_time")
    )
    return make_record(
        str(entry["video_uid"]),
        max(0.0, start_s),
        end_s,
        narration_s,
        str(entry["clip_text"]),
        _tags(entry["tag_verb"]),
        _tags(entry["tag_noun"]),
    )


def _require_keys(entry: Any, keys: Sequence[str], what: str) -> None:
    if not isinstance(entry, dict):
        raise TypeError(f"{what} is a {type(entry).__name__}, expected an object with {', '.join(keys)}")
    missing = [key for key in keys if key not in entry]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}")


def _seconds(value: Any, what: str) -> float:
    seconds = float(value) if isinstance(value, int | float | str) else math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"{what} is {value!r}, expected seconds")
    return seconds


def _tags(value: Any) -> tuple[int, ...]:
    """Takes a list of class numbers, as a list or as text."""
    if isinstance(value, list):
        return tuple(int(item) for item in value)
    return parse_tags(str(value))
