"""What MLflow is told of a run's checkpoints: logged models, versions of the registered model, and who is champion.

Everything follows from the run directory, so it can be done again at any time: at the end of each stage, by `svitt
champion`, or for a fresh MLflow. A version is judged once. Answers to EgoMCQ are kept at the ends of stages, so only
these can become champion.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from infra.checkpoint_files import MANIFEST, WEIGHTS, WEIGHTS_CARD, CheckpointError
from infra.config_io import ConfigError
from infra.ledger import Ledger
from infra.mlflow_models import KEY, LoggedModel, MlflowModels, ModelVersion
from infra.mlflow_tracker import MlflowRuns, TrackingError
from jobs.answers import ANSWERS_FILES, AnswersError, AnswerSheet, compare_answers, read_answers
from jobs.checkpoint_facts import (
    INTRA_ACCURACY,
    CheckpointFacts,
    facts_from_tags,
    read_facts,
    stage_checkpoints,
)
from jobs.progress import ProgressReport
from jobs.run_dir import RunDir
from jobs.tracking import open_mlflow, stage_runs
from model.paired_bootstrap import CONFIDENCE

logger = logging.getLogger(__name__)

CHAMPION, LATEST_STAGE = "champion", "latest-stage"
# Tags beside those of CheckpointFacts: what became of the files, and where a copy of the weights is; of a version, when
# its stage ended, and how it was judged against the champion of its time.
FILES, UPLOADED, ENDED_AT, VERDICT = "files", "uploaded", "ended_at", "verdict"
# In the ledger: versions that were made champion by hand.
CROWNED = "crowned"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a candidate takes the champion's place, and why."""

    moves: bool
    reason: str


def judge(candidate: CheckpointFacts, champion: CheckpointFacts | None) -> Verdict:
    """The better of two by EgoMCQ intra, question by question; the champion stays unless that is significant.

    The first checkpoint with answers becomes champion. Where the answers of the two cannot be paired, it stays.
    """
    if candidate.intra_accuracy is None:
        return Verdict(False, "it has no EgoMCQ intra score")
    try:
        own = _answers(candidate)
        if champion is None:
            return Verdict(True, f"the first one scored: EgoMCQ intra {candidate.intra_accuracy:.1f} %")
        found = compare_answers(own, _answers(champion), "intra")
    except AnswersError as error:
        return Verdict(False, f"it cannot be held against {_named(champion)}: {error}")
    is_better = found.difference > 0 and found.p_value < 1 - CONFIDENCE
    numbers = (
        f"EgoMCQ intra {found.difference:+.1f} points [{found.interval_low:+.1f}, {found.interval_high:+.1f}], p "
        f"{found.p_value:.4f}, {found.num_pairs} questions, against {_named(champion)}"
    )
    return Verdict(is_better, numbers if is_better else f"not significantly better: {numbers}")


def register_run(run: RunDir, runs: MlflowRuns, run_ids: Mapping[int, str]) -> list[str]:
    """Makes of the kept checkpoints of a run what MLflow lacks of them. Returns a line for each version and verdict.

    `run_ids`: MLflow's runs by number of the stage; stages without one are left for another time. May be called again
    whatever happened before. A damaged checkpoint is told and passed over. Raises TrackingError where MLflow fails.
    """
    models, said = MlflowModels(runs.client), []
    versions: dict[str, ModelVersion] = {}
    for number in sorted(run_ids):
        logged = _log_stage(models, runs.experiment_id, run_ids[number], run, number)
        state = Ledger(run.ledger_file).read()
        if state.stage(number).status != "done":
            continue
        ended_at = state.stage(number).status_times_s["done"]
        for facts, model in logged:
            if facts.is_stage_end or facts.scores:
                if run.recipe().tracking.upload_weights:
                    _upload(models, facts, model)
                versions[facts.key], lines = _register(models, facts, model, ended_at)
                said += lines
        for index, entry in enumerate(state.facts.get(CROWNED, ())):
            if entry["after"] == number:
                said += _carry_out(models, versions.get(entry["key"]), index, entry)
    return said


def crown(run: RunDir, stage: int, reason: str) -> None:
    """Has the checkpoint at the end of a stage made champion by hand, by the next `register_run`.

    It stands in the ledger, after which stage it came too, so that a fresh MLflow ends with the same champion. Raises
    ConfigError when the stage is not done.
    """
    run.stage(stage)
    ledger = Ledger(run.ledger_file)
    state = ledger.read()
    if state.stage(stage).status != "done":
        raise ConfigError(
            str(run.path),
            [f"stage {stage} is {state.stage(stage).status}: only a finished one can be champion"],
        )
    facts = read_facts(Path(state.stage(stage).facts["checkpoint"]))
    entry = {"key": facts.key, "reason": reason, "after": newest_done(run)}
    ledger.record_run(**{CROWNED: [*state.facts.get(CROWNED, ()), entry]})


def show_champion(run: RunDir, stage: int | None, reason: str | None, report: ProgressReport) -> int:
    """Tells MLflow what it lacks of a run's checkpoints, and who is champion; with a reason, makes a stage champion.

    Raises ConfigError when no such stage is done, TrackingError when MLflow fails or has no run of it yet.
    """
    number = newest_done(run) if stage is None else stage
    if reason is not None:
        crown(run, number, reason)
    recipe = run.recipe()
    run_ids = stage_runs(Ledger(run.ledger_file).read())
    if number not in run_ids:
        raise TrackingError(f"MLflow has no run of stage {number} of {run.path} yet; svitt resume makes it")
    runs = open_mlflow(recipe)
    for line in register_run(run, runs, run_ids):
        report.say(line)
    champion = MlflowModels(runs.client).version(recipe.name, CHAMPION)
    if champion is None:
        report.say(f"{recipe.name} has no champion")
    else:
        report.say(f"champion of {recipe.name}: version {champion.number}, {champion.tags['checkpoint']}")
    return 0


