"""`svitt report`: one page about one run that holds everything itself, readable without a network."""

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import torch
from jinja2 import Environment, PackageLoader, select_autoescape

from infra.checkpoint import Checkpoint, CheckpointStore
from infra.config_io import dump_yaml
from infra.durable import write_durably
from infra.ledger import Ledger
from infra.mlflow_tracker import TrackingError
from jobs.charts import Line, interval_chart, line_chart, share_bar
from jobs.evaluate import Encoder
from jobs.pictures import AskedQuestion, PrunedClip, asked_questions, edge_layout_uri, pruned_clips
from jobs.pretrain import open_store, open_tokenizer
from jobs.progress import ProgressReport
from jobs.run_dir import RunDir
from jobs.run_facts import RunFacts, StageFacts, run_facts
from jobs.summary import INTER, INTRA, PROBE_ORDERED, PROBE_SHUFFLED, interval
from jobs.tracking import fact_name, open_mlflow
from model.video_text_model import VideoTextModel
from model.weights import load_for_num_frames
from pipeline.manifest import read_manifest
from pipeline.questions import McqQuestion, read_questions
from pipeline.storage import storage_path

NUM_CLIPS, NUM_QUESTIONS_OF_A_KIND = 3, 2
REPORT_FILE = "report.html"
_LOSSES = ("loss", "vtc", "vtm", "mlm")


def write_report(run: RunDir, path: Path, report: ProgressReport, has_pictures: bool = True) -> int:
    """Writes the page; pictures need a checkpoint of the last stage and the prepared clips, and are left out, and said
    to be, where there is none.
    """
    facts = run_facts(run)
    clips: Sequence[PrunedClip] = ()
    questions: Sequence[AskedQuestion] = ()
    checkpoint = _last_checkpoint(facts) if has_pictures else None
    if checkpoint is not None and facts.recipe.data.egomcq is not None:
        clips, questions = _pictures(facts, *checkpoint)
    elif has_pictures:
        report.say("no checkpoint or no held-out clips: the page has no pictures of what the model looks at")
    page = render(facts, clips, questions)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, page)
    report.say(f"{path}: {len(page.encode()) / 2**20:.1f} MiB, opens in any browser")
    _keep_in_mlflow(run, page, report)
    return 0


def _keep_in_mlflow(run: RunDir, page: str, report: ProgressReport) -> None:
    """As report.html of the curriculum's MLflow run, in place of an older one; the page on disk needs no MLflow."""
    run_id = Ledger(run.ledger_file).read().facts.get(fact_name(0))
    if run_id is None:
        report.say("the run is not in MLflow yet, so the page is not either")
        return
    try:
        open_mlflow(run.recipe()).attach_text(run_id, REPORT_FILE, page)
    except TrackingError as error:
        report.say(f"the page is not in MLflow: {error}; write the report again when MLflow is back")
    else:
        report.say(f"also in MLflow: artifact {REPORT_FILE} of run {run_id}")


def render(facts: RunFacts, clips: Sequence[PrunedClip], questions: Sequence[AskedQuestion]) -> str:
    """The page as HTML text."""
    pages = Environment(
        loader=PackageLoader("jobs", "pages"), autoescape=select_autoescape(default=True), trim_blocks=True
    )
    manifest = read_manifest(storage_path(facts.recipe.data.shards) / "train")
    layouts = [
        (stage.title, _edges_note(facts, stage), uri)
        for stage in facts.stages
        if (uri := edge_layout_uri(facts.recipe.stage_model(stage.config).video)) is not None
    ]
    shown = [
        ("curriculum", "Curriculum"),
        ("curves", "Curves"),
        ("time", "Time and faults"),
        ("data", "Data"),
    ]
    shown += [("looks", "What the model looks at")] if clips else []
    shown += [("edges", "Blocks")] if layouts else []
    shown += [("questions", "Questions")] if questions else []
    return pages.get_template("report.html.j2").render(
        facts=facts,
        css=(resources.files("jobs") / "pages" / "base.css").read_text(),
        sections=[*shown, ("provenance", "Provenance")],
        tiles=_tiles(facts),
        rows=stage_rows(facts),
        score_charts=_score_charts(facts),
        curve_charts=_curve_charts(facts),
        time_chart=_time_chart(facts),
        faults=_faults(facts),
        num_clips=f"{manifest.num_clips:,}",
        num_shards=len(manifest.shards),
        num_rejected=manifest.num_rejected,
        rejected=sorted(manifest.rejected_by_reason.items()),
        clips=clips,
        layouts=layouts,
        questions=questions,
        provenance=_provenance(facts),
        recipe_text=dump_yaml(facts.recipe),
    )


