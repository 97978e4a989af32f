"""A run in words and as a table, from a ledger and journals written here."""

from collections.abc import Callable
from pathlib import Path

from small_runs import SCORES, finish_stage, report_training, small_run

from infra.journal import Journal
from infra.ledger import Ledger
from jobs.progress import ProgressReport
from jobs.run_dir import RunDir
from jobs.summary import describe_scores, describe_stage, interval, planned_steps, stage_table
from pipeline.manifest import MANIFEST_FILE, Manifest

Report = tuple[ProgressReport, Callable[[], list[str]]]


def cells(run: RunDir, report_lines: Report) -> dict[str, list[str]]:
    """The printed table: label -> one text per stage."""
    report, lines = report_lines
    report.console.print(stage_table(run))
    rows = [line.strip()[1:-1].replace("┃", "│").split("│") for line in lines() if "│" in line or "┃" in line]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_a_stage_is_described_by_frames_tokens_edges_and_batch(tmp_path: Path) -> None:
    recipe = small_run(tmp_path).recipe()
    short, long = recipe.stages
    # 2 frames of 4 x 4 patches are 32 tokens, halved twice: 8.
    assert describe_stage(recipe, short) == (
        "2 frames, keep rate 0.5: 32 tokens a clip in, 8 out; blocks of 8 see 1 local + 2 random; 8 clips a step"
    )
    assert describe_stage(recipe, long) == (
        "4 frames, keep rate 0.5: 64 tokens a clip in, 16 out; blocks of 8 see 1 local + 2 random; "
        "8 clips a step with a companion of the same scene each"
    )


def test_dense_attention_is_called_so(tmp_path: Path) -> None:
    recipe = small_run(tmp_path, "model.video.num_random_blocks=null").recipe()
    assert "; dense attention; " in describe_stage(recipe, recipe.stages[0])


def test_scores_are_told_with_interval_and_number_of_questions() -> None:
    assert describe_scores({**SCORES, "eval/egomcq/num_unreadable": 2.0}) == (
        "EgoMCQ inter 71.2 [66.4, 75.6] (n 400); intra 48.0 [42.5, 53.6] (n 300); "
        "temporal probe 60.0 in order, 41.0 shuffled (n 100); 2 unreadable questions not scored"
    )


def test_what_was_not_scored_is_not_told() -> None:
    intra = {name: value for name, value in SCORES.items() if "intra" in name}
    assert describe_scores(intra) == "intra 48.0 [42.5, 53.6] (n 300)"
    assert describe_scores({}) == "Not scored: the recipe has no questions (data.egomcq)"
    assert interval(SCORES, "eval/egomcq/intra_video") == "48.0 [42.5, 53.6]"


def test_the_table_shows_a_finished_and_a_running_stage(tmp_path: Path, report_lines: Report) -> None:
    run = small_run(tmp_path)
    report_training(run, 1, {20: 5.0, 40: 4.5678, 30: 4.9})
    finish_stage(run, 1, 40)
    ledger = Ledger(run.ledger_file)
    ledger.record_attempt(2, "job-a1")
    ledger.record_attempt(2, "job-a2")
    ledger.record_stage(2, "running", step=10, num_steps=20, checkpoint="somewhere")
    table = cells(run, report_lines)
    assert table[""] == ["1 short", "2 long"]
    assert table["status"] == ["done", "running"]
    assert table["frames"] == ["2", "4"]
    assert table["keep rate"] == ["0.5", "0.5"]
    assert table["tokens a clip before / after"] == ["32 / 8", "64 / 16"]
    assert table["steps"] == ["40 / 40", "10 / 20"]
    assert table["loss"] == ["4.900", "-"]  # the newest line, not the largest step
    assert table["EgoMCQ inter %"] == ["71.2 [66.4, 75.6]  n 400", "-"]
    assert table["EgoMCQ intra %"] == ["48.0 [42.5, 53.6]  n 300", "-"]
    assert table["temporal probe % in order"] == ["60.0 [50.2, 69.1]  n 100", "-"]
    assert table["temporal probe % shuffled"] == ["41.0 [31.9, 50.8]  n 100", "-"]
    assert table["clips/s"] == ["300", "-"]  # the median of 200, 400, 300
    assert table["peak memory a rank"] == ["0.40 GiB", "-"]
    assert table["attempts"] == ["1", "2"]
    assert any("3 stage jobs in all: some stages were interrupted" in line for line in report_lines[1]())


def test_the_table_of_a_run_that_has_not_started_is_all_dashes(tmp_path: Path, report_lines: Report) -> None:
    table = cells(small_run(tmp_path), report_lines)
    assert table["status"] == ["pending", "pending"]
    assert table["steps"] == ["0 / 40", "0 / 20"]
    assert table["loss"] == table["EgoMCQ inter %"] == table["clips/s"] == ["-", "-"]
    assert not any("stage jobs in all" in line for line in report_lines[1]())


def test_steps_of_a_stage_in_epochs_are_unknown_until_it_has_saved(
    tmp_path: Path, report_lines: Report
) -> None:
    run = small_run(tmp_path, "stages.0.num_steps=null", "stages.0.num_epochs=2")
    assert cells(run, report_lines)["steps"] == ["0 / ?", "0 / 20"]


def test_a_kind_without_questions_has_a_dash(tmp_path: Path, report_lines: Report) -> None:
    """Inter questions need five held-out videos; a small set of one's own may have fewer."""
    run = small_run(tmp_path)
    finish_stage(run, 1, 40, {name: value for name, value in SCORES.items() if "inter" not in name})
    table = cells(run, report_lines)
    assert table["EgoMCQ inter %"] == ["-", "-"]
    assert table["EgoMCQ intra %"] == ["48.0 [42.5, 53.6]  n 300", "-"]


def test_steps_voided_by_a_restart_are_not_shown(tmp_path: Path, report_lines: Report) -> None:
    run = small_run(tmp_path)
    report_training(run, 1, {10: 6.0, 20: 5.0})
    Journal(run.journal(1), resume_step=10).close()
    assert cells(run, report_lines)["loss"] == ["6.000", "-"]


def test_epochs_become_steps_as_soon_as_there_are_shards(tmp_path: Path) -> None:
    recipe = small_run(tmp_path, "stages.0.num_steps=null", "stages.0.num_epochs=2").recipe()
    stage = recipe.stages[0]
    assert planned_steps(recipe, stage, {}) is None
    counts = {"num_clips": 43, "num_planned": 43, "num_rejected": 0, "repeated_frames": 0, "bytes": 1}
    widths = {"clips_with_repeated_frames": 0, "num_frames": 4, "num_verbs": 1, "num_nouns": 1}
    texts = {"name": "train", "fingerprint": "0", "shards": (), "files": {}, "settings": {}, "source": {}}
    shards = Path(recipe.data.shards) / "train"
    shards.mkdir(parents=True)
    manifest = Manifest(**counts, **widths, **texts, rejected_by_reason={}, taxonomy=None)
    (shards / MANIFEST_FILE).write_text(manifest.model_dump_json())
    # 43 clips are 5 batches of 8; what the ledger says counts more.
    assert planned_steps(recipe, stage, {}) == 10
    assert planned_steps(recipe, stage, {"num_steps": 12}) == 12
    assert planned_steps(recipe, recipe.stages[1], {}) == 20
