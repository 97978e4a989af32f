"""Clips as columns: EgoClip's 3.8 million rows take some 0.4 GB here and ten times that as Python objects.

A table reads like a sequence of `ClipRecord`, which are made when asked for. Ids are not stored: they follow from the
other columns.
"""

import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, overload

import numpy as np
import pyarrow as pa
from jaxtyping import Float64, Int32, Int64

from pipeline.clip import ClipRecord, make_record, safe_name

_CAPTIONS_AT_ONCE = 1 << 16


class ClipTable(Sequence[ClipRecord]):
    """Clips in the order of their file. Built by `ClipTableBuilder`."""

    def __init__(self, table: pa.Table) -> None:
        # Kept in one piece, and only so: a second copy of the captions would be the largest part of a table.
        self._table = table.combine_chunks()
        self._video, self._caption, self._verbs, self._nouns = (
            self._column(name) for name in ("video", "caption", "verbs", "nouns")
        )
        self._start_s, self._end_s, self._narration_s, self._crc32 = (
            self._column(name).to_numpy() for name in ("start_s", "end_s", "narration_s", "crc32")
        )

    @staticmethod
    def of(records: Iterable[ClipRecord]) -> "ClipTable":
        """The table of some records; a table is returned as it is."""
        if isinstance(records, ClipTable):
            return records
        builder = ClipTableBuilder()
        for clip in records:
            builder.add(
                clip.video_uid,
                clip.start_s,
                clip.end_s,
                clip.narration_s,
                clip.caption,
                clip.verbs,
                clip.nouns,
            )
        return builder.build()

    def __len__(self) -> int:
        return self._table.num_rows

    @overload
    def __getitem__(self, place: int) -> ClipRecord: ...
    @overload
    def __getitem__(self, place: slice) -> "ClipTable": ...
    def __getitem__(self, place: int | slice) -> "ClipRecord | ClipTable":
        if isinstance(place, slice):
            return self._take(np.arange(len(self))[place])
        row = range(len(self))[place]
        return make_record(
            self._video[row].as_py(),
            float(self._start_s[row]),
            float(self._end_s[row]),
            float(self._narration_s[row]),
            self._caption[row].as_py(),
            tuple(self._verbs[row].as_py()),
            tuple(self._nouns[row].as_py()),
        )

    def __iter__(self) -> Iterator[ClipRecord]:
        return (self[row] for row in range(len(self)))

    @property
    def video_uids(self) -> list[str]:
        """Distinct uids, in order."""
        return list(self.clips_by_video())

    @property
    def video_codes(self) -> Int32[np.ndarray, " n"]:
        """One number a video, of every clip."""
        return self._video.indices.to_numpy()

    @property
    def narration_s(self) -> Float64[np.ndarray, " n"]:
        """Time of the narration of every clip, seconds."""
        return self._narration_s

    def clips_by_video(self) -> dict[str, tuple[int, float]]:
        """uid -> (number of clips, end of the last one in seconds), in order of uid."""
        codes = self.video_codes
        uids = self._video.dictionary.to_pylist()
        counts = np.bincount(codes, minlength=len(uids))
        ends = np.zeros(len(uids))
        np.maximum.at(ends, codes, self._end_s)
        return {
            uid: (int(count), float(end))
            for uid, count, end in sorted(zip(uids, counts, ends, strict=True))
            if count
        }

    def largest_tag(self, kind: Literal["verbs", "nouns"]) -> tuple[int, int]:
        """(largest class number, row of a clip that has it); (-1, -1) where no clip has one."""
        column = self._verbs if kind == "verbs" else self._nouns
        values = column.flatten().to_numpy()
        if not len(values):
            return -1, -1
        place = int(values.argmax())
        offsets = column.offsets.to_numpy()
        return int(values[place]), int(np.searchsorted(offsets - offsets[0], place, side="right")) - 1

    def in_order(self) -> "ClipTable":
        """Sorted by video uid, start, end and id; a table that is sorted is returned as it is."""
        names = np.asarray(self._video.dictionary.to_pylist(), dtype=object)
        rank = np.empty(len(names), dtype=np.int64)
        rank[np.argsort(names, kind="stable")] = np.arange(len(names))
        video = rank[self._video.indices.to_numpy()]
        order = np.lexsort((self._crc32, self._end_s, self._start_s, video))
        return self if (order == np.arange(len(self))).all() else self._take(order)

    def repeats(self) -> Int64[np.ndarray, " n"]:
        """Rows whose id stands in an earlier row, ascending."""
        names = {
            name: number for number, name in enumerate(map(safe_name, self._video.dictionary.to_pylist()))
        }
        video = np.asarray([names[safe_name(uid)] for uid in self._video.dictionary.to_pylist()], np.int64)
        # Milliseconds as they stand in ids: both roundings go to the even neighbour.
        start, end = (np.rint(seconds * 1000).astype(np.int64) for seconds in (self._start_s, self._end_s))
        keys = (self._crc32, end, start, video[self._video.indices.to_numpy()] if len(video) else video)
        order = np.lexsort(keys)
        is_same = np.ones(max(0, len(order) - 1), dtype=np.bool_)
        for key in keys:
            is_same &= np.diff(key[order].astype(np.int64)) == 0
        return np.sort(order[1:][is_same])

    def without(self, rows: Int64[np.ndarray, " n"]) -> "ClipTable":
        """All rows but these."""
        return self if not len(rows) else self._take(np.delete(np.arange(len(self)), rows))

    def _column(self, name: str) -> Any:
        column = self._table[name]
        return column.chunk(0) if column.num_chunks else column.combine_chunks()

    def _take(self, rows: np.ndarray) -> "ClipTable":
        return ClipTable(self._table.take(pa.array(rows)))


