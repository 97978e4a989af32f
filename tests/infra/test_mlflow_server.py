"""The team's server: who gets in, where things lie, and that nothing of it stays behind."""

import base64
import importlib.util
import json
import os
import shutil
import signal
import socket
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient

from infra import mlflow_server, postgres
from infra.mlflow_server import ServerError, Settings, main, run, running, start, stop
from infra.postgres import PostgresError, find_postgres


def missing() -> str | None:
    """Why the real server cannot be tested here."""
    packages = [
        name for name in ("psycopg2", "flask_wtf", "boto3", "moto") if not importlib.util.find_spec(name)
    ]
    if packages:
        return f"not installed: {', '.join(packages)} (extras server and dev)"
    try:
        find_postgres(Path())
    except PostgresError as error:
        return str(error)
    return None


REASON = missing()
needs_server = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def folder():
    """Not pytest's, which only root may enter where Postgres is another user's."""
    found = Path(tempfile.mkdtemp(prefix="svitt-server-"))
    found.chmod(0o711)
    yield found
    shutil.rmtree(found)


@pytest.fixture(scope="module")
def server(folder):
    settings = Settings(folder / "server", free_port(), None)
    yield settings, start(settings)
    stop(settings.folder)


@pytest.fixture
def client(server, monkeypatch):
    settings, found = server
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", found.user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", settings.password_file.read_text().strip())
    return MlflowClient(found.uri)


def processes_of(found) -> list[psutil.Process]:
    owner = psutil.Process(found.pid)
    return [owner, *owner.children(recursive=True)]


