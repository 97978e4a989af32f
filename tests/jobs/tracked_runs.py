"""A run of two stages with a crash and a failed stage, played by the real journals, ledger and tracking."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient
from small_runs import SCORES, small_run

from infra.checkpoint_files import MANIFEST
from infra.journal import Journal
from infra.ledger import Ledger
from jobs.run_dir import RunDir
from jobs.tracking import RunTracking
from pipeline.manifest import build_manifest, write_manifest


class Clock:
    """Seconds since 1970, a hundredth further at every look."""

    def __init__(self) -> None:
        self.now_s = 1.7e9

    def __call__(self) -> float:
        self.now_s = round(self.now_s + 0.01, 3)
        return self.now_s


def tracked_run(folder: Path, *overrides: str) -> RunDir:
    """A run directory and the manifest of its clips; nothing has been trained."""
    run = small_run(folder, *overrides)
    shards = Path(run.recipe().data.shards) / "train"
    shards.mkdir(parents=True)
    manifest = build_manifest("train", (), {"num_frames": 4}, {}, None, (0, 0), {})
    write_manifest(shards, manifest.model_copy(update={"num_clips": 12}), ())
    return run


def train_stage(
    run: RunDir, ledger: Ledger, number: int, clock: Clock, steps: range, save_at: int | None = None
) -> None:
    """One start of a stage that reports every step from steps.start + 1 on and saves once."""
    generation = ledger.record_start(number, 1)
    journal = Journal(run.journal(number), steps.start, clock, generation)
    journal.params({"seed": 0, "num_frames": 2 * number})
    journal.tags({"device": "a processor"})
    for step in steps:
        journal.metrics(step + 1, {"train/loss": 1.0 / (step + 1 + generation), "perf/step_ms": 500.0})
        journal.flush()
        if step + 1 == save_at:
            checkpoint = run.checkpoints(number) / f"step-{save_at:08d}"
            checkpoint.mkdir(parents=True, exist_ok=True)
            (checkpoint / MANIFEST).write_text("{}")
            ledger.record_stage(number, "running", checkpoint=str(checkpoint), step=save_at)
            journal.saved(save_at)
    journal.close()


def play(run: RunDir, clock: Clock, between: Callable[[], None] = lambda: None) -> None:
    """Stage 1 crashes once and is done; a controller dies; stage 2 fails behind its checkpoint.

    `between` is called where MLflow may come and go.
    """
    ledger = Ledger(run.ledger_file, clock)
    with RunTracking(run, run.recipe(), ledger, clock) as tracking:
        tracking.follow_stage(1)
        ledger.record_attempt(1, "job-1")
        train_stage(run, ledger, 1, clock, range(6), save_at=4)
        between()
        train_stage(run, ledger, 1, clock, range(4, 8), save_at=8)
        ledger.record_stage(1, "done", scores=SCORES)
        tracking.finish_stage(1, "done")
    between()
    with RunTracking(run, run.recipe(), ledger, clock) as tracking:
        tracking.follow_stage(1)
        tracking.finish_stage(1, "done")
        tracking.follow_stage(2)
        ledger.record_attempt(2, "job-2")
        train_stage(run, ledger, 2, clock, range(5), save_at=3)
        ledger.record_stage(2, "failed", reason="RuntimeError: no")
        tracking.finish_stage(2, "failed")
        tracking.finish_run("failed")


def dump_runs(uri: str) -> dict[str, dict[str, Any]]:
    """All runs of a store by name, field by field.

    Left out is what a store makes up itself: ids of runs, experiments and data sets, places of artifacts, users. The
    parent's id is given by its name.
    """
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("svitt-ego")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    names = {run.info.run_id: run.info.run_name for run in runs}
    found = {}
    for run in runs:
        tags = dict(run.data.tags)
        if "mlflow.parentRunId" in tags:
            tags["mlflow.parentRunId"] = names[tags["mlflow.parentRunId"]]
        history = {
            name: [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
        }
        data = [
            (i.dataset.to_dictionary(), [(t.key, t.value) for t in i.tags]) for i in run.inputs.dataset_inputs
        ]
        artifacts = [
            Path(client.download_artifacts(run.info.run_id, artifact.path)).read_text()
            for artifact in client.list_artifacts(run.info.run_id)
        ]
        assert run.info.run_name not in found
        found[run.info.run_name] = {
            "status": run.info.status,
            "start_ms": run.info.start_time,
            "end_ms": run.info.end_time,
            "params": dict(run.data.params),
            "tags": tags,
            "latest": dict(run.data.metrics),
            "history": history,
            "data": data,
            "artifacts": artifacts,
        }
    return found