class ClipTableBuilder:
    """Takes clips one by one and keeps them as columns."""

    def __init__(self) -> None:
        self._code_of_uid: dict[str, int] = {}
        self._video, self._crc32 = array("i"), array("I")
        self._start_s, self._end_s, self._narration_s = array("d"), array("d"), array("d")
        self._verbs, self._nouns = _Lists(), _Lists()
        self._captions: list[str] = []
        self._caption_chunks: list[pa.Array] = []

    def __len__(self) -> int:
        return len(self._video)

    def add(
        self,
        video_uid: str,
        start_s: float,
        end_s: float,
        narration_s: float,
        caption: str,
        verbs: Sequence[int],
        nouns: Sequence[int],
    ) -> None:
        """Appends a clip; times are seconds."""
        self._video.append(self._code_of_uid.setdefault(video_uid, len(self._code_of_uid)))
        self._crc32.append(zlib.crc32(caption.encode()))
        self._start_s.append(start_s)
        self._end_s.append(end_s)
        self._narration_s.append(narration_s)
        self._verbs.append(verbs)
        self._nouns.append(nouns)
        self._captions.append(caption)
        if len(self._captions) == _CAPTIONS_AT_ONCE:
            self._flush_captions()

    def build(self) -> ClipTable:
        """The table of all clips so far."""
        self._flush_captions()
        uids = pa.array(list(self._code_of_uid), pa.string())
        columns = {
            "video": pa.DictionaryArray.from_arrays(pa.array(np.asarray(self._video, np.int32)), uids),
            "start_s": np.asarray(self._start_s, np.float64),
            "end_s": np.asarray(self._end_s, np.float64),
            "narration_s": np.asarray(self._narration_s, np.float64),
            "caption": pa.chunked_array(self._caption_chunks, pa.large_string()),
            "crc32": np.asarray(self._crc32, np.uint32),
            "verbs": self._verbs.build(),
            "nouns": self._nouns.build(),
        }
        return ClipTable(pa.table(columns))

    def _flush_captions(self) -> None:
        self._caption_chunks.append(pa.array(self._captions, pa.large_string()))
        self._captions = []


class _Lists:
    """A column of lists of class numbers."""

    def __init__(self) -> None:
        self._values, self._ends = array("i"), array("i", [0])

    def append(self, numbers: Sequence[int]) -> None:
        self._values.extend(numbers)
        self._ends.append(len(self._values))

    def build(self) -> pa.ListArray:
        ends, values = (pa.array(np.asarray(part, np.int32)) for part in (self._ends, self._values))
        return pa.ListArray.from_arrays(ends, values)
