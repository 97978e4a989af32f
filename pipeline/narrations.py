"""Reads Ego4D narration files and finds the verb and noun classes of a narration.

An Ego4D `narration.json` holds, per video, up to two annotation passes of timestamped texts ("#C C picks up
the cup"). Classes are found by matching the words of a text against a taxonomy and its synonyms. Nothing here
tags words by grammar: what no class matches gets no class.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.errors import DataError
from pipeline.storage import StoragePath

PASS_NAMES = ("narration_pass_1", "narration_pass_2")
# Stands for any words, also none, inside a synonym: "turn ... clockwise".
GAP = "..."


@dataclass(frozen=True, slots=True)
class Narration:
    """One timestamped text; index is its number within its pass."""

    index: int
    time_s: float
    text: str


@dataclass(frozen=True, slots=True)
class NarratedVideo:
    """All narrations of one video, per pass in time order. duration_s is None where the file does not say."""

    video_uid: str
    duration_s: float | None
    passes: Mapping[str, tuple[Narration, ...]]


@dataclass(frozen=True)
class Taxonomy:
    """Verb and noun classes; the position is the class id. Synonyms are listed per class name.

    reversed_verbs holds pairs of ids whose actions are each other played backwards; it may be empty.
    """

    verbs: tuple[str, ...]
    nouns: tuple[str, ...]
    reversed_verbs: tuple[tuple[int, int], ...] = ()
    verb_synonyms: Mapping[str, tuple[str, ...]] | None = None
    noun_synonyms: Mapping[str, tuple[str, ...]] | None = None

    @cached_property
    def _verb_patterns(self) -> list[re.Pattern[str]]:
        return [_pattern(name, self.verb_synonyms) for name in self.verbs]

    @cached_property
    def _noun_patterns(self) -> list[re.Pattern[str]]:
        return [_pattern(name, self.noun_synonyms) for name in self.nouns]

    def verb_ids(self, text: str) -> tuple[int, ...]:
        """Returns the verb classes named in a text, in order of appearance."""
        return _matches(self._verb_patterns, text)

    def noun_ids(self, text: str) -> tuple[int, ...]:
        """Returns the noun classes named in a text, in order of appearance."""
        return _matches(self._noun_patterns, text)

    def to_json(self) -> dict[str, Any]:
        """Returns what taxonomy.json holds."""
        return {
            "verbs": list(self.verbs),
            "nouns": list(self.nouns),
            "reversed_verbs": [list(pair) for pair in self.reversed_verbs],
            "verb_synonyms": {name: list(words) for name, words in (self.verb_synonyms or {}).items()},
            "noun_synonyms": {name: list(words) for name, words in (self.noun_synonyms or {}).items()},
        }


def read_taxonomy(path: StoragePath) -> Taxonomy:
    """Reads taxonomy.json: {"verbs": [...], "nouns": [...], "reversed_verbs": [[0, 1], ...]} and synonyms.

    `verb_synonyms` and `noun_synonyms` are optional: {"pick up": ["lift", "take"], ...}; "..." in a synonym
    stands for any words. Raises DataError for a missing key, a repeated class, or a pair that names no class.
    """
    value = _read_json(path, "taxonomy")
    names = {}
    for key in ("verbs", "nouns"):
        found = value.get(key)
        if not isinstance(found, list) or not found or not all(isinstance(item, str) for item in found):
            raise DataError(f"{path}: {key!r} is {_brief(found)}, expected a list of class names")
        repeated = sorted({name for name in found if found.count(name) > 1})
        if repeated:
            raise DataError(f"{path}: {key!r} names {repeated} twice; a class is named once")
        names[key] = tuple(found)
    pairs = value.get("reversed_verbs", [])
    for pair in pairs:
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(isinstance(item, int) for item in pair)
        if not is_pair or not all(0 <= item < len(names["verbs"]) for item in pair):
            raise DataError(
                f"{path}: reversed_verbs holds {_brief(pair)}, "
                f"expected two verb ids in 0..{len(names['verbs']) - 1}"
            )
    synonyms = {}
    for key, kind in (("verb_synonyms", "verbs"), ("noun_synonyms", "nouns")):
        found = value.get(key, {})
        unknown = sorted(set(found) - set(names[kind]))
        if unknown:
            raise DataError(f"{path}: {key} has {unknown}, which {kind!r} does not list")
        synonyms[key] = {name: tuple(words) for name, words in found.items()}
    return Taxonomy(names["verbs"], names["nouns"], tuple((a, b) for a, b in pairs), **synonyms)


def read_narrations(path: StoragePath) -> list[NarratedVideo]:
    """Reads an Ego4D narration.json, videos in file order.

    Videos without any pass (redacted, or never narrated) come back with empty passes, so that the caller can
    count them. Raises DataError with video and narration number when a timestamp or a text is unusable.
    """
    value = _read_json(path, "narrations")
    videos = value.get("videos")
    if not isinstance(videos, dict):
        raise DataError(
            f'{path}: "videos" is {_brief(videos)}, expected an object of video uids (Ego4D format)'
        )
    return [_narrated_video(path, uid, entry) for uid, entry in videos.items()]


def _narrated_video(path: StoragePath, uid: str, entry: Any) -> NarratedVideo:
    if not isinstance(entry, dict):
        raise DataError(f"{path}: video {uid} is {_brief(entry)}, expected an object with narration passes")
    passes = {}
    for name in PASS_NAMES:
        rows = (entry.get(name) or {}).get("narrations") or []
        narrations = []
        for index, row in enumerate(rows):
            try:
                time_s, text = float(row["timestamp_sec"]), row["narration_text"]
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{path}: video {uid}, {name}, narration {index} is {_brief(row)}, expected numbers in "
                    f"timestamp_sec and a text in narration_text ({type(error).__name__}: {error})"
                ) from error
            if not isinstance(text, str) or not math.isfinite(time_s):
                raise DataError(
                    f"{path}: video {uid}, {name}, narration {index}: timestamp_sec {time_s} and "
                    f"narration_text {_brief(text)}, expected a finite number and a text"
                )
            narrations.append(Narration(index, time_s, text))
        if narrations:
            passes[name] = tuple(sorted(narrations, key=lambda item: (item.time_s, item.index)))
    duration = entry.get("duration_sec")
    return NarratedVideo(uid, None if duration is None else float(duration), passes)


def _read_json(path: StoragePath, what: str) -> dict[str, Any]:
    if not path.exists():
        raise DataError(
            f"no {what} file at {path}; give the path of one, or run `svitt synth` to generate a world"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds {_brief(value)}, expected a JSON object")
    return value


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _pattern(name: str, synonyms: Mapping[str, tuple[str, ...]] | None) -> re.Pattern[str]:
    phrases = (name, *((synonyms or {}).get(name, ())))
    # The longest phrase first, so that the position of a match does not depend on the order of the file.
    return re.compile("|".join(_phrase(phrase) for phrase in sorted(phrases, key=len, reverse=True)))


def _phrase(phrase: str) -> str:
    """Turns "turn ... clockwise" into an expression over words that stand between single spaces."""
    expression = ""
    for word in phrase.lower().split():
        expression += r"(?:[^ ]+ )*?" if word == GAP else f"(?:{_forms(word)}) "
    return f"(?<= ){expression}"


def _forms(word: str) -> str:
    """Lists the regular forms of a word: picks, picked, picking, boxes, moving, carries."""
    forms = [word, word + "s", word + "es", word + "ed", word + "ing"]
    if word.endswith("e"):
        forms += [word + "d", word[:-1] + "ing"]
    if word.endswith("y"):
        forms += [word[:-1] + "ies", word[:-1] + "ied"]
    return "|".join(re.escape(form) for form in forms)


def _matches(patterns: list[re.Pattern[str]], text: str) -> tuple[int, ...]:
    # Hyphens stay inside a word: "counter-clockwise" must not match "clockwise".
    words = " " + " ".join(re.findall(r"[a-z0-9]+(?:[-'][a-z0-9]+)*", text.lower())) + " "
    found = [
        (match.start(), index) for index, pattern in enumerate(patterns) if (match := pattern.search(words))
    ]
    return tuple(index for _, index in sorted(found))
