"""The `evaluate` verb: scores a stage's newest checkpoint again, in this process, without a cluster."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infra.checkpoint import Checkpoint, CheckpointStore
from infra.config_io import ConfigError
from infra.ledger import Ledger
from jobs.answers import ANSWERS_FILES, Answer, write_answers
from jobs.encoder import Encoder, HeldOutClips
from jobs.epic_mir import mir_lines, read_benchmark, score_multi_instance
from jobs.evaluate import MATCHED_INTER, MATCHED_INTRA, score_by_matching, score_questions
from jobs.memory_watch import open_budget
from jobs.pretrain import StageContext, open_store, open_tokenizer
from jobs.progress import ProgressReport
from jobs.ranks import SingleRank
from jobs.retrieval import TEXT_TO_VIDEO, VIDEO_TO_TEXT, score_retrieval
from jobs.run_dir import RunDir
from jobs.summary import describe_scores, interval
from jobs.sweep import SWEEP_FILE, Sweep, parse_axes, run_sweep, sweep_points
from model.metrics import RECALLS_AT
from model.video_text_model import VideoTextModel
from model.weights import load_for_num_frames
from pipeline.epic_retrieval import RetrievalSet
from pipeline.questions import read_questions
from pipeline.storage import storage_path
from pipeline.store import ClipStore


@dataclass(frozen=True)
class Extras:
    """What is scored beside EgoMCQ and the probe; each is another pass over the clips, a sweep one for each point.

    `epic_mir`: a set of shards of EPIC-KITCHENS-100's retrieval test clips, and the folder of its annotations.
    """

    retrieval: bool = False
    vtm: bool = False
    sweep: Sequence[str] = ()
    epic_mir: tuple[str, str] | None = None


def rescore(run: RunDir, stage: int | None, report: ProgressReport, extras: Extras | None = None) -> int:
    """Prints the scores of stage `stage` (default: the newest with a checkpoint), in words and as one JSON line, and
    writes the answers to its folder.

    Raises ConfigError when there is no such stage, no checkpoint to score, the recipe names no EgoMCQ file, or the
    sweep asked for is none; DataError and ShardError for files of `epic_mir` that cannot be used.
    """
    extras = extras or Extras()
    benchmark = read_benchmark(storage_path(extras.epic_mir[1])) if extras.epic_mir is not None else None
    recipe = run.recipe()
    axes = parse_axes(extras.sweep)
    number, checkpoint = _newest_checkpoint(run, stage, len(recipe.stages))
    if recipe.data.egomcq is None:
        raise ConfigError(str(run.recipe_file), ["data.egomcq is null: there are no questions to score"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Before any model is built: what is there when counting begins is not counted.
    budget = open_budget(device, None)[0] if axes else None
    context = StageContext(
        run, recipe, number, device, SingleRank(), open_tokenizer(recipe), Ledger(run.ledger_file)
    )
    with contextlib.ExitStack() as stores:
        store = stores.enter_context(open_store(recipe, "egomcq"))
        mir_store = None
        if extras.epic_mir is not None:  # now: what is wrong with it is told before anything is scored
            cache = (recipe.loader.cache_dir, recipe.loader.cache_gib)
            mir_store = stores.enter_context(ClipStore(extras.epic_mir[0], *cache))
        points = sweep_points(context.model_config(), axes, store.num_frames) if axes else []
        scoring = _Scoring(context, checkpoint, store, report)
        metrics = scoring.scores(extras)
        if mir_store is not None and benchmark is not None:
            metrics |= scoring.multi_instance(mir_store, benchmark)
        where = {"stage": number, "checkpoint": str(checkpoint.path)}
        report.say(json.dumps({**where, **metrics}))
        if points:
            sweep = Sweep(
                scoring.clips.encoder,
                checkpoint.load_weights(),
                recipe.inflation,
                store,
                scoring.mcq,
                recipe.evaluation.max_unreadable_share,
                budget,
            )
            run_sweep(sweep, points, scoring.facts, run.stage_dir(number) / SWEEP_FILE, report)
    return 0


def _newest_checkpoint(run: RunDir, stage: int | None, num_stages: int) -> tuple[int, Checkpoint]:
    if stage is not None:
        run.stage(stage)
    numbers = [stage] if stage is not None else list(range(num_stages, 0, -1))
    for number in numbers:
        checkpoint = CheckpointStore(run.checkpoints(number), rank=1).newest_good()
        if checkpoint is not None:
            return number, checkpoint
    raise ConfigError(
        str(run.path), [f"no checkpoint of stage {stage or 'any'} yet; train it first: svitt resume"]
    )


class _Scoring:
    """One checkpoint's model on the held-out clips, and where its scores go."""

    def __init__(
        self, context: StageContext, checkpoint: Checkpoint, store: ClipStore, report: ProgressReport
    ) -> None:
        recipe = context.recipe
        model = VideoTextModel(context.model_config()).to(context.device)
        load_for_num_frames(model, checkpoint.load_weights())
        encoder = Encoder(
            model, context.tokenizer, recipe.loader, recipe.evaluation.batch_size, context.device
        )
        self.clips = HeldOutClips(encoder, store, context.ranks)
        self.mcq = read_questions(store.shards_dir)
        self.facts: dict[str, Any] = {
            "run": context.run.run_id,
            "stage": context.number,
            "stage_name": context.stage.name,
            "checkpoint": Path(checkpoint.path).name,
            "step": checkpoint.step,
            "data_fingerprint": store.manifest.fingerprint,
        }
        self._context, self._checkpoint, self._report = context, checkpoint, report

    def scores(self, extras: Extras) -> dict[str, float]:
        """Scores, prints and writes what the recipe's own clips give, but for the sweep."""
        allowed = self._context.recipe.evaluation.max_unreadable_share
        evaluation = score_questions(self.clips, self.mcq, allowed)
        metrics = evaluation.metrics()
        self._write(evaluation.answers, "dual")
        head = f"stage {self.facts['stage']} ({self.facts['stage_name']}), {self.facts['checkpoint']}"
        self._report.say(f"{head}: {describe_scores(metrics)}")
        if extras.vtm:
            matched = score_by_matching(self.clips, self.mcq, allowed)
            self._write(matched.answers, "matching")
            metrics |= matched.metrics()
            self._report.say(_matching_in_words(metrics))
        if extras.retrieval:
            metrics |= score_retrieval(self.clips).metrics()
            for line in _retrieval_in_words(metrics):
                self._report.say(line)
        return metrics

    def multi_instance(self, store: ClipStore, benchmark: RetrievalSet) -> dict[str, float]:
        """Scores and prints EPIC-KITCHENS-100's retrieval."""
        clips = HeldOutClips(self.clips.encoder, store, self._context.ranks)
        allowed = self._context.recipe.evaluation.max_unreadable_share
        metrics = score_multi_instance(clips, benchmark, allowed).metrics()
        for line in mir_lines(metrics):
            self._report.say(line)
        return metrics

    def _write(self, answers: Sequence[Answer], mode: str) -> None:
        path = self._context.run.stage_dir(self._context.number) / ANSWERS_FILES[mode]
        write_answers(path, answers, {**self.facts, "mode": mode})


def _matching_in_words(metrics: Mapping[str, float]) -> str:
    parts = [
        f"{label} {interval(metrics, name)} (n {metrics[f'{name}_n']:.0f})"
        for label, name in (("inter", MATCHED_INTER), ("intra", MATCHED_INTRA))
        if f"{name}_acc" in metrics
    ]
    return "EgoMCQ by the matching head: " + "; ".join(parts)


def _retrieval_in_words(metrics: Mapping[str, float]) -> list[str]:
    lines = []
    for label, name in (("text to video", TEXT_TO_VIDEO), ("video to text", VIDEO_TO_TEXT)):
        recalls = ", ".join(
            f"R@{k} {metrics[f'{name}_r{k}']:.1f} "
            f"[{metrics[f'{name}_r{k}_low']:.1f}, {metrics[f'{name}_r{k}_high']:.1f}]"
            for k in RECALLS_AT
        )
        median, num = metrics[f"{name}_median_rank"], metrics[f"{name}_n"]
        lines.append(f"retrieval {label}: {recalls}, median rank {median:g} (n {num:.0f})")
    return lines