def stage_rows(facts: RunFacts) -> list[tuple[str, list[str]]]:
    """The table of stages: label and one text for each stage."""
    columns: list[tuple[str, Callable[[StageFacts], str]]] = [
        ("status", lambda s: s.status.status),
        ("frames", lambda s: str(s.config.num_frames)),
        ("keep rate", lambda s: str(s.config.keep_rate)),
        ("tokens of a clip, before and after pruning", lambda s: f"{s.tokens[0]} / {s.tokens[1]}"),
        ("attention", lambda s: _edges_note(facts, s)),
        ("clips a step", lambda s: str(s.config.global_batch_size)),
        ("steps", lambda s: f"{s.status.saved_step} / {s.status.num_steps or '?'}"),
        ("loss at the end", lambda s: _last(s, "train/loss")),
        ("EgoMCQ inter-video", lambda s: _score(s, INTER)),
        ("EgoMCQ intra-video", lambda s: _score(s, INTRA)),
        ("temporal probe, in order", lambda s: _score(s, PROBE_ORDERED)),
        ("temporal probe, shuffled", lambda s: _score(s, PROBE_SHUFFLED)),
        ("clips a second", lambda s: f"{s.clips_per_s:.1f}" if s.clips_per_s else "-"),
        ("memory of a rank, predicted / measured", _memory),
        ("attempts", lambda s: str(s.status.attempts)),
    ]
    return [(label, [cell(stage) for stage in facts.stages]) for label, cell in columns]


def _tiles(facts: RunFacts) -> list[tuple[str, str]]:
    last = facts.last
    tiles = [
        ("stages done", f"{sum(s.status.status == 'done' for s in facts.stages)} of {len(facts.stages)}")
    ]
    for label, name in (("EgoMCQ inter-video, %", INTER), ("EgoMCQ intra-video, %", INTRA)):
        if f"{name}_acc" in last.scores:
            tiles.append((f"{label} (n {last.scores[f'{name}_n']:.0f})", f"{last.scores[f'{name}_acc']:.1f}"))
    tiles.append(("of a clip's patches reach the end", f"{100 * last.tokens[1] / last.tokens[0]:.0f} %"))
    tiles.append(("goodput", f"{100 * facts.goodput.share:.0f} %"))
    return tiles


def _score_charts(facts: RunFacts) -> list[tuple[str, str, str]]:
    series = {
        label: [
            (s.scores[f"{name}_acc"], s.scores[f"{name}_low"], s.scores[f"{name}_high"])
            for s in facts.stages
            if f"{name}_acc" in s.scores
        ]
        for label, name in (("inter-video", INTER), ("intra-video", INTRA))
    }
    series = {label: values for label, values in series.items() if values}
    if not series:
        return []
    groups = [
        f"{s.config.name}\n{s.config.num_frames} frames, {s.tokens[0]} to {s.tokens[1]} tokens"
        for s in facts.stages
        if s.scores
    ]
    title = "EgoMCQ against what is kept"
    note = "Percent of questions answered right, with 95 % intervals; five choices each."
    return [(title, note, interval_chart(title, groups, series, "% right", chance=20.0))]


def _curve_charts(facts: RunFacts) -> list[tuple[str, str, str]]:
    borders, begin = {}, 0
    offsets = {}
    for stage in facts.stages:
        offsets[stage.number] = begin
        borders[stage.config.name] = float(begin)
        begin += stage.status.num_steps or 0

    def whole(name: str) -> list[tuple[float, float]]:
        return [
            (offsets[s.number] + step, value) for s in facts.stages for step, value in s.curves.get(name, ())
        ]

    charts = []
    for title, note, y_label, names, factor in (
        ("Losses", "Their sum, and its three terms.", "loss", {f"train/{n}": n for n in _LOSSES}, 1.0),
        ("Gradient norm", "Before clipping.", "norm", {"train/grad_norm": "gradient norm"}, 1.0),
        ("Learning rate", "As scheduled.", "rate", {"train/learning_rate": "learning rate"}, 1.0),
        ("Speed", "Clips of all ranks a second.", "clips a second", {"perf/clips_per_s": "clips/s"}, 1.0),
        (
            "Memory of a rank",
            "The most so far, against the prediction.",
            "MiB",
            {"mem/peak_device_gib": "measured", "mem/predicted_device_gib": "predicted"},
            1024.0,
        ),
    ):
        lines = [Line(label, [(x, factor * y) for x, y in whole(key)]) for key, label in names.items()]
        name = next(iter(names))
        if any(line.points for line in lines):
            from_zero = name in ("perf/clips_per_s", "mem/peak_device_gib")
            charts.append((title, note, line_chart(title, lines, "step", y_label, borders, from_zero)))
    return charts


