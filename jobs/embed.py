"""The `embed` verb: unit features of videos, clip by clip, or of sentences, as one table.

Frames are decoded and shrunk as in preparation, then squeezed to the model's square as in evaluation, without the JPEG
file between. A clip that cannot be decoded whole has no row: it is listed and counted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import UInt8
from torch import Tensor

from jobs.exported import ExportedModel, load_exported
from jobs.progress import ProgressReport
from pipeline.atomic import replaced_whole
from pipeline.decode import PyAvDecoder
from pipeline.errors import VideoError
from pipeline.frame_match import FrameFailure, FrameRequest
from pipeline.resize import FrameResizer, resize_frames
from pipeline.video import Chunk, VideoTimeline, midpoint_times, probe

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm")
MODEL_KEY = b"svitt_model_sha256"
_SENTENCES_AT_ONCE = 256


class EmbedError(Exception):
    """Nothing can be embedded, or embeddings cannot be read."""


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a video, [start_s, end_s) in seconds."""

    path: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A video or a piece of one without a row, and why. A whole video has no times."""

    path: str
    reason: str
    detail: str
    start_s: float | None = None
    end_s: float | None = None


@dataclass
class EmbeddedClips:
    """Spans, their features (N, P), and what could not be read."""

    spans: list[Span] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)


def embed(
    model_dir: Path,
    source: Path,
    output: Path,
    clip_s: float,
    batch_size: int,
    device: Literal["cpu", "cuda"],
    report: ProgressReport,
    stride_s: float | None = None,
) -> int:
    """Features of the videos in a folder (or of one video), or of the lines of a text file, to .parquet or .npy. Pieces
    of videos are `clip_s` long and begin every `stride_s` (default: end to end).

    Raises EmbedError for an output of another kind, an input without videos or sentences, and when not one clip could
    be read; ExportError for a folder that is no export.
    """
    if output.suffix not in (".parquet", ".npy"):
        raise EmbedError(f"--output is {output}; expected a name that ends in .parquet or .npy")
    if clip_s <= 0 or batch_size < 1:
        raise EmbedError(f"--clip-s is {clip_s}, --batch-size {batch_size}; both must be positive")
    stride_s = clip_s if stride_s is None else stride_s
    if not 0 < stride_s <= clip_s:
        raise EmbedError(f"--stride-s is {stride_s}; expected more than 0 and at most --clip-s, {clip_s}")
    if device == "cuda" and not torch.cuda.is_available():
        raise EmbedError("--device is cuda, and torch finds no GPU here; leave it out")
    videos = find_videos(source)
    model = load_exported(model_dir, torch.device(device))
    if videos is None:
        sentences = read_sentences(source)
        features = torch.cat(
            [
                model.encode_sentences(sentences[first : first + _SENTENCES_AT_ONCE])
                for first in range(0, len(sentences), _SENTENCES_AT_ONCE)
            ]
        )
        write_table(output, {"text": sentences}, features, model.digest)
        report.say(f"{len(sentences)} sentences in {output}")
        if model.tokenizer.num_truncated:
            report.say(
                f"{model.tokenizer.num_truncated} of them were cut to {model.tokenizer.max_length} tokens"
            )
        return 0
    with report.task("embed", len(videos)) as task:
        clips = embed_videos(model, videos, clip_s, stride_s, batch_size, task.advance)
    for lost in clips.unreadable:
        where = "" if lost.start_s is None else f", {lost.start_s:.2f} to {lost.end_s:.2f} s"
        report.say(f"unreadable: {lost.path}{where}: {lost.reason}: {lost.detail}")
    if not clips.spans:
        raise EmbedError(f"none of {len(videos)} videos in {source} could be read; see the reasons above")
    columns = {
        "path": [span.path for span in clips.spans],
        "start_s": [span.start_s for span in clips.spans],
        "end_s": [span.end_s for span in clips.spans],
    }
    write_table(output, columns, torch.cat(clips.features), model.digest)
    num_videos = len({span.path for span in clips.spans})
    report.say(
        f"{len(clips.spans)} clips of {num_videos} videos in {output}; "
        f"{len(clips.unreadable)} videos or clips unreadable"
    )
    return 0


def find_videos(source: Path) -> list[Path] | None:
    """Video files below a folder in order of name, or the one given; None for a file of another kind.

    Raises EmbedError when there is no such file, or the folder holds no video.
    """
    if source.is_dir():
        found = sorted(path for path in source.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
        if not found:
            raise EmbedError(f"no video below {source}; looked for {', '.join(VIDEO_SUFFIXES)}")
        return found
    if not source.is_file():
        raise EmbedError(f"there is no {source}; give a folder of videos, a video, or a text file")
    return [source] if source.suffix.lower() in VIDEO_SUFFIXES else None


def read_sentences(path: Path) -> list[str]:
    """Lines of a UTF-8 text file that are not blank. Raises EmbedError when there are none, or it is no text."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise EmbedError(f"{path} is neither a video file nor UTF-8 text: {error}") from error
    sentences = [line.strip() for line in lines if line.strip()]
    if not sentences:
        raise EmbedError(f"{path} holds no sentences; expected one a line")
    return sentences


