"""What is known of one checkpoint, gathered from its run directory; as tags it goes to MLflow and comes back.

The manifest stands for the files: its SHA-256 covers theirs. Nothing is verified against it here.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from infra.checkpoint_files import MANIFEST, STEP_FOLDER, CheckpointError, read_manifest, sha256_of
from infra.journal import read_journal
from infra.ledger import Ledger, StageState
from jobs.recipe import Recipe
from jobs.run_dir import RunDir
from jobs.summary import INTRA, SCORED_CHECKPOINTS
from pipeline.errors import ShardError
from pipeline.manifest import read_manifest as read_shard_manifest
from pipeline.storage import storage_path

INTRA_ACCURACY = f"{INTRA}_acc"
_VERSION = "version."
_UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """One checkpoint: where it lies, what it holds, what it came from, what it scored.

    `parent` is the checkpoint that its stage started from, empty for a first stage; `num_clips` those of the training
    shards, None where these are gone or hold other data by now; `is_stage_end` says that the stage ended with it.
    `scores` are metric names and numbers as the journal has them, empty for one that was not scored.
    """

    path: str
    run_dir: str
    run_id: str
    recipe: str
    stage: int
    stage_name: str
    step: int
    is_stage_end: bool
    manifest_sha256: str
    parent: str
    data_fingerprint: str
    num_clips: int | None
    shards: str
    recipe_hash: str
    commit: str
    is_dirty: str
    versions: Mapping[str, str]
    scores: Mapping[str, float]

    @property
    def key(self) -> str:
        """Tells this checkpoint from all others, also from one that took its place."""
        return f"{self.run_id}/stage-{self.stage}/step-{self.step:08d}/{self.manifest_sha256[:16]}"

    @property
    def title(self) -> str:
        return f"stage {self.stage} ({self.stage_name}), step {self.step}"

    @property
    def intra_accuracy(self) -> float | None:
        """EgoMCQ intra in percent."""
        return self.scores.get(INTRA_ACCURACY)

    def to_tags(self) -> dict[str, str]:
        """Texts, each under its name; what is no text as JSON."""
        return {
            name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            for name, value in asdict(self).items()
        }


_TEXTS = frozenset(field.name for field in fields(CheckpointFacts) if field.type in (str, "str"))


def facts_from_tags(tags: Mapping[str, str]) -> CheckpointFacts:
    """What `to_tags` made. Raises CheckpointError for tags that are not those of a checkpoint."""
    try:
        found: dict[str, Any] = {
            field.name: tags[field.name] if field.name in _TEXTS else json.loads(tags[field.name])
            for field in fields(CheckpointFacts)
        }
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"read a checkpoint from its tags in MLflow: {error!r}; expected those that a stage's end writes, see "
            "svitt champion RUN_DIR"
        ) from error
    return CheckpointFacts(**found)


def stage_checkpoints(run: RunDir, number: int) -> list[Path]:
    """Folders of the checkpoints that a stage keeps, in order of their steps; damaged ones included."""
    folder = run.checkpoints(number)
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name))


def run_of(checkpoint: Path) -> tuple[RunDir, int]:
    """The run directory and stage of a checkpoint's folder. Raises CheckpointError when it does not lie in one."""
    path = checkpoint.resolve()
    stage = path.parent.parent.name.removeprefix("stage-")
    if not STEP_FOLDER.fullmatch(path.name) or not stage.isdecimal() or len(path.parents) < 4:
        raise CheckpointError(
            f"{checkpoint} is no checkpoint of a run; expected RUN_DIR/stage-K/checkpoints/step-XXXXXXXX"
        )
    return RunDir(path.parents[2]), int(stage)


def read_facts(checkpoint: Path) -> CheckpointFacts:
    """Gathers what the run directory says of a checkpoint in it.

    Raises CheckpointError when its manifest is missing or damaged, ConfigError when its run has no recipe.
    """
    run, number = run_of(checkpoint)
    recipe, state = run.recipe(), Ledger(run.ledger_file).read()
    manifest, stage = read_manifest(checkpoint), state.stage(number)
    fingerprint = manifest.meta.get("data_fingerprint", _UNKNOWN)
    is_stage_end = stage.status == "done" and stage.facts.get("step") == manifest.step
    tags = _run_tags(run, round((checkpoint / MANIFEST).stat().st_mtime * 1000))
    return CheckpointFacts(
        path=str(checkpoint),
        run_dir=str(run.path),
        run_id=run.run_id,
        recipe=recipe.name,
        stage=number,
        stage_name=run.stage(number).name,
        step=manifest.step,
        is_stage_end=is_stage_end,
        manifest_sha256=sha256_of(checkpoint / MANIFEST),
        parent=state.stage(number - 1).facts.get("checkpoint", "") if number > 1 else "",
        data_fingerprint=fingerprint,
        num_clips=_num_clips(recipe, fingerprint),
        shards=recipe.data.shards,
        recipe_hash=manifest.meta.get("recipe_hash", _UNKNOWN),
        commit=tags.get("commit", _UNKNOWN),
        is_dirty=tags.get("is_dirty", _UNKNOWN),
        versions={k.removeprefix(_VERSION): v for k, v in tags.items() if k.startswith(_VERSION)},
        scores=_scores(stage, manifest.step, is_stage_end),
    )


def _scores(stage: StageState, step: int, is_stage_end: bool) -> Mapping[str, float]:
    if is_stage_end:
        return stage.facts.get("scores", {})
    return stage.facts.get(SCORED_CHECKPOINTS, {}).get(str(step), {})


def _run_tags(run: RunDir, time_ms: int) -> dict[str, str]:
    """Code and versions as they were at that time: a run may be continued by a newer commit."""
    records = [record for record in read_journal(run.journal(0))[0] if record.kind == "tags"]
    tags: dict[str, str] = {}
    for record in [r for r in records if r.time_ms <= time_ms] or records[:1]:
        tags |= record.values
    return tags


def _num_clips(recipe: Recipe, fingerprint: str) -> int | None:
    try:
        manifest = read_shard_manifest(storage_path(recipe.data.shards) / "train")
    except ShardError:
        return None
    return manifest.num_clips if manifest.fingerprint == fingerprint else None