def _time_chart(facts: RunFacts) -> str | None:
    parts = {
        name.removesuffix("_s").replace("_", " "): getattr(facts.goodput, name)
        for name in facts.goodput.__dataclass_fields__
    }
    shown = {name: seconds for name, seconds in parts.items() if seconds >= 0.5}
    return share_bar("Where the time went", shown, "s") if shown else None


def _faults(facts: RunFacts) -> list[tuple[str, list[str]]]:
    names = facts.stages[0].status.faults
    rows = [(name.replace("_", " "), [str(s.status.faults[name]) for s in facts.stages]) for name in names]
    return [row for row in rows if set(row[1]) != {"0"}]


def _provenance(facts: RunFacts) -> list[tuple[str, str]]:
    known = [(name.replace("_", " "), value) for name, value in sorted(facts.tags.items()) if name != "drift"]
    saved = [(f"checkpoint of {s.title}", s.status.checkpoint) for s in facts.stages if s.status.checkpoint]
    return [*known, *saved]


def _edges_note(facts: RunFacts, stage: StageFacts) -> str:
    video = facts.recipe.stage_model(stage.config).video
    if video.is_dense:
        return "dense"
    return f"blocks of {video.block_size}: {video.num_local_blocks} local, {video.num_random_blocks} random"


def _last(stage: StageFacts, name: str) -> str:
    points = stage.curves.get(name, ())
    return f"{points[-1][1]:.3f}" if points else "-"


def _score(stage: StageFacts, name: str) -> str:
    return interval(stage.scores, name) if f"{name}_acc" in stage.scores else "-"


def _memory(stage: StageFacts) -> str:
    if stage.peak_gib is None or stage.predicted_gib is None:
        return "-"
    return f"{1024 * stage.predicted_gib:.0f} / {1024 * stage.peak_gib:.0f} MiB"


def _last_checkpoint(facts: RunFacts) -> tuple[StageFacts, Checkpoint] | None:
    for stage in reversed(facts.stages):
        found = CheckpointStore(facts.run.checkpoints(stage.number), rank=1).newest_good()
        if found is not None:
            return stage, found
    return None


def _pictures(
    facts: RunFacts, stage: StageFacts, checkpoint: Checkpoint
) -> tuple[list[PrunedClip], list[AskedQuestion]]:
    recipe, tokenizer = facts.recipe, open_tokenizer(facts.recipe)
    ids = {"pad_id": tokenizer.pad_id, "cls_id": tokenizer.cls_id, "mask_id": tokenizer.mask_id}
    config = recipe.stage_model(stage.config).replaced(text={"vocab_size": tokenizer.vocab_size, **ids})
    model = VideoTextModel(config).eval()
    load_for_num_frames(model, checkpoint.load_weights())
    encoder = Encoder(model, tokenizer, recipe.loader, recipe.evaluation.batch_size, torch.device("cpu"))
    with open_store(recipe, "egomcq") as store:
        questions = _chosen_questions(read_questions(store.shards_dir).questions)
        # Clips of different actions: the right answers of the questions shown, and some more.
        rows = store.rows_of([question.query_clip_id for question in questions])[:NUM_CLIPS].tolist()
        return pruned_clips(encoder, store, rows), asked_questions(encoder, store, questions)


def _chosen_questions(questions: Sequence[McqQuestion]) -> list[McqQuestion]:
    """Spread over the set, the same for every run on the same data."""
    chosen = []
    for kind in ("intra", "inter"):
        own = [question for question in questions if question.kind == kind]
        step = max(1, len(own) // NUM_QUESTIONS_OF_A_KIND)
        chosen += own[::step][:NUM_QUESTIONS_OF_A_KIND]
    return chosen
