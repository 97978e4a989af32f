"""`svitt lineage`: where a model comes from: alias, version, checkpoint, parents, data, code, settings, scores.

The run directory comes first, for its files are the checkpoint. Where they are gone, what MLflow was told of them
stands in, and that is said. Only manifests are read: weights are verified when they are loaded.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infra.checkpoint_files import STEP_FOLDER, CheckpointError
from infra.config_io import ConfigError
from infra.ledger import Ledger
from infra.mlflow_models import MlflowModels, ModelVersion, open_client
from infra.mlflow_tracker import TrackingError, sqlite_uri
from jobs.champion import VERDICT, newest_done
from jobs.checkpoint_facts import CheckpointFacts, facts_from_tags, read_facts, run_of
from jobs.progress import ProgressReport
from jobs.run_dir import RunDir
from jobs.summary import INTER, INTRA, PROBE_ORDERED, PROBE_SHUFFLED, interval
from jobs.tracking import tracking_uri

_SCORES = (
    ("EgoMCQ inter", INTER),
    ("EgoMCQ intra", INTRA),
    ("temporal probe in order", PROBE_ORDERED),
    ("temporal probe shuffled", PROBE_SHUFFLED),
)


class LineageError(Exception):
    """A model that cannot be found."""


@dataclass(frozen=True)
class Lineage:
    """`checkpoints` lead from the one asked for to that of the first stage; `version` is set where it was asked for by
    one. `broken` says what is no more as it was.
    """

    version: ModelVersion | None
    checkpoints: tuple[CheckpointFacts, ...]
    broken: tuple[str, ...]


@dataclass(frozen=True)
class Registry:
    """Which MLflow is asked, and for which registered model; None = the only one it has."""

    uri: str
    model: str | None = None

    def models(self) -> MlflowModels:
        """Raises TrackingError."""
        return MlflowModels(open_client(self.uri))

    def version(self, alias_or_number: str) -> ModelVersion:
        """Raises LineageError when there is none, or several registered models to choose from."""
        models = self.models()
        names = [self.model] if self.model is not None else models.names()
        if len(names) != 1:
            raise LineageError(
                f"looked for {alias_or_number!r}: there are {len(names)} registered models ({', '.join(names)}); name "
                "one with --model, or give a run directory or a checkpoint's folder"
            )
        version = models.version(names[0], alias_or_number)
        if version is None:
            raise LineageError(
                f"looked for {alias_or_number!r}: {names[0]} has no such alias or version, and there is no such folder"
            )
        return version


def show_lineage(
    target: str, workspace: Path, uri: str | None, model: str | None, report: ProgressReport, as_json: bool
) -> int:
    """Prints it in words or as JSON; 1 when something of it is no more. Raises as `lineage` does."""
    found = lineage(target, workspace, uri, model)
    if as_json:
        report.console.print_json(json.dumps(lineage_json(found)))
    else:
        for line in lineage_lines(found):
            report.say(line)
    return 1 if found.broken else 0


def lineage(target: str, workspace: Path, uri: str | None = None, model: str | None = None) -> Lineage:
    """`target`: an alias, a version's number, a checkpoint's folder, or a run directory (its newest finished stage).

    MLflow is asked for aliases, versions, and what is gone: at `uri`, by default where the run's recipe says, else the
    SQLite file of the workspace. Raises LineageError, TrackingError, or what is wrong with a run directory.
    """
    path = Path(target)
    checkpoint = None
    if (path / "recipe.yaml").is_file():
        run = RunDir(path.resolve())
        checkpoint = Ledger(run.ledger_file).read().stage(newest_done(run)).facts["checkpoint"]
    elif STEP_FOLDER.fullmatch(path.name):
        checkpoint = str(path.resolve())
    if checkpoint is not None:
        return _walk(None, None, checkpoint, Registry(uri or _uri_of(Path(checkpoint), workspace), model))
    registry = Registry(uri or sqlite_uri(workspace / "mlflow.db"), model)
    version = registry.version(target)
    told = facts_from_tags(registry.models().get(version.model_id).tags)
    return _walk(version, told, told.path, registry)


def lineage_lines(found: Lineage) -> list[str]:
    """One fact a line, checkpoints from the newest to the first."""
    lines = []
    if found.version is not None:
        aliases = f" ({', '.join(found.version.aliases)})" if found.version.aliases else ""
        lines.append(f"{found.version.name} version {found.version.number}{aliases}")
        if VERDICT in found.version.tags:
            lines.append(f"  {found.version.tags[VERDICT]}")
    for facts in found.checkpoints:
        lines += [
            f"{facts.title}, of run {Path(facts.run_dir).name}",
            f"  checkpoint {facts.path}, manifest {facts.manifest_sha256[:16]}",
            f"  recipe {facts.recipe}, hash {facts.recipe_hash[:16]}",
            f"  code {facts.commit[:16]}{' and changes not committed' if facts.is_dirty == 'True' else ''}; "
            + ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
            *(
                f"  {label} {interval(facts.scores, name)} (n {facts.scores[f'{name}_n']:.0f})"
                for label, name in _SCORES
                if f"{name}_acc" in facts.scores
            ),
        ]
    for fingerprint in dict.fromkeys(facts.data_fingerprint for facts in found.checkpoints):
        facts = next(f for f in found.checkpoints if f.data_fingerprint == fingerprint)
        clips = "unknown how many" if facts.num_clips is None else str(facts.num_clips)
        lines.append(f"data {fingerprint[:16]}: {clips} clips in {facts.shards}")
    return lines + [f"broken: {problem}" for problem in found.broken]


def lineage_json(found: Lineage) -> dict[str, Any]:
    """The same for a program."""
    version = None
    if found.version is not None:
        version = {
            "name": found.version.name,
            "number": found.version.number,
            "aliases": list(found.version.aliases),
            "verdict": found.version.tags.get(VERDICT),
        }
    return {
        "version": version,
        "checkpoints": [asdict(facts) for facts in found.checkpoints],
        "broken": list(found.broken),
    }


def _uri_of(checkpoint: Path, workspace: Path) -> str:
    try:
        return tracking_uri(run_of(checkpoint)[0].recipe())
    except (ConfigError, CheckpointError):
        return sqlite_uri(workspace / "mlflow.db")


def _walk(
    version: ModelVersion | None, told: CheckpointFacts | None, path: str, registry: Registry
) -> Lineage:
    """From one checkpoint to its parents; `told` is what MLflow has of the first one, where that was asked."""
    checkpoints: list[CheckpointFacts] = []
    broken: list[str] = []
    following = path
    while following:
        facts = _facts(following, told, registry, broken)
        if facts is None:
            break
        checkpoints.append(facts)
        if facts.num_clips is None:
            broken.append(f"{facts.shards}: not there, or other data than {facts.data_fingerprint[:16]}")
        if not facts.parent and facts.stage > 1:
            broken.append(f"{facts.run_dir}: its ledger does not say what stage {facts.stage} started from")
        told, following = None, facts.parent
    return Lineage(version, tuple(checkpoints), tuple(dict.fromkeys(broken)))


def _facts(
    path: str, told: CheckpointFacts | None, registry: Registry, broken: list[str]
) -> CheckpointFacts | None:
    try:
        facts = read_facts(Path(path))
    except (CheckpointError, ConfigError) as error:
        broken.append(" ".join(str(error).split()))
        return told or _told(path, registry, broken)
    if told is not None and told.manifest_sha256 != facts.manifest_sha256:
        broken.append(
            f"{path}: another checkpoint has taken its place, manifest {facts.manifest_sha256[:16]} instead of "
            f"{told.manifest_sha256[:16]}"
        )
        return told
    return facts


def _told(path: str, registry: Registry, broken: list[str]) -> CheckpointFacts | None:
    try:
        model = registry.models().find({"path": path})
        if model is not None:
            return facts_from_tags(model.tags)
        broken.append(f"{path}: MLflow knows nothing of it either")
    except (TrackingError, CheckpointError) as error:
        broken.append(f"{path}: MLflow could not be asked for it: {error}")
    return None
