"""Sparsity at test time: EgoMCQ of one checkpoint under other frames, keep rates and blocks, against what they cost."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.table import Table
from torch import Tensor

from infra.config_io import ConfigError
from infra.memory_budget import Budget
from infra.runtime import provenance
from jobs.encoder import Encoder, HeldOutClips
from jobs.evaluate import INTER, INTRA, score_questions
from jobs.progress import ProgressReport
from jobs.ranks import SingleRank
from jobs.summary import interval
from model.config import ModelConfig
from model.video_text_model import VideoTextModel
from model.weights import InflationRule, load_for_num_frames
from pipeline.atomic import write_text_atomically
from pipeline.questions import McqSet
from pipeline.store import ClipStore

FORMAT = 1
SWEEP_FILE = "sweep.json"
DENSE = "dense"
_NUMBERS: dict[str, type[int] | type[float]] = {
    "num_frames": int,
    "keep_rate": float,
    "num_local_blocks": int,
    "num_random_blocks": int,
    "block_size": int,
}
MIB = 2**20

Settings = dict[str, int | float | None]


@dataclass(frozen=True)
class SweepPoint:
    """One setting and the model that it makes. `settings` None: the model as it was trained."""

    settings: Settings | None
    model: ModelConfig


@dataclass(frozen=True)
class SweepResult:
    """`gmacs_video` and `gmacs_text` are billions of multiply-accumulates for one clip and one caption, by formula;
    `peak_bytes` is what tensors of the device held at most, weights included, None where it cannot be measured.
    `scores` are percent, intervals and counts under the names of the journal.
    """

    settings: Settings
    is_as_trained: bool
    tokens_in: int
    tokens_out: int
    gmacs_video: float
    gmacs_text: float
    peak_bytes: int | None
    scores: dict[str, float]


def parse_axes(texts: Sequence[str]) -> dict[str, tuple[int | float | None, ...]]:
    """`keep_rate=0.5,0.7` and the like, one setting each; `num_random_blocks=dense` is None. Raises ConfigError."""
    axes: dict[str, tuple[int | float | None, ...]] = {}
    problems = []
    for text in texts:
        name, separator, values = text.partition("=")
        if not separator or name not in _NUMBERS:
            problems.append(f"{text!r}: expected SETTING=VALUE,VALUE,... with one of {', '.join(_NUMBERS)}")
        elif name in axes:
            problems.append(f"{text!r}: {name} is given twice; give all its values in one --sweep")
        else:
            try:
                axes[name] = tuple(dict.fromkeys(_value(name, value.strip()) for value in values.split(",")))
            except ValueError as error:
                problems.append(f"{text!r}: {error}")
    if problems:
        raise ConfigError("--sweep", problems)
    return axes


def _value(name: str, text: str) -> int | float | None:
    if name == "num_random_blocks" and text == DENSE:
        return None
    try:
        return _NUMBERS[name](text)
    except ValueError:
        kind = "a whole number" if _NUMBERS[name] is int else "a number"
        dense = f" or {DENSE}" if name == "num_random_blocks" else ""
        raise ValueError(f"{text!r} is not {kind}{dense}") from None


def sweep_points(
    trained: ModelConfig, axes: Mapping[str, Sequence[int | float | None]], num_stored_frames: int
) -> list[SweepPoint]:
    """The trained model, then every combination of the values.

    Raises ConfigError that names each combination which is no model, or wants more frames than are stored.
    """
    points, problems = [SweepPoint(None, trained)], []
    for values in itertools.product(*axes.values()):
        settings: Settings = dict(zip(axes, values, strict=True))
        try:
            model = trained.replaced(video=settings)
        except ValidationError as error:
            faults = "; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())
            problems.append(f"{_in_words(settings)}: {faults}")
            continue
        if model.video.num_frames > num_stored_frames:
            problems.append(
                f"{_in_words(settings)}: the shards store {num_stored_frames} frames a clip; take at most so many"
            )
        if model != trained:
            points.append(SweepPoint(settings, model))
    if problems:
        raise ConfigError("--sweep", problems)
    return points


@dataclass(frozen=True)
class Sweep:
    """What all points share. `encoder` is that of the trained model; `budget` measures, None where nothing can."""

    encoder: Encoder
    weights: Mapping[str, Tensor]
    inflation: InflationRule
    store: ClipStore
    mcq: McqSet
    max_unreadable_share: float
    budget: Budget | None

    def score(self, point: SweepPoint) -> SweepResult:
        """Builds the model of a point, scores it, and lets it go."""
        before = 0
        if self.budget is not None:
            self.budget.reset_peak()
            before = self.budget.live_bytes()
        # On the device from the start: a copy on the host would count as device memory where the device is the CPU.
        with torch.device(self.encoder.device):
            model = VideoTextModel(point.model)
        load_for_num_frames(model, self.weights, self.inflation)
        encoder = Encoder(
            model, self.encoder.tokenizer, self.encoder.loader, self.encoder.batch_size, self.encoder.device
        )
        clips = HeldOutClips(encoder, self.store, SingleRank())
        evaluation = score_questions(clips, self.mcq, self.max_unreadable_share, with_probe=False)
        video, tokens = point.model.video, point.model.video.tokens_by_layer()
        gmacs = point.model.gmacs_per_clip(self.encoder.loader.text_length)
        return SweepResult(
            settings={name: getattr(video, name) for name in _NUMBERS},
            is_as_trained=point.settings is None,
            tokens_in=tokens[0],
            tokens_out=tokens[-1],
            gmacs_video=gmacs.video,
            gmacs_text=gmacs.text,
            peak_bytes=None if self.budget is None else self.budget.peak_bytes() - before,
            scores=evaluation.metrics(),
        )


def run_sweep(
    sweep: Sweep, points: Sequence[SweepPoint], facts: Mapping[str, Any], path: Path, report: ProgressReport
) -> list[SweepResult]:
    """Scores all points, prints their table and writes them with `facts` and the host to a JSON file.

    The settings of the last point are the columns of the table.
    """
    results = []
    with report.task("sweep", len(points)) as task:
        for point in points:
            results.append(sweep.score(point))
            task.advance(note=_in_words(point.settings))
    document = {
        "format": FORMAT,
        **facts,
        "device": str(sweep.encoder.device),
        "batch_size": sweep.encoder.batch_size,
        "host": provenance(),
        "points": [asdict(result) for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(document, indent=1) + "\n")
    report.console.print(sweep_table(results, list(points[-1].settings or {})))
    report.say(f"written to {path}")
    return results


def sweep_table(results: Sequence[SweepResult], swept: Sequence[str]) -> Table:
    """One row a point, with the values of the settings that were swept."""
    table = Table(title="EgoMCQ (percent, 95 % interval) against cost", title_justify="left")
    for column in ("", *swept, "tokens in / out", "GMACs a clip", "peak MiB"):
        table.add_column(column, justify="right", overflow="fold")
    for column in ("inter", "intra"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        values = (result.settings[name] for name in swept)
        scores = (
            interval(result.scores, name).replace(" [", "\n[") if f"{name}_acc" in result.scores else "-"
            for name in (INTER, INTRA)
        )
        table.add_row(
            "trained" if result.is_as_trained else "",
            *(DENSE if value is None else f"{value:g}" for value in values),
            f"{result.tokens_in} / {result.tokens_out}",
            f"{result.gmacs_video:.3g}",
            "-" if result.peak_bytes is None else f"{result.peak_bytes / MIB:.0f}",
            *scores,
        )
    return table


def _in_words(settings: Settings | None) -> str:
    if settings is None:
        return "as trained"
    return ", ".join(f"{name} {DENSE if value is None else value}" for name, value in settings.items())