def cut(path: Path, duration_s: float, clip_s: float, stride_s: float) -> list[Span]:
    """Pieces of `clip_s` that begin every `stride_s`, the last one at the latest half a stride before it would reach
    the end, to which it goes.
    """
    num_clips = max(1, int((duration_s - clip_s) / stride_s + 1.5))
    starts = [number * stride_s for number in range(num_clips)]
    ends = [start + clip_s for start in starts[:-1]] + [duration_s]
    return [Span(str(path), start, end) for start, end in zip(starts, ends, strict=True)]


def embed_videos(
    model: ExportedModel,
    videos: Sequence[Path],
    clip_s: float,
    stride_s: float,
    batch_size: int,
    advance: Callable[[], None] = lambda: None,
) -> EmbeddedClips:
    """Every piece of every video, in order, encoded `batch_size` at once. `advance` is called after each video."""
    result = EmbeddedClips()
    spans: list[Span] = []
    waiting: list[Tensor] = []

    def encode() -> None:
        if waiting:
            result.spans.extend(spans)
            result.features.append(model.encode_clips(torch.stack(waiting)))
            spans.clear()
            waiting.clear()

    for path in videos:
        for span, found in decode_spans(model, path, clip_s, stride_s):
            if isinstance(found, Unreadable):
                result.unreadable.append(found)
                continue
            assert span is not None
            spans.append(span)
            waiting.append(found)
            if len(waiting) == batch_size:
                encode()
        advance()
    encode()
    return result


def decode_spans(
    model: ExportedModel, path: Path, clip_s: float, stride_s: float
) -> Iterator[tuple[Span | None, UInt8[Tensor, "T C H W"] | Unreadable]]:
    """Pieces of one video with their frames as the model takes them, or why there are none."""
    try:
        header = probe(path, path.name)
    except VideoError as error:
        yield None, Unreadable(str(path), error.reason.value, error.detail)
        return
    if header.duration_s is None:
        yield None, Unreadable(str(path), "no_duration", "its header does not say how long it is")
        return
    video = model.model.config.video
    spans = cut(path, header.duration_s, clip_s, stride_s)
    times = [midpoint_times(span.start_s, span.end_s, video.num_frames) for span in spans]
    # A frame that overlapping pieces share is decoded once.
    ends = {time_s: span.end_s for span, of_span in zip(spans, times, strict=True) for time_s in of_span}
    requests = [FrameRequest(time_s, ends[time_s]) for time_s in sorted(ends)]
    timeline = VideoTimeline(path.name, None, (Chunk(str(path), 0.0, path.stat().st_size, ""),))
    resizer = FrameResizer(model.short_side)
    frames: dict[float, Tensor | FrameFailure] = {}
    waiting = 0
    # Requests are in order of time, so answers come in that order, and pieces are whole one after the other.
    for number, answer in PyAvDecoder().decode_frames(timeline, requests):
        now_s = requests[number].time_s
        if isinstance(answer, FrameFailure):
            frames[now_s] = answer
        else:
            (small,) = resizer.resize([answer.image])
            image = torch.from_numpy(np.ascontiguousarray(small))[None]
            frames[now_s] = resize_frames(image, video.image_size, video.image_size)[0].contiguous()
        while waiting < len(spans) and times[waiting][-1] <= now_s:
            yield spans[waiting], whole_piece(spans[waiting], [frames[time_s] for time_s in times[waiting]])
            waiting += 1
            first_s = times[waiting][0] if waiting < len(spans) else float("inf")
            frames = {time_s: frame for time_s, frame in frames.items() if time_s >= first_s}


def whole_piece(span: Span, frames: Sequence[Tensor | FrameFailure]) -> UInt8[Tensor, "T C H W"] | Unreadable:
    """The frames of a piece; where one could not be had, the first reason."""
    failure = next((frame for frame in frames if isinstance(frame, FrameFailure)), None)
    if failure is not None:
        return Unreadable(span.path, failure.reason.value, failure.detail, span.start_s, span.end_s)
    return torch.stack([frame for frame in frames if isinstance(frame, Tensor)])


def write_table(
    output: Path, columns: dict[str, list[str] | list[float]], features_NP: Tensor, digest: str
) -> None:
    """Columns and `feature` to Parquet, or to a structured array that `numpy.load` reads. Whole or not at all.

    Parquet also says from which weights the features are.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    features = features_NP.numpy().astype(np.float32)
    with replaced_whole(output) as partial:
        if output.suffix == ".parquet":
            flat = pa.array(features.reshape(-1), pa.float32())
            table = pa.table(
                {**columns, "feature": pa.FixedSizeListArray.from_arrays(flat, features.shape[1])},
                metadata={MODEL_KEY: digest.encode()},
            )
            pq.write_table(table, partial)
            return
        arrays = {name: np.asarray(values) for name, values in columns.items()}
        kinds = [(name, array.dtype) for name, array in arrays.items()]
        rows = np.empty(len(features), dtype=[*kinds, ("feature", np.float32, features.shape[1:])])
        for name, array in {**arrays, "feature": features}.items():
            rows[name] = array
        with partial.open("wb") as file:
            np.save(file, rows, allow_pickle=False)