def newest_done(run: RunDir) -> int:
    """The newest stage that is done. Raises ConfigError when there is none."""
    state = Ledger(run.ledger_file).read()
    done = [number for number, stage in state.stages.items() if stage.status == "done"]
    if not done:
        raise ConfigError(str(run.path), ["no stage is done yet; train one first: svitt resume"])
    return max(done)


def _log_stage(
    models: MlflowModels, experiment_id: str, run_id: str, run: RunDir, number: int
) -> list[tuple[CheckpointFacts, LoggedModel]]:
    """The logged models of a stage's checkpoints in order of steps; those of others are marked."""
    logged = []
    for path in stage_checkpoints(run, number):
        try:
            facts = read_facts(path)
        except CheckpointError as error:
            logger.warning("%s; it is not told to MLflow", error)
            continue
        logged.append((facts, _log_model(models, experiment_id, run_id, run, facts)))
    kept = {facts.key for facts, _ in logged}
    for model in models.of_run(experiment_id, run_id):
        if model.tags.get(KEY) not in kept:
            models.tag(model, {FILES: "gone"})
    return logged


def _log_model(
    models: MlflowModels, experiment_id: str, run_id: str, run: RunDir, facts: CheckpointFacts
) -> LoggedModel:
    params = {
        "step": str(facts.step),
        "stage": str(facts.stage),
        "recipe_hash": facts.recipe_hash,
        "data_fingerprint": facts.data_fingerprint,
    }
    name = f"{run.path.name}-{facts.stage}-{facts.stage_name}-step-{facts.step}"
    model = models.ensure(facts.key, name, experiment_id, run_id, params)
    models.tag(model, {**facts.to_tags(), FILES: "kept"})
    names = [score for score in facts.scores if score.endswith("_acc")]
    if missing := models.link_scores(model, facts.step, names):
        logger.info("%s: MLflow's run has no %s yet, linked another time", name, ", ".join(missing))
    return model


def _upload(models: MlflowModels, facts: CheckpointFacts, model: LoggedModel) -> None:
    if UPLOADED not in model.tags:
        models.upload(model, [Path(facts.path) / name for name in (WEIGHTS, WEIGHTS_CARD, MANIFEST)])
        models.tag(model, {UPLOADED: model.place})


def _register(
    models: MlflowModels, facts: CheckpointFacts, model: LoggedModel, ended_at: float
) -> tuple[ModelVersion, list[str]]:
    tags = {
        "checkpoint": facts.path,
        "stage": str(facts.stage),
        "step": str(facts.step),
        "manifest_sha256": facts.manifest_sha256,
        ENDED_AT: f"{ended_at:.3f}",
    }
    if facts.intra_accuracy is not None:
        tags[INTRA_ACCURACY] = f"{facts.intra_accuracy:.2f}"
    version, is_new = models.ensure_version(facts.recipe, facts.key, model, tags)
    said = [f"version {version.number} of {version.name}: {facts.title}"] if is_new else []
    if facts.is_stage_end:
        latest = models.version(facts.recipe, LATEST_STAGE)
        if latest is None or float(latest.tags[ENDED_AT]) < ended_at:
            models.set_alias(version, LATEST_STAGE)
    if VERDICT not in version.tags:
        said += _decide(models, version, _verdict(models, version, facts))
    return version, said


def _carry_out(
    models: MlflowModels, version: ModelVersion | None, index: int, entry: Mapping[str, str]
) -> list[str]:
    """Moves the alias by hand, once for each entry of the ledger."""
    if version is None:
        logger.warning("%s was made champion by hand, but its files are gone", entry["key"])
        return []
    done = f"{CROWNED}.{index}"
    if done in version.tags:
        return []
    said = _decide(models, version, Verdict(True, f"by hand: {entry['reason']}"))
    models.tag_version(version, {done: entry["reason"]})
    return said


def _verdict(models: MlflowModels, version: ModelVersion, facts: CheckpointFacts) -> Verdict:
    if not facts.is_stage_end:
        return Verdict(False, "its answers were not kept, which they are at the end of a stage")
    champion = models.version(version.name, CHAMPION)
    if champion is None:
        return judge(facts, None)
    if champion.number == version.number:
        return Verdict(True, "it was made so by a call whose end is not known")
    try:
        return judge(facts, facts_from_tags(models.get(champion.model_id).tags))
    except CheckpointError as error:
        return Verdict(False, f"it cannot be held against version {champion.number}: {error}")


def _decide(models: MlflowModels, version: ModelVersion, verdict: Verdict) -> list[str]:
    # The alias first: a verdict that is written counts as carried out.
    if verdict.moves:
        models.set_alias(version, CHAMPION)
    text = f"{'champion' if verdict.moves else 'not champion'}: {verdict.reason}"
    models.tag_version(version, {VERDICT: text})
    return [f"version {version.number} of {version.name} is {text}"]


def _answers(facts: CheckpointFacts) -> AnswerSheet:
    """Raises AnswersError also when another checkpoint of the stage has been scored since."""
    path = Path(facts.run_dir) / f"stage-{facts.stage}" / ANSWERS_FILES["dual"]
    sheet = read_answers(path)
    if sheet.facts.get("step") != facts.step:
        raise AnswersError(
            f"read {path}: these are the answers of step {sheet.facts.get('step')}, expected step {facts.step}; "
            "score it again"
        )
    return sheet


def _named(facts: CheckpointFacts | None) -> str:
    return "any champion" if facts is None else f"the champion, {facts.title} of {facts.run_dir}"
