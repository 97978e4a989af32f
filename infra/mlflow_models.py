"""Checkpoints in MLflow: logged models of a run, versions of a registered model, and the aliases on them.

Everything is found again by a key in its tags, so every call may be made again after an answer was lost. Nothing is
pickled, and no file is sent but by `upload`: tags say where a checkpoint lies.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import LoggedModel as MlflowLoggedModel
from mlflow.entities import Metric
from mlflow.entities.model_registry import ModelVersion as MlflowModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from infra.mlflow_tracker import TrackingError

KEY = "svitt.key"
_MODEL_ID = "svitt.model_id"  # MLflow's SQL store does not keep which logged model a version is
_SQLITE = "sqlite:///"
_PAGE = 100


@dataclass(frozen=True, slots=True)
class LoggedModel:
    """One logged model. `scored` names the metrics that are linked to it; `place` is its folder in the artifact store,
    empty but for what was uploaded.
    """

    id: str
    experiment_id: str
    run_id: str
    place: str
    tags: Mapping[str, str]
    scored: frozenset[str]


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One version of a registered model."""

    name: str
    number: str
    model_id: str
    tags: Mapping[str, str]
    aliases: tuple[str, ...]


def open_client(uri: str) -> MlflowClient:
    """A client for reading. Raises TrackingError for an SQLite file that is not there: MLflow would make one."""
    if uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE)).is_file():
        raise TrackingError(
            f"opened {uri.removeprefix(_SQLITE)}: there is no such file; give the workspace of the runs (--workspace) "
            "or the address of their MLflow (--uri)"
        )
    with _asking("opening MLflow"):
        return MlflowClient(tracking_uri=uri)


