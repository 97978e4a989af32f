"""Runs whose stages have ended with checkpoints, scores and answers, as far as MLflow is told of them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from small_runs import SCORES, small_run
from stored_clips import write_set

from infra.checkpoint import CheckpointStore
from infra.journal import Journal
from infra.ledger import Ledger
from infra.mlflow_forwarder import JournalCopy
from infra.mlflow_tracker import MlflowRuns
from jobs.answers import ANSWERS_FILES, Answer, write_answers
from jobs.ranks import SingleRank
from jobs.run_dir import RunDir
from jobs.summary import SCORED_CHECKPOINTS
from jobs.tracking import fact_name
from pipeline.manifest import read_manifest

NUM_QUESTIONS = 40


def run_with_shards(folder: Path) -> tuple[RunDir, str]:
    """A run of two stages that has not begun, in a folder of its own, and the fingerprint of its data."""
    run = small_run(folder)
    shards = Path(run.recipe().data.shards) / "train"
    shards.mkdir(parents=True)
    fingerprint = read_manifest(write_set(shards)).fingerprint
    journal = Journal(run.journal(0))
    journal.tags({"commit": "c0ffee", "is_dirty": False, "version.torch": "2.13.0"})
    journal.close()
    return run, fingerprint


def save(run: RunDir, number: int, step: int, value: float = 0.0, keep_last: int = 2) -> Path:
    """A checkpoint of one weight."""
    store = CheckpointStore(run.checkpoints(number), keep_last=keep_last)
    fingerprint = read_manifest(Path(run.recipe().data.shards) / "train").fingerprint
    meta = {"data_fingerprint": fingerprint, "recipe_hash": "feed", "stage": number}
    store.save(
        step, lambda _: None, meta, {"w": torch.full((1,), value + step)}, {}, any_rank=SingleRank().any
    )
    store.wait(SingleRank().any)
    return store.path_of(step)


def intra_scores(num_right: int) -> dict[str, float]:
    """As they stand in the ledger; the interval is made up."""
    accuracy = 100 * num_right / NUM_QUESTIONS
    names = {"acc": accuracy, "low": accuracy - 10, "high": accuracy + 10, "n": float(NUM_QUESTIONS)}
    return {**SCORES, **{f"eval/egomcq/intra_video_{name}": value for name, value in names.items()}}


def end_stage(
    run: RunDir,
    number: int,
    step: int,
    num_right: int,
    scored: Sequence[tuple[int, int]] = (),
    first_id: int = 0,
) -> Path:
    """The stage is done at `step`, with the first `num_right` of 40 intra questions right; `scored` are other
    checkpoints, by step and number of right answers. Questions count from `first_id`.
    """
    path = save(run, number, step, keep_last=2)
    ledger, scores = Ledger(run.ledger_file), intra_scores(num_right)
    on_the_way = {str(at): intra_scores(right) for at, right in scored}
    journal = Journal(run.journal(number))
    for at, values in [*on_the_way.items(), (str(step), scores)]:
        journal.metrics(int(at), values)
        journal.saved(int(at))
    journal.close()
    answers = [
        Answer(first_id + k, "intra", False, "c", tuple("abcde"), (0.0,) * 5, 0, 0 if k < num_right else 1)
        for k in range(NUM_QUESTIONS)
    ]
    write_answers(run.stage_dir(number) / ANSWERS_FILES["dual"], answers, {"step": step})
    ledger.record_stage(
        number, "trained", checkpoint=str(path), step=step, **{SCORED_CHECKPOINTS: on_the_way}
    )
    ledger.record_stage(number, "done", scores=scores)
    return path


def forward(run: RunDir, number: int, runs: MlflowRuns) -> str:
    """The stage's run in MLflow with all of its points; its id."""
    run_id = runs.ensure(f"{run.run_id}-{number}", f"stage {number}")
    JournalCopy(run.journal(number), lambda outdated=None: (runs.client, run_id)).send()
    Ledger(run.ledger_file).record_run(**{fact_name(number): run_id})
    return run_id
