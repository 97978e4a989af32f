"""`svitt compare RUN RUN ...`: what differs between runs, what they scored, whether that is luck, what they cost.

The first run is what the others are held against. Scores are compared question by question where the answers of both
are kept and the questions are the same.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape
from rich.table import Table

from infra.durable import write_durably
from jobs.answers import ANSWERS_FILES, AnswersError, compare_answers, read_answers
from jobs.charts import Line, line_chart
from jobs.progress import ProgressReport
from jobs.run_dir import RunDir
from jobs.run_facts import RunFacts, flat_recipe, run_facts
from jobs.summary import INTER, INTRA, PROBE_ORDERED, interval
from model.paired_bootstrap import PairedDifference

# Of the provenance: what tells code and data apart.
_PROVENANCE = ("data_fingerprint", "commit", "is_dirty", "version.torch", "version.deepspeed")
_KINDS = (("inter", INTER), ("intra", INTRA))
# Where a run lies and what it is called differ always.
_NO_SETTINGS = ("name",)


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a text for each run. `group`: settings, data and code, scores, cost."""

    group: str
    label: str
    cells: tuple[str, ...]


def compare(
    paths: Sequence[Path], report: ProgressReport, html: Path | None = None, csv_file: Path | None = None
) -> int:
    """Prints the table; writes it as a page and as CSV where asked to. Raises ConfigError for what is no run."""
    runs = [run_facts(RunDir(path.resolve())) for path in paths]
    rows = comparison(runs)
    report.console.print(_table(runs, rows))
    if csv_file is not None:
        write_durably(csv_file, _csv(runs, rows))
        report.say(f"{csv_file}: the same as CSV")
    if html is not None:
        write_durably(html, _page(runs, rows))
        report.say(f"{html}: the same with curves, opens in any browser")
    return 0


def comparison(runs: Sequence[RunFacts]) -> list[Row]:
    """All rows, settings first; only what differs of settings, data and code."""
    return [*_settings(runs), *_provenance(runs), *_scores(runs), *_cost(runs)]


def _settings(runs: Sequence[RunFacts]) -> list[Row]:
    recipes = [flat_recipe(facts.recipe) for facts in runs]
    keys = sorted({key for recipe in recipes for key in recipe} - set(_NO_SETTINGS))
    rows = [Row("settings", key, tuple(recipe.get(key, "-") for recipe in recipes)) for key in keys]
    return [row for row in rows if len(set(row.cells)) > 1]


def _provenance(runs: Sequence[RunFacts]) -> list[Row]:
    rows = [
        Row(
            "data and code",
            name.replace("_", " "),
            tuple(facts.tags.get(name, "unknown")[:16] for facts in runs),
        )
        for name in _PROVENANCE
    ]
    return [row for row in rows if len(set(row.cells)) > 1]


def _scores(runs: Sequence[RunFacts]) -> list[Row]:
    rows = []
    for kind, name in _KINDS:
        if not any(f"{name}_acc" in facts.last.scores for facts in runs):
            continue
        label = f"EgoMCQ {kind}-video, %"
        rows.append(Row("scores", label, tuple(_score(facts, name) for facts in runs)))
        against = ["", *(_against(runs[0], facts, kind) for facts in runs[1:])]
        rows.append(Row("scores", f"  against {runs[0].name}", tuple(against)))
    if any(f"{PROBE_ORDERED}_acc" in facts.last.scores for facts in runs):
        rows.append(Row("scores", "temporal probe, %", tuple(_score(facts, PROBE_ORDERED) for facts in runs)))
    return rows


def _score(facts: RunFacts, name: str) -> str:
    scores = facts.last.scores
    return f"{interval(scores, name)} n {scores[f'{name}_n']:.0f}" if f"{name}_acc" in scores else "-"


def _against(first: RunFacts, other: RunFacts, kind: str) -> str:
    """The difference with its interval and p-value; why there is none, where there is none."""
    found = paired(first, other, kind)
    if isinstance(found, str):
        return found
    sure = "" if found.p_value < 0.05 else ", may be luck"
    span = f"[{found.interval_low:+.1f}, {found.interval_high:+.1f}]"
    return f"{found.difference:+.1f} {span}, p {found.p_value:.3f}{sure}"


def paired(first: RunFacts, other: RunFacts, kind: str) -> PairedDifference | str:
    """How much more often the other run is right than the first, on the same questions."""
    sheets = []
    for facts in (other, first):
        try:
            sheets.append(read_answers(facts.run.stage_dir(facts.last.number) / ANSWERS_FILES["dual"]))
        except AnswersError:
            return f"no answers of {facts.name}"
    try:
        return compare_answers(sheets[0], sheets[1], "inter" if kind == "inter" else "intra")
    except AnswersError:
        return "other questions"


def _cost(runs: Sequence[RunFacts]) -> list[Row]:
    def row(label: str, cells: Sequence[str]) -> Row:
        return Row("cost", label, tuple(cells))

    return [
        row("device hours", [f"{facts.device_hours:.2f}" for facts in runs]),
        row("clips a second, last stage", [_number(facts.stages[-1].clips_per_s, ".1f") for facts in runs]),
        row("memory of a rank, GiB", [_number(_peak(facts), ".2f") for facts in runs]),
        row("tokens of a clip at the end", [str(facts.last.tokens[1]) for facts in runs]),
        row("goodput", [f"{100 * facts.goodput.share:.0f} %" for facts in runs]),
    ]


def _peak(facts: RunFacts) -> float | None:
    return max((stage.peak_gib for stage in facts.stages if stage.peak_gib is not None), default=None)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(runs: Sequence[RunFacts], rows: Sequence[Row]) -> Table:
    table = Table(title="comparison", title_justify="left")
    table.add_column("", overflow="fold")  # folded, not cut: what differs must be readable at any width
    for facts in runs:
        table.add_column(facts.name, justify="right", overflow="fold")
    group = ""
    for row in rows:
        if row.group != group and group:
            table.add_section()
        group = row.group
        table.add_row(row.label, *row.cells)
    return table


def _csv(runs: Sequence[RunFacts], rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["group", "what", *(facts.name for facts in runs)])
    writer.writerows([row.group, row.label.strip(), *row.cells] for row in rows)
    return text.getvalue()


def _page(runs: Sequence[RunFacts], rows: Sequence[Row]) -> str:
    pages = Environment(
        loader=PackageLoader("jobs", "pages"), autoescape=select_autoescape(default=True), trim_blocks=True
    )
    charts = []
    for title, name, y_label in (
        ("Loss", "train/loss", "loss"),
        ("Contrastive term", "train/vtc", "loss"),
        ("Speed", "perf/clips_per_s", "clips a second"),
    ):
        lines = [Line(facts.name, _whole(facts, name)) for facts in runs]
        if any(line.points for line in lines):
            charts.append((title, line_chart(title, lines, "step of the run", y_label)))
    groups = [
        (group, [row for row in rows if row.group == group])
        for group in ("scores", "settings", "data and code", "cost")
    ]
    return pages.get_template("compare.html.j2").render(
        runs=runs,
        css=(resources.files("jobs") / "pages" / "base.css").read_text(),
        groups=[(group, found) for group, found in groups if found],
        charts=charts,
    )


def _whole(facts: RunFacts, name: str) -> list[tuple[float, float]]:
    """A metric over the steps of all stages."""
    points, begin = [], 0
    for stage in facts.stages:
        points += [(float(begin + step), value) for step, value in stage.curves.get(name, ())]
        begin += stage.status.num_steps or 0
    return points
