"""Runs side by side: what differs, scores held against the first run, cost; as table, CSV and page."""

import csv
import io
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from small_runs import SCORES, finish_stage, report_training, small_run

from infra.config_io import ConfigError, dump_yaml
from jobs.answers import ANSWERS_FILES, Answer, write_answers
from jobs.compare import compare, comparison
from jobs.progress import ProgressReport
from jobs.run_dir import RunDir
from jobs.run_facts import run_facts

Report = tuple[ProgressReport, Callable[[], list[str]]]


def run_with(folder: Path, right: list[bool], *overrides: str) -> RunDir:
    """A run of two trained stages whose model was right on these intra questions."""
    run = small_run(folder, *overrides)
    for number, steps in ((1, 40), (2, 20)):
        report_training(run, number, {10: 5.0, steps: 4.0})
        finish_stage(run, number, steps)
    answers = [
        Answer(q, "intra", False, "a caption", ("a", "b"), (0.9, 0.1), 0, 0 if is_right else 1)
        for q, is_right in enumerate(right)
    ]
    write_answers(run.stage_dir(2) / ANSWERS_FILES["dual"], answers, {"stage": 2})
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[RunDir]:
    first = run_with(tmp_path / "a", [True] * 60 + [False] * 60)
    worse = run_with(tmp_path / "b", [False] * 120, "stages.1.keep_rate=0.9")
    return [first, worse]


def rows_of(runs: list[RunDir]) -> dict[str, tuple[str, ...]]:
    return {row.label: row.cells for row in comparison([run_facts(run) for run in runs])}


def test_only_settings_that_differ_are_shown(runs: list[RunDir]) -> None:
    shown = [row.label for row in comparison([run_facts(run) for run in runs]) if row.group == "settings"]
    data = [key for key in shown if key.startswith("data.")]
    assert [key for key in shown if key not in data] == ["stages.1.keep_rate"]
    assert rows_of(runs)["stages.1.keep_rate"] == ("0.5", "0.9")


def test_a_score_is_held_against_the_first_run_question_by_question(runs: list[RunDir]) -> None:
    rows = comparison([run_facts(run) for run in runs])
    labels = [row.label for row in rows]
    intra = rows[labels.index("EgoMCQ intra-video, %") + 1]
    assert intra.cells[0] == ""
    # 60 of 120 questions are right in the first run alone.
    assert intra.cells[1].startswith("-50.0 [")
    assert "luck" not in intra.cells[1]


def test_what_may_be_luck_is_called_so(tmp_path: Path) -> None:
    runs = [run_with(tmp_path / "a", [True, False, True]), run_with(tmp_path / "b", [True, True, True])]
    rows = comparison([run_facts(run) for run in runs])
    against = next(row for row in rows if row.label.startswith("  against") and "p" in row.cells[1])
    assert against.cells[1].endswith(", may be luck")


def test_without_answers_there_is_no_test_and_it_says_of_whom(runs: list[RunDir]) -> None:
    (runs[1].stage_dir(2) / ANSWERS_FILES["dual"]).unlink()
    rows = comparison([run_facts(run) for run in runs])
    assert any(row.cells[1] == "no answers of small" for row in rows)


def test_cost_and_scores_are_those_of_the_run(runs: list[RunDir]) -> None:
    rows = rows_of(runs)
    assert rows["EgoMCQ intra-video, %"][0] == "48.0 [42.5, 53.6] n 300"
    assert rows["tokens of a clip at the end"][0] == "16"
    assert SCORES["eval/egomcq/intra_video_acc"] == 48.0


class Tags(HTMLParser):
    """Counts what is open, and keeps what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [
            value
            for name, value in attrs
            if name in ("src", "href", "xlink:href") and value and not value.startswith(("#", "data:"))
        ]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_table_csv_and_page_hold_the_same(runs: list[RunDir], tmp_path: Path, report_lines: Report) -> None:
    report, lines = report_lines
    html, table = tmp_path / "out.html", tmp_path / "out.csv"
    assert compare([run.path for run in runs], report, html, table) == 0
    assert any("stages.1.keep_rate" in line and "0.9" in line for line in lines())
    rows = list(csv.reader(table.read_text().splitlines()))
    assert ["settings", "stages.1.keep_rate", "0.5", "0.9"] in rows
    page = html.read_text()
    tags = Tags()
    tags.feed(page)
    assert (tags.open, tags.fetched) == ([], [])
    assert "stages.1.keep_rate" in page


def test_nothing_is_cut_off_in_a_narrow_terminal(runs: list[RunDir]) -> None:
    output = io.StringIO()
    report = ProgressReport(Console(file=output, width=50, force_terminal=False))
    compare([run.path for run in runs], report)
    assert "…" not in output.getvalue()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, report_lines: Report) -> None:
    with pytest.raises(ConfigError, match="no run directory"):
        compare([tmp_path], report_lines[0])


def test_the_same_recipe_has_no_settings_to_show(tmp_path: Path) -> None:
    run = run_with(tmp_path / "a", [True])
    (tmp_path / "copy").mkdir()
    again = RunDir(tmp_path / "copy" / "again")
    again.path.mkdir()
    again.recipe_file.write_text(dump_yaml(run.recipe()))
    assert not [row for row in comparison([run_facts(run), run_facts(again)]) if row.group == "settings"]