def require_gone(processes) -> None:
    end_s = time.monotonic() + 30
    while alive := [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < end_s, f"still there: {alive}"
        time.sleep(0.05)


def answer(url, user=None, password=None, host=None) -> int:
    request = urllib.request.Request(url)
    if user is not None:
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        request.add_header("Authorization", f"Basic {token}")
    if host is not None:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


@needs_server
def test_only_the_password_opens_it_and_only_under_its_own_name(server):
    settings, found = server
    password = settings.password_file.read_text().strip()
    url = f"{found.uri}/api/2.0/mlflow/experiments/get?experiment_id=0"
    assert answer(url) == 401
    assert answer(url, found.user, "password1234") == 401
    assert answer(url, found.user, password) == 200
    assert answer(url, found.user, password, host="evil.example") == 403


@needs_server
def test_it_listens_on_loopback_alone_and_its_secrets_are_its_owners(server):
    settings, found = server
    processes = processes_of(found)
    sockets = [c for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.ip for c in sockets} == {"127.0.0.1"}
    assert not [p for p in processes if p.name() == "postgres" and p.net_connections("inet")]
    password = settings.password_file.read_text().strip()
    assert len(password) >= 24
    assert not [p for p in processes if password in " ".join(p.cmdline())]
    for path in (settings.password_file, settings.folder / "session-key", settings.folder / "access.ini"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert settings.log("server").parent.stat().st_mode & 0o777 == 0o700
    assert not [log for log in settings.log("server").parent.iterdir() if password in log.read_text()]


@needs_server
def test_artifacts_go_through_the_server_into_the_store(server, client, tmp_path):
    import boto3

    _, found = server
    run_id = client.create_run(client.create_experiment("artifacts")).info.run_id
    client.log_text(run_id, "a fish", "notes/a.txt")
    assert client.get_run(run_id).info.artifact_uri.startswith("mlflow-artifacts:")
    assert Path(client.download_artifacts(run_id, "notes/a.txt", str(tmp_path))).read_text() == "a fish"
    environment = next(p.environ() for p in processes_of(found) if "mlflow" in p.cmdline())
    store = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id="throwaway",
        aws_secret_access_key="throwaway",
        region_name="us-east-1",
    )
    keys = [entry["Key"] for entry in store.list_objects_v2(Bucket="mlflow")["Contents"]]
    assert [key for key in keys if key.endswith(f"{run_id}/artifacts/notes/a.txt")]


@needs_server
def test_a_second_one_in_the_same_folder_or_on_the_same_port_is_refused(server, folder):
    settings, found = server
    with pytest.raises(ServerError, match=r"a server runs in .* already; stop it first"):
        start(replace(settings, port=free_port()))
    with pytest.raises(ServerError, match=rf"port {settings.port} of 127.0.0.1: Address already in use"):
        start(Settings(folder / "other", settings.port, None))
    assert running(settings.folder) == found


@needs_server
def test_what_was_tracked_outlives_stop_and_a_kill_and_no_process_does(server, client, capsys):
    settings, found = server
    client.create_experiment("kept")
    first = processes_of(found)
    assert main(["status", "--folder", str(settings.folder)]) == 0
    assert json.loads(capsys.readouterr().out)["uri"] == found.uri
    assert stop(settings.folder)
    require_gone(first)
    assert main(["status", "--folder", str(settings.folder)]) == 3

    again = start(settings)
    assert client.get_experiment_by_name("kept") is not None
    client.create_experiment("kept too")
    second = processes_of(again)
    os.kill(again.pid, signal.SIGKILL)
    require_gone(second)
    assert running(settings.folder) is None

    start(settings)
    assert client.get_experiment_by_name("kept too") is not None


@needs_server
def test_a_part_that_dies_takes_the_others_along(folder):
    settings = Settings(folder / "dying", free_port(), None)
    found = start(settings)
    processes = processes_of(found)
    try:
        next(p for p in processes if "moto.server" in p.cmdline()).kill()
        require_gone(processes)
        assert "store has ended by itself" in settings.log("server").read_text()
    finally:
        stop(settings.folder)


def test_a_folder_without_a_server_has_none_to_stop(tmp_path, capsys):
    assert main(["stop", "--folder", str(tmp_path)]) == 0
    assert "no server runs in" in capsys.readouterr().out
    assert main(["status", "--folder", str(tmp_path / "nowhere")]) == 3


def test_missing_packages_are_named_with_the_extra_that_has_them(tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_server, "_NEEDED", {"no_such_module": "no-such-package", "json": "json"})
    with pytest.raises(
        ServerError, match=r"needs no-such-package, not installed here; pip install .*\.\[server\]"
    ):
        run(Settings(tmp_path, 1, None))
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_postgres_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(postgres, "_INSTALLED", tmp_path / "none")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PostgresError, match="apt install postgresql"):
        find_postgres(tmp_path)


def test_the_newest_installed_postgres_is_taken_and_links_are_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(postgres, "_INSTALLED", tmp_path)
    for version in ("9", "15"):
        binaries = tmp_path / version / "bin"
        binaries.mkdir(parents=True)
        for name in ("initdb", "postgres"):
            (binaries / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", "")
    assert find_postgres(tmp_path / "data").binaries == tmp_path / "15" / "bin"
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "postgres").symlink_to(tmp_path / "9" / "bin" / "postgres")
    monkeypatch.setenv("PATH", str(tmp_path / "links"))
    found = find_postgres(tmp_path / "data")
    assert (found.binaries, found.user) == (tmp_path / "9" / "bin", None)


def test_root_needs_another_user_for_postgres(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(PostgresError, match="refuses to run as root, and there is no user 'nobody-at-all'"):
        find_postgres(tmp_path, "nobody-at-all")
    with pytest.raises(PostgresError, match="refuses to run as root, which 'root' is"):
        find_postgres(tmp_path, "root")


def test_a_folder_too_long_for_a_socket_is_refused_before_anything_is_made(tmp_path):
    data = tmp_path / ("x" * 100)
    with pytest.raises(PostgresError, match="too long a path for a Unix socket; choose a shorter folder"):
        postgres.Postgres(data, tmp_path).create()
    assert not data.exists()