class MlflowModels:
    """Logged models and the registry of one MLflow. Every method raises TrackingError where MLflow does not answer."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def ensure(
        self, key: str, name: str, experiment_id: str, run_id: str, params: Mapping[str, str]
    ) -> LoggedModel:
        """The run's logged model with this key, made if there is none. `params` are kept as they first were."""
        with _asking(f"logging the model {name!r}"):
            found = self._search([experiment_id], {KEY: key}, run_id)
            if not found:
                made = self._client.create_logged_model(experiment_id, name, run_id, {KEY: key}, dict(params))
                found = [made]
            if str(found[0].status) != "READY":  # also one whose maker was interrupted here
                self._client.finalize_logged_model(found[0].model_id, "READY")
            return _logged(found[0])

    def of_run(self, experiment_id: str, run_id: str) -> list[LoggedModel]:
        """All logged models of a run."""
        with _asking("listing logged models"):
            return [_logged(model) for model in self._search([experiment_id], {}, run_id)]

    def find(self, tags: Mapping[str, str]) -> LoggedModel | None:
        """A logged model of any experiment with these tags, the newest one."""
        with _asking("looking for a logged model"):
            experiments = [found.experiment_id for found in self._client.search_experiments()]
            models = self._search(experiments, tags)
            return _logged(max(models, key=lambda model: model.creation_timestamp)) if models else None

    def get(self, model_id: str) -> LoggedModel:
        """A logged model by its id."""
        with _asking(f"reading the logged model {model_id}"):
            return _logged(self._client.get_logged_model(model_id))

    def tag(self, model: LoggedModel, tags: Mapping[str, str]) -> None:
        """Adds or replaces tags; asks for nothing where all of them are so already."""
        changed = {name: value for name, value in tags.items() if model.tags.get(name) != value}
        if changed:
            with _asking(f"tagging the logged model {model.id}"):
                self._client.set_logged_model_tags(model.id, changed)

    def link_scores(self, model: LoggedModel, step: int, names: Sequence[str]) -> list[str]:
        """Links the run's own points of these metrics at `step` to the model. Returns the names that the run lacks yet.

        The same point is logged again under the model's id: a run keeps a point of the same time, step and value once.
        """
        missing, points = [], []
        with _asking(f"linking scores to the logged model {model.id}"):
            for name in names:
                if name in model.scored:
                    continue
                history = self._client.get_metric_history(model.run_id, name)
                point = next((metric for metric in reversed(history) if metric.step == step), None)
                if point is None:
                    missing.append(name)
                else:
                    points.append(
                        Metric(name, point.value, point.timestamp, step, model.id, run_id=model.run_id)
                    )
            if points:
                self._client.log_batch(model.run_id, metrics=points)
        return missing

    def upload(self, model: LoggedModel, files: Sequence[Path]) -> None:
        """Copies files into the model's folder in the artifact store."""
        with _asking(f"uploading {len(files)} files to {model.place}"):
            for file in files:
                self._client.log_model_artifact(model.id, str(file))

    def ensure_version(
        self, name: str, key: str, model: LoggedModel, tags: Mapping[str, str]
    ) -> tuple[ModelVersion, bool]:
        """The version with this key of a registered model, and whether it was made now; the registered model too."""
        with _asking(f"registering a version of {name!r}"):
            try:
                self._client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            known = self._client.search_model_versions(f"name = '{name}' and tags.`{KEY}` = '{key}'")
            if known:
                # Read by itself, a version has its aliases; found by a search, it has none.
                return _version(self._client.get_model_version(name, known[0].version)), False
            made = self._client.create_model_version(
                name,
                model.place,  # not models:/ID, which MLflow looks up in whatever store the process defaults to
                model.run_id,
                tags={KEY: key, _MODEL_ID: model.id, **tags},
                await_creation_for=0,
                model_id=model.id,
            )
            return _version(made), True

    def version(self, name: str, alias_or_number: str) -> ModelVersion | None:
        """A version by its number or an alias; None where there is none."""
        with _asking(f"reading {alias_or_number} of {name!r}"):
            try:
                if alias_or_number.isdecimal():
                    return _version(self._client.get_model_version(name, alias_or_number))
                return _version(self._client.get_model_version_by_alias(name, alias_or_number))
            except MlflowException as error:
                # A missing alias is told as an invalid parameter.
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                return None

    def names(self) -> list[str]:
        """Names of the registered models."""
        with _asking("listing registered models"):
            return sorted(model.name for model in self._client.search_registered_models())

    def set_alias(self, version: ModelVersion, alias: str) -> None:
        """Puts an alias on a version; it leaves the one that had it."""
        with _asking(f"moving the alias {alias} to version {version.number} of {version.name!r}"):
            self._client.set_registered_model_alias(version.name, alias, version.number)

    def tag_version(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        """Adds or replaces tags of a version."""
        with _asking(f"tagging version {version.number} of {version.name!r}"):
            for name, value in tags.items():
                self._client.set_model_version_tag(version.name, version.number, name, value)

    def _search(
        self, experiment_ids: list[str], tags: Mapping[str, str], run_id: str | None = None
    ) -> list[MlflowLoggedModel]:
        clauses = [f"tags.`{name}` = '{_quoted(value)}'" for name, value in tags.items()]
        if run_id is not None:
            clauses.append(f"source_run_id = '{run_id}'")
        found: list[MlflowLoggedModel] = []
        token: str | None = None
        while True:
            page = self._client.search_logged_models(
                experiment_ids, " AND ".join(clauses), max_results=_PAGE, page_token=token
            )
            found += page
            token = page.token
            if not token:
                return found


@contextmanager
def _asking(action: str) -> Iterator[None]:
    """Whatever MLflow or its transport raises becomes a TrackingError that says what was being done."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise TrackingError(f"{action} failed: {type(error).__name__}: {text}") from error


def _quoted(value: str) -> str:
    if "'" in value:
        raise ValueError(f"MLflow cannot be asked for {value!r}: rename what has the quote in its path")
    return value


def _logged(model: MlflowLoggedModel) -> LoggedModel:
    return LoggedModel(
        model.model_id,
        model.experiment_id,
        model.source_run_id or "",
        model.artifact_location,
        dict(model.tags),
        frozenset(metric.key for metric in model.metrics or ()),
    )


def _version(found: MlflowModelVersion) -> ModelVersion:
    return ModelVersion(
        found.name,
        str(found.version),
        found.tags.get(_MODEL_ID, ""),
        dict(found.tags),
        tuple(found.aliases),
    )
