"""A run directory with a recipe, and what a trained stage leaves in its ledger and journal."""

from pathlib import Path

from infra.config_io import dump_yaml
from infra.journal import Journal
from infra.ledger import Ledger
from jobs.recipe import load_recipe, resolve_paths
from jobs.run_dir import RunDir

# One stage of 2 frames and one of 4; frames of 4 x 4 patches, half of them kept once, then once more.
OVERRIDES = (
    "name=small",
    "prepare.num_frames=4",
    "loader.image_size=32",
    "model.video.image_size=32",
    "model.video.patch_size=8",
    "model.video.depth=3",
    "model.video.prune_layers=[0, 1]",
    "model.video.num_local_blocks=1",
    "model.video.num_random_blocks=2",
    "model.video.block_size=8",
    "stages.0.name=short",
    "stages.0.num_frames=2",
    "stages.0.keep_rate=0.5",
    "stages.0.num_steps=40",
    "stages.0.warmup_steps=0",
    "stages.0.global_batch_size=8",
    "stages.1.name=long",
    "stages.1.num_frames=4",
    "stages.1.keep_rate=0.5",
    "stages.1.num_steps=20",
    "stages.1.warmup_steps=0",
    "stages.1.global_batch_size=8",
    "stages.1.scene_companions=true",
)

SCORES = {
    "eval/egomcq/inter_video_acc": 71.25,
    "eval/egomcq/inter_video_low": 66.4,
    "eval/egomcq/inter_video_high": 75.6,
    "eval/egomcq/inter_video_n": 400.0,
    "eval/egomcq/intra_video_acc": 48.0,
    "eval/egomcq/intra_video_low": 42.5,
    "eval/egomcq/intra_video_high": 53.6,
    "eval/egomcq/intra_video_n": 300.0,
    "eval/temporal_probe/ordered_acc": 60.0,
    "eval/temporal_probe/ordered_low": 50.2,
    "eval/temporal_probe/ordered_high": 69.1,
    "eval/temporal_probe/ordered_n": 100.0,
    "eval/temporal_probe/shuffled_acc": 41.0,
    "eval/temporal_probe/shuffled_low": 31.9,
    "eval/temporal_probe/shuffled_high": 50.8,
    "eval/temporal_probe/shuffled_n": 100.0,
    "eval/egomcq/num_unreadable": 0.0,
}


def small_run(folder: Path, *overrides: str) -> RunDir:
    """The run directory of a two-stage recipe; nothing has been trained."""
    recipe = resolve_paths(load_recipe("demo", (*OVERRIDES, *overrides)), folder)
    run = RunDir(folder / "runs" / "small")
    run.path.mkdir(parents=True)
    run.recipe_file.write_text(dump_yaml(recipe))
    return run


def report_training(run: RunDir, number: int, losses: dict[int, float]) -> None:
    """Adds one interval per step and loss; clips/s is ten times the step, memory rises with it."""
    journal = Journal(run.journal(number))
    for step, loss in losses.items():
        values = {"train/loss": loss, "train/vtc": 1.0, "train/vtm": 0.5, "train/mlm": 2.0}
        values |= {"perf/clips_per_s": 10.0 * step, "mem/peak_rss_gib": step / 100, "perf/step_ms": 500.0}
        journal.metrics(step, values)
    journal.close()


def finish_stage(run: RunDir, number: int, num_steps: int, scores: dict[str, float] | None = None) -> None:
    """Marks a stage trained and done after one job."""
    ledger = Ledger(run.ledger_file)
    ledger.record_attempt(number, f"{run.run_id}-s{number}-a1")
    checkpoint = str(run.checkpoints(number) / f"step-{num_steps:08d}")
    ledger.record_stage(number, "trained", checkpoint=checkpoint, step=num_steps, num_steps=num_steps)
    ledger.record_stage(number, "done", scores=SCORES if scores is None else scores)
