"""Runs of MLflow are found again, made of recorded facts, replaced and told apart."""

from pathlib import Path

import pytest

from infra.mlflow_tracker import DataInput, MlflowRuns, TrackingError, sqlite_uri


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> MlflowRuns:
    folder = tmp_path_factory.mktemp("mlflow")
    return MlflowRuns(sqlite_uri(folder / "mlflow.db"), "svitt-ego", folder / "artifacts")


def test_runs_are_found_again_by_key_id_and_parent(runs: MlflowRuns) -> None:
    parent = runs.ensure("demo", "curriculum", tags={"commit": "abc"})
    child = runs.ensure("demo/0", "stage 1", parent_run_id=parent)
    runs.finish(child, "FAILED")
    assert runs.ensure("demo/0", "stage 1", parent_run_id=parent) == child
    assert runs.ensure("demo/0", "stage 1", run_id=child) == child
    assert runs.ensure("demo/0", "stage 1", run_id="0" * 32) == child
    info = runs.client.get_run(child)
    assert info.info.status == "RUNNING"
    assert info.data.tags["mlflow.parentRunId"] == parent
    assert info.info.artifact_uri is not None
    assert info.info.artifact_uri.startswith("file:///")


def test_a_run_is_made_of_the_times_and_the_data_it_is_given(runs: MlflowRuns) -> None:
    data = DataInput("/shards/train", 40 * "a", 12)
    run_id = runs.ensure("times", "stage 1", start_ms=1000, data=data)
    assert runs.ensure("times", "stage 1", start_ms=9000, data=data) == run_id
    runs.finish(run_id, "KILLED", end_ms=5000)
    found = runs.client.get_run(run_id)
    assert (found.info.start_time, found.info.end_time, found.info.status) == (1000, 5000, "KILLED")
    (given,) = found.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("train", 36 * "a")
    assert (given.dataset.source, given.dataset.profile) == ('{"uri": "/shards/train"}', '{"num_clips": 12}')


def test_a_discarded_run_is_not_found_again_by_key_or_id(runs: MlflowRuns) -> None:
    first = runs.ensure("discarded", "stage 1")
    runs.discard(first)
    runs.discard(first)
    second = runs.ensure("discarded", "stage 1", run_id=first)
    assert second != first
    assert runs.client.get_run(first).info.lifecycle_stage == "deleted"


def test_a_run_created_twice_by_a_repeated_request_is_left_once(
    runs: MlflowRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = runs.client.create_run
    orphans: list[str] = []

    def create_twice(*arguments: object) -> object:
        orphans.append(create(*arguments).info.run_id)  # stored, but the answer was lost
        return create(*arguments)

    monkeypatch.setattr(runs.client, "create_run", create_twice)
    run_id = runs.ensure("twice", "stage 1")
    assert [runs.client.get_run(o).info.lifecycle_stage for o in orphans] == ["deleted"]
    assert runs.ensure("twice", "stage 1") == run_id


def test_a_text_is_kept_with_its_run(runs: MlflowRuns) -> None:
    run_id = runs.ensure("text", "curriculum")
    runs.attach_text(run_id, "recipe.yaml", "seed: 1\n")
    assert Path(runs.client.download_artifacts(run_id, "recipe.yaml")).read_text() == "seed: 1\n"


def test_an_unreachable_server_is_a_typed_error_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"opening MLflow at postgresql://\*\*\*@127.0.0.1:1/x failed"):
        MlflowRuns("postgresql://me:secret@127.0.0.1:1/x", "e", tmp_path)
