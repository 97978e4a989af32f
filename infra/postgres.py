"""A Postgres of one's own: a data folder, and a server that only its folder's owner can reach.

It listens on a Unix socket inside the data folder, which Postgres keeps closed to others, and on no network, so it
needs no password. Postgres refuses to run as root: there it runs as another user of the system.
"""

import contextlib
import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SCHEME = "postgresql+psycopg2://"  # without the driver SQLAlchemy would take psycopg, which MLflow is not tested on
_INSTALLED = Path("/usr/lib/postgresql")
_USER, _DATABASE, _PORT = "mlflow", "postgres", 5432
_LONGEST_SOCKET = 107  # bytes of a Unix socket's path


class PostgresError(Exception):
    """Postgres cannot be found, made or started."""


@dataclass(frozen=True)
class Postgres:
    """The server of one data folder. `binaries` has initdb and postgres; `user` is whom it runs as, None = us."""

    data: Path
    binaries: Path
    user: str | None = None

    @property
    def uri(self) -> str:
        """Its address for SQLAlchemy."""
        return f"{SCHEME}{_USER}@/{_DATABASE}?host={self.data}&port={_PORT}"

    def create(self) -> None:
        """Makes the data folder where there is none. Raises PostgresError."""
        if len(f"{self.data}/.s.PGSQL.{_PORT}".encode()) > _LONGEST_SOCKET:
            raise PostgresError(f"{self.data} is too long a path for a Unix socket; choose a shorter folder")
        if (self.data / "PG_VERSION").is_file():
            return
        self.data.mkdir(exist_ok=True, mode=0o700)
        if self.user is not None:
            entry = pwd.getpwnam(self.user)
            os.chown(self.data, entry.pw_uid, entry.pw_gid)
        if self._run(["test", "-w", str(self.data)]).returncode != 0:
            raise PostgresError(
                f"the user {self.user} cannot write to {self.data}; choose a folder that this user can enter (all "
                "above it need the x permission), or start the server as an ordinary user"
            )
        options = ["-U", _USER, "--auth-local=trust", "--auth-host=reject", "-E", "UTF8", "--locale=C"]
        made = self._run([str(self.binaries / "initdb"), "-D", str(self.data), *options])
        if made.returncode != 0:
            raise PostgresError(f"initdb in {self.data} failed: {made.stderr.strip()[-500:]}")

    def start(self, log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Starts the server and returns at once; SIGINT to it is an orderly end."""
        command = [str(self.binaries / "postgres"), "-D", str(self.data), "-c", "listen_addresses="]
        command += ["-c", f"unix_socket_directories={self.data}", "-c", f"port={_PORT}"]
        self._wait_for_predecessor()
        uid, gid, groups = self._ids()
        with log.open("ab") as file:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd="/",
                start_new_session=True,
                user=uid,
                group=gid,
                extra_groups=groups,
            )

    def wait_ready(self, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 60.0) -> None:
        """Returns when it takes connections. Raises PostgresError when it ends or takes too long."""
        end_s = time.monotonic() + timeout_s
        while not self._is_ready(process.pid):
            if process.poll() is not None or time.monotonic() > end_s:
                raise PostgresError(f"postgres did not start; the end of {log}:\n{log.read_text()[-1000:]}")
            time.sleep(0.05)

    def _wait_for_predecessor(self, timeout_s: float = 20.0) -> None:
        """One that was killed looks alive to Postgres until the system has collected it."""
        end_s = time.monotonic() + timeout_s
        with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
            pid = int((self.data / "postmaster.pid").read_text().splitlines()[0])
            while psutil.Process(pid).status() == psutil.STATUS_ZOMBIE and time.monotonic() < end_s:
                time.sleep(0.05)

    def _is_ready(self, pid: int) -> bool:
        """As pg_ctl asks: the last line of its pid file says so."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"

    def _run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        uid, gid, groups = self._ids()
        return subprocess.run(
            command, capture_output=True, text=True, cwd="/", user=uid, group=gid, extra_groups=groups
        )

    def _ids(self) -> tuple[int | None, int | None, list[int] | None]:
        """User, group and further groups, as subprocess takes them."""
        if self.user is None:
            return None, None, None
        entry = pwd.getpwnam(self.user)
        return entry.pw_uid, entry.pw_gid, []


def find_postgres(data: Path, root_runs_as: str = "postgres") -> Postgres:
    """The Postgres of this machine. Raises PostgresError that says what to install, or whom to run it as.

    Looked for in PATH, then where Debian installs it, the newest version first. `root_runs_as` counts for root alone.
    """
    user = None
    if os.geteuid() == 0:
        user = root_runs_as
        try:
            is_root = pwd.getpwnam(user).pw_uid == 0
        except KeyError:
            raise PostgresError(
                f"Postgres refuses to run as root, and there is no user {user!r}: make one (useradd --system {user}) "
                "or start the server as an ordinary user"
            ) from None
        if is_root:
            raise PostgresError(f"Postgres refuses to run as root, which {user!r} is; name another user")
    return Postgres(data, _find_binaries(), user)


def _find_binaries() -> Path:
    found = shutil.which("postgres")
    # Links in PATH are followed: initdb looks for its files beside the program that it is.
    folders = [Path(found).resolve().parent] if found else []
    installed = [folder for folder in _INSTALLED.glob("*/bin") if folder.parent.name.isdecimal()]
    folders += sorted(installed, key=lambda folder: int(folder.parent.name), reverse=True)
    for folder in folders:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise PostgresError(
        f"there is no Postgres: initdb and postgres are neither in PATH nor in {_INSTALLED}/*/bin; install it (apt "
        "install postgresql) or give the address of one in MLFLOW_BACKEND_STORE_URI"
    )
