"""An MLflow server for a team: `python -m infra.mlflow_server start --folder F --artifacts s3://bucket/path`.

Postgres keeps what is tracked, an S3-compatible store the artifacts, which go through the server, so that only it needs
the store's keys. All of it listens on loopback and wants a password, made at the first start and kept in F/password.

    run      in the foreground, for a service manager; start does the same in the background and waits until it is up
    stop     ends it, and all it has started; so do SIGTERM, and, less gently, SIGKILL
    status   says whether it runs and where

Variables: AWS_ENDPOINT_URL (or MLFLOW_S3_ENDPOINT_URL), AWS_ACCESS_KEY_ID and their like are the store's;
MLFLOW_BACKEND_STORE_URI is a Postgres that runs already, instead of one of its own in F/postgres.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from infra.durable import write_durably
from infra.postgres import SCHEME, PostgresError, find_postgres
from infra.reaper import MARK_NAME

_HOST, ADMIN = "127.0.0.1", "admin"
_BUCKET = "mlflow"
_NO_LOG = "(?!)"  # the reaper goes by the mark alone: whoever reads a log of ours is not to be ended
_UP_S = 180.0  # a first start builds MLflow's tables
_NEEDED = {"psycopg2": "psycopg2-binary", "flask_wtf": "Flask-WTF", "boto3": "boto3"}
_DATABASE = "MLFLOW_BACKEND_STORE_URI"


class ServerError(Exception):
    """The server cannot be started or stopped."""


@dataclass(frozen=True)
class Settings:
    """`artifacts`: where artifacts go, None = a store in memory for tests; `allowed_hosts`: names under which a proxy
    in front of it is reached; `root_runs_as`: whom Postgres runs as when root starts it.
    """

    folder: Path
    port: int
    artifacts: str | None
    allowed_hosts: tuple[str, ...] = ()
    root_runs_as: str = "postgres"

    @property
    def uri(self) -> str:
        return f"http://{_HOST}:{self.port}"

    @property
    def password_file(self) -> Path:
        return self.folder / "password"

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"


@dataclass(frozen=True)
class Running:
    """A server that is up, as F/server.json has it."""

    pid: int
    uri: str
    user: str
    password_file: str
    artifacts: str


def start(settings: Settings) -> Running:
    """Starts it in the background and returns when it is up. Raises ServerError with the end of its log."""
    _prepare(settings)
    command = [sys.executable, "-m", "infra.mlflow_server", "run", *_options(settings)]
    with settings.log("server").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    ended = threading.Thread(
        target=process.wait, name="mlflow-server", daemon=True
    )  # also collects it at its end
    ended.start()
    while ended.is_alive():  # it gives up by itself when it takes too long
        found = running(settings.folder)
        if found is not None and found.pid == process.pid:
            return found
        time.sleep(0.1)
    log = settings.log("server")
    raise ServerError(f"the server did not start; the end of {log}:\n{log.read_text()[-2000:]}")


def stop(folder: Path, timeout_s: float = 90.0) -> bool:
    """Ends a server and all it started; False when none runs there. Raises ServerError when it does not end."""
    found = running(folder)
    if found is None:
        return False
    os.kill(found.pid, signal.SIGTERM)
    try:
        with _lock(folder).acquire(timeout=timeout_s):
            return True
    except Timeout:
        raise ServerError(
            f"process {found.pid} was asked to end and has not in {timeout_s:.0f} s; see {folder / 'logs'}"
        ) from None


def running(folder: Path) -> Running | None:
    """The server of a folder; None when there is none, or it is not up yet."""
    try:
        with _lock(folder).acquire(timeout=0):
            return None  # what file there may be is that of one that was killed
    except Timeout:
        with contextlib.suppress(FileNotFoundError):
            return Running(**json.loads((folder / "server.json").read_text()))
    except OSError:
        return None
    return None


def run(settings: Settings) -> int:
    """Keeps a server until SIGTERM or SIGINT, 0, or until a part of it ends by itself, 1. From the main thread.

    Raises ServerError or PostgresError when it cannot be started; nothing is left then.
    """
    _require_packages()
    _prepare(settings)
    asked = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: asked.set())
    state = settings.folder / "server.json"
    try:
        lock = _lock(settings.folder).acquire(
            timeout=2
        )  # whoever looks whether one runs holds it for a moment
    except Timeout:
        raise ServerError(f"a server runs in {settings.folder} already; stop it first") from None
    with lock, contextlib.ExitStack() as stack:
        state.unlink(missing_ok=True)
        _require_free(settings.port)
        mark = stack.enter_context(_reaper())
        parts = _Parts({**os.environ, MARK_NAME: mark}, settings, asked)
        stack.callback(parts.end)
        uri, place = parts.start()
        if asked.is_set():
            return 0
        found = Running(os.getpid(), uri, ADMIN, str(settings.password_file), place)
        write_durably(state, json.dumps(asdict(found), indent=1) + "\n")
        stack.callback(lambda: state.unlink(missing_ok=True))
        print(f"MLflow is up at {uri}, user {ADMIN}, password in {settings.password_file}", flush=True)
        while not asked.wait(0.5):
            if (ended := parts.ended()) is not None:
                print(f"{ended} has ended by itself; see {settings.log(ended)}", flush=True)
                return 1
    return 0


class _Parts:
    """The processes of one server, each in a group of its own, ended in the opposite order."""

    def __init__(self, environment: Mapping[str, str], settings: Settings, asked: threading.Event) -> None:
        self._environment = {k: v for k, v in environment.items() if not k.startswith("MLFLOW_TRACKING_")}
        self._settings, self._asked = settings, asked
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> tuple[str, str]:
        """All of them; returns MLflow's address and where artifacts go."""
        given = self._environment.get(_DATABASE)
        database = given.replace("postgresql://", SCHEME, 1) if given else self._start_postgres()
        place = self._settings.artifacts or self._start_throwaway_store()
        self._start_mlflow(database, place)
        return self._settings.uri, place

    def ended(self) -> str | None:
        """The name of a part that is no more."""
        return next((name for name, process in self._processes.items() if process.poll() is not None), None)

    def end(self) -> None:
        for name, process in reversed(self._processes.items()):
            # Postgres waits for its clients at SIGTERM, which need not end.
            process.send_signal(signal.SIGINT if name == "postgres" else signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):  # what it had started and left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _start_postgres(self) -> str:
        postgres = find_postgres(self._settings.folder / "postgres", self._settings.root_runs_as)
        postgres.create()
        log = self._settings.log("postgres")
        self._processes["postgres"] = postgres.start(log, self._environment)
        postgres.wait_ready(self._processes["postgres"], log)
        return postgres.uri

    def _start_throwaway_store(self) -> str:
        port = _free_port()
        endpoint = f"http://{_HOST}:{port}"
        self._environment |= {
            "AWS_ENDPOINT_URL": endpoint,
            "MLFLOW_S3_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "throwaway",
            "AWS_SECRET_ACCESS_KEY": "throwaway",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self._spawn("store", [sys.executable, "-m", "moto.server", "-H", _HOST, "-p", str(port)])
        self._wait_for(f"{endpoint}/", "store")
        request = urllib.request.Request(
            f"{endpoint}/{_BUCKET}", method="PUT", headers={"Host": f"{_HOST}:{port}"}
        )
        urllib.request.urlopen(request, timeout=10).close()
        return f"s3://{_BUCKET}"

    def _start_mlflow(self, database: str, place: str) -> None:
        settings = self._settings
        access = settings.folder / "access.ini"
        _write_secret(
            access,
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {database.replace('%', '%%')}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n",
        )
        hosts = [f"{name}:{settings.port}" for name in (_HOST, "localhost")] + list(settings.allowed_hosts)
        # Addresses and passwords go by the environment: arguments can be read by every user of the machine.
        self._environment |= {
            _DATABASE: database,
            "MLFLOW_ARTIFACTS_DESTINATION": place,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_AUTH_CONFIG_PATH": str(access),
            "MLFLOW_AUTH_ADMIN_USERNAME": ADMIN,
            "MLFLOW_AUTH_ADMIN_PASSWORD": settings.password_file.read_text().strip(),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": (settings.folder / "session-key").read_text().strip(),
        }
        command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--serve-artifacts"]
        command += ["--host", _HOST, "--port", str(settings.port), "--workers", "1"]
        self._spawn("mlflow", [*command, "--allowed-hosts", ",".join(hosts)])
        self._wait_for(f"{settings.uri}/health", "mlflow")

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        with self._settings.log(name).open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                cwd=self._settings.folder,
                start_new_session=True,
            )

    def _wait_for(self, url: str, name: str) -> None:
        end_s = time.monotonic() + _UP_S
        while not _answers(url) and not self._asked.is_set():
            if self._processes[name].poll() is not None or time.monotonic() > end_s:
                log = self._settings.log(name)
                raise ServerError(f"{name} did not start; the end of {log}:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)


@contextlib.contextmanager
def _reaper() -> Iterator[str]:
    """The mark of processes that do not outlive this one, however it ends."""
    mark = secrets.token_hex(8)
    reaper = subprocess.Popen(
        [sys.executable, "-m", "infra.reaper", mark, _NO_LOG, str(os.getpid())],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert reaper.stdin is not None
    try:
        yield mark
    finally:
        reaper.stdin.close()
        reaper.wait()


def _prepare(settings: Settings) -> None:
    """The folder and what is secret in it. Others may pass through, for Postgres may be another user's."""
    settings.folder.mkdir(parents=True, exist_ok=True, mode=0o711)
    (settings.folder / "logs").mkdir(exist_ok=True, mode=0o700)
    for path in (settings.password_file, settings.folder / "session-key"):
        if not path.exists():
            _write_secret(path, secrets.token_urlsafe(24) + "\n")


def _write_secret(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)  # never into a file that others hold open or may read
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _require_packages() -> None:
    missing = [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ServerError(
            f"the server needs {', '.join(missing)}, not installed here; pip install -c constraints.txt '.[server]'"
        )


def _require_free(port: int) -> None:
    """Raises ServerError: another server on the port would be taken for ours."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((_HOST, port))
        except OSError as error:
            raise ServerError(
                f"port {port} of {_HOST}: {error.strerror}; choose another one with --port"
            ) from None


def _lock(folder: Path) -> FileLock:
    return FileLock(str(folder / "server.lock"))


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((_HOST, 0))
        return found.getsockname()[1]


def _options(settings: Settings) -> list[str]:
    options = ["--folder", str(settings.folder), "--port", str(settings.port)]
    options += ["--throwaway-store"] if settings.artifacts is None else ["--artifacts", settings.artifacts]
    options += [option for name in settings.allowed_hosts for option in ("--allowed-host", name)]
    return [*options, "--postgres-user", settings.root_runs_as]


def main(arguments: Sequence[str] | None = None) -> int:
    """What is wrong ends in a message and exit code 2; `status` gives 3 when none runs."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.mlflow_server", description="An MLflow server for a team."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("start", "run", "stop", "status"):
        verb = verbs.add_parser(name)
        verb.add_argument(
            "--folder", type=Path, required=True, help="of the database, the password, the logs"
        )
        if name in ("start", "run"):
            verb.add_argument("--port", type=int, default=5000)
            place = verb.add_mutually_exclusive_group(required=True)
            place.add_argument("--artifacts", help="such as s3://bucket/path")
            place.add_argument(
                "--throwaway-store", action="store_true", help="in memory, for tests (needs moto)"
            )
            verb.add_argument("--allowed-host", action="append", default=[], help="name of a proxy before it")
            verb.add_argument("--postgres-user", default="postgres", help="whom it runs as when you are root")
    given = parser.parse_args(arguments)
    folder = given.folder.resolve()
    try:
        if given.verb == "stop":
            print("stopped" if stop(folder) else f"no server runs in {folder}")
            return 0
        if given.verb == "status":
            found = running(folder)
            print(f"no server runs in {folder}" if found is None else json.dumps(asdict(found), indent=1))
            return 3 if found is None else 0
        settings = Settings(
            folder, given.port, given.artifacts, tuple(given.allowed_host), given.postgres_user
        )
        if given.verb == "run":
            return run(settings)
        found = start(settings)
        print(f"MLflow is up at {found.uri}, user {found.user}, password in {found.password_file}")
        return 0
    except (ServerError, PostgresError) as error:
        print(f"{parser.prog} {given.verb}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
