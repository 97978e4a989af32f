"""The page about a run: whole, self-contained, and telling what the run did."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import finish_stage, report_training, small_run
from test_compare import Tags
from trained_runs import trained_run

from infra.ledger import Ledger
from infra.mlflow_tracker import TrackingError
from jobs import report as report_module
from jobs.charts import Line, interval_chart, line_chart, share_bar
from jobs.pictures import dim_patches, edge_layout_uri, kept_masks
from jobs.progress import ProgressReport
from jobs.recipe import Recipe
from jobs.report import REPORT_FILE, write_report
from jobs.summary import NON_FINITE_STEPS
from jobs.tracking import fact_name, open_mlflow
from model.config import VideoConfig

Report = tuple[ProgressReport, Callable[[], list[str]]]


def page_of(path: Path) -> str:
    """The page, looked through: every tag closed, nothing fetched."""
    text = path.read_text()
    tags = Tags()
    tags.feed(text)
    assert (tags.open, tags.fetched) == ([], [])
    assert "<script" not in text
    return text


def test_a_page_shows_stages_faults_and_curves_and_fetches_nothing(
    tmp_path: Path, report_lines: Report
) -> None:
    run, _ = trained_run(tmp_path)
    report_training(run, 1, {10: 5.0, 40: 4.25})
    finish_stage(run, 1, 40)
    ledger = Ledger(run.ledger_file)
    ledger.record_stage(1, "done", **{NON_FINITE_STEPS: {"7": {"found": "nan", "clips": []}}})
    page = tmp_path / "page.html"
    assert write_report(run, page, report_lines[0], has_pictures=False) == 0
    text = page_of(page)
    for told in ("1 short", "48.0 [42.5, 53.6]", "4.250", "non finite steps", "Losses", "goodput"):
        assert told in text
    assert len(text) < 5 * 2**20
    assert '<h2 id="looks">' not in text


def test_a_run_that_has_not_begun_has_a_page_too(tmp_path: Path, report_lines: Report) -> None:
    run, _ = trained_run(tmp_path)
    page = tmp_path / "page.html"
    write_report(run, page, report_lines[0], has_pictures=False)
    assert "No faults" in page_of(page)


@pytest.fixture
def config() -> VideoConfig:
    return small_config()


def small_config() -> VideoConfig:
    return VideoConfig().model_copy(
        update={"num_frames": 2, "image_size": 8, "patch_size": 4, "prune_layers": (0, 1)}
    )


def test_masks_follow_the_positions_that_a_pruning_kept(config: VideoConfig) -> None:
    # 2 frames of 2 x 2 patches: positions 0 to 3 are the first frame, 4 to 7 the second, row by row.
    kept = (torch.tensor([[0, 3, 5, 6]]), torch.tensor([[3, 5]]))
    masks = kept_masks(config, kept, 0)
    assert masks[0].all()
    assert masks[1].tolist() == [[[True, False], [False, True]], [[False, True], [True, False]]]
    assert masks[2].tolist() == [[[False, False], [False, True]], [[False, True], [False, False]]]


def test_patches_that_are_gone_are_dimmed_and_the_others_stay() -> None:
    frames = np.full((1, 4, 4, 3), 100, dtype=np.uint8)
    dimmed = dim_patches(frames, np.array([[[True, False], [False, True]]]))
    assert dimmed[0, :2, :2].min() == 100
    assert dimmed[0, :2, 2:].max() == 18
    assert dimmed[0, 2:, 2:].min() == 100


def test_dense_attention_has_no_layout_to_show(config: VideoConfig) -> None:
    dense = config.model_copy(update={"num_random_blocks": None})
    assert edge_layout_uri(dense) is None


def test_charts_take_the_colour_of_the_page_and_keep_their_ids_apart() -> None:
    charts = [
        line_chart("Losses", [Line("loss", [(1, 2.0), (2, 1.0)])], "step", "loss", {"short": 0.0}),
        line_chart("Speed", [Line("clips/s", [(1, 5.0)])], "step", "clips/s"),
        interval_chart("Scores", ["a", "b"], {"intra": [(50.0, 40.0, 60.0), (55.0, 45.0, 65.0)]}, "%", 20.0),
        share_bar("Time", {"productive": 3.0, "start": 1.0}, "s"),
    ]
    ids: list[str] = []
    for chart in charts:
        assert chart.startswith("<svg")
        assert "currentColor" in chart
        assert "#010203" not in chart
        ids += [part.split('"')[0] for part in chart.split(' id="')[1:]]
    assert len(ids) == len(set(ids))


def test_the_same_chart_is_the_same_text() -> None:
    def draw() -> str:
        return line_chart("Losses", [Line("loss", [(1, 2.0)])], "step", "loss")

    assert draw() == draw()


def test_a_small_run_without_shards_is_said(tmp_path: Path, report_lines: Report) -> None:
    with pytest.raises(Exception, match=r"manifest"):
        write_report(small_run(tmp_path), tmp_path / "page.html", report_lines[0], has_pictures=False)
    assert not (tmp_path / "page.html").exists()


def test_a_page_is_kept_in_mlflow_in_place_of_an_older_one(tmp_path: Path, report_lines: Report) -> None:
    run, _ = trained_run(tmp_path)
    runs = open_mlflow(run.recipe())
    run_id = runs.client.create_run(runs.experiment_id).info.run_id
    Ledger(run.ledger_file).record_run(**{fact_name(0): run_id})
    page = tmp_path / "page.html"
    write_report(run, page, report_lines[0], has_pictures=False)
    report_training(run, 1, {10: 5.0})
    write_report(run, page, report_lines[0], has_pictures=False)
    assert Path(runs.client.download_artifacts(run_id, REPORT_FILE)).read_text() == page_of(page)


def test_a_page_is_written_where_mlflow_is_away(
    tmp_path: Path, report_lines: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(recipe: Recipe) -> None:
        raise TrackingError("nobody answers")

    run, _ = trained_run(tmp_path)
    Ledger(run.ledger_file).record_run(**{fact_name(0): "a run"})
    monkeypatch.setattr(report_module, "open_mlflow", refuse)
    assert write_report(run, tmp_path / "page.html", report_lines[0], has_pictures=False) == 0
    assert "not in MLflow: nobody answers; write the report again" in " ".join(report_lines[1]())
