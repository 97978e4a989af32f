"""Ray jobs over HTTP: submit once, wait, stop, read logs. Stages are chained by the caller, not here."""

import asyncio
import contextlib
import ipaddress
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from infra.runtime import environment

logger = logging.getLogger(__name__)
logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)

STOP_GRACE_S = 30
_LONGEST_SILENCE_S = 60.0
_REQUEST_S = 60.0
_RETRY_S = 0.5


class ClusterError(Exception):
    """A cluster that cannot be started, reached or used."""


class JobError(ClusterError):
    """A request about one job that cannot be answered."""


class SilentClusterError(ClusterError):
    """A cluster that does not answer, or not yet again."""


@dataclass(frozen=True, slots=True)
class JobState:
    """What the cluster says of a job. `status`: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""

    submission_id: str
    status: str
    message: str
    exit_code: int | None
    is_new: bool = False

    @property
    def is_finished(self) -> bool:
        return JobStatus(self.status).is_terminal()

    @property
    def is_succeeded(self) -> bool:
        return self.status == JobStatus.SUCCEEDED

    @property
    def was_killed(self) -> bool:
        """Whether it ended by a signal, or with its process lost, and not by its own decision."""
        return self.is_finished and not self.is_succeeded and (self.exit_code is None or self.exit_code < 0)

    @property
    def shell_code(self) -> int:
        """What a command that followed the job ends with: 0 only if it succeeded, 1 if it left no code."""
        return 0 if self.is_succeeded else self.exit_code or 1


class _Client(JobSubmissionClient):
    """Ray's, with a limit on each request, which Ray leaves without one: a dashboard that died may leave its socket
    open, and nobody answers there. The method is a private one; tests hold what it is overridden for.
    """

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        url = self._address
        try:
            return super()._do_request(method, endpoint, timeout=_REQUEST_S, **options)
        except requests.RequestException as error:
            raise SilentClusterError(
                f"the Ray cluster at {url} does not answer: {_one_line(_innermost(error))}"
            ) from error
        except AuthenticationError as error:
            raise ClusterError(
                f"the Ray cluster at {url} refuses this command: {_one_line(error).partition(' Token auth')[0]}. "
                "It was started with a token, and the one found here is missing or another's: put the cluster's into "
                "RAY_AUTH_TOKEN, or into a file named by RAY_AUTH_TOKEN_PATH (~/.ray/auth_token where that is unset)"
            ) from error


class Jobs:
    """The jobs of one cluster, addressed by its dashboard URL (http://host:port)."""

    def __init__(self, url: str) -> None:
        require_guarded(url)
        self.url = url
        # Ray lets these two variables win over an explicit address; an owned cluster must not be overruled.
        with environment({"RAY_ADDRESS": None, "RAY_API_SERVER_ADDRESS": None}):
            try:
                self._client = _Client(url)
            except (RuntimeError, SilentClusterError) as error:
                raise ClusterError(
                    f"connecting to the Ray cluster at {url} failed: {_one_line(_innermost(error)).rstrip('.')}. "
                    "Check the "
                    "address, that its dashboard is reachable from here, and that RAY_AUTH_TOKEN holds its token."
                ) from error

    def submit_once(
        self,
        submission_id: str,
        entrypoint: str | Sequence[str],
        env_vars: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> JobState:
        """Start a job unless one with this id exists; in that case return its state as it is.

        `entrypoint` is better a list of arguments than a line for the shell.
        The id acts as the lock: of two simultaneous callers one starts the job, the other attaches. A failed
        or stopped job is returned too (`is_new` False): to try again, submit the id of the next attempt.
        """
        known = self.find(submission_id)
        if known is not None:
            return known
        # `exec`: Ray starts a shell and kills that one when the cluster goes down; the program must be it.
        command = entrypoint if isinstance(entrypoint, str) else f"exec {shlex.join(entrypoint)}"
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S), **(env_vars or {})}
        try:
            self._client.submit_job(
                entrypoint=command,
                submission_id=submission_id,
                runtime_env={"env_vars": variables},
                metadata=dict(metadata or {}),
            )
        except (RuntimeError, ValueError) as error:
            if "already exists" in str(error) and (known := self.find(submission_id)) is not None:
                return known
            raise JobError(
                f"submitting job {submission_id} to {self.url} failed: {_one_line(error)}"
            ) from error
        return JobState(submission_id, str(JobStatus.PENDING.value), "submitted", None, is_new=True)

    def find(self, submission_id: str) -> JobState | None:
        """State of a job, or None if the cluster does not know it."""
        try:
            info = self._client.get_job_info(submission_id)
        except RuntimeError as error:
            if "404" in str(error) or "does not exist" in str(error):
                return None
            raise JobError(f"asking {self.url} for job {submission_id} failed: {_one_line(error)}") from error
        return JobState(submission_id, str(info.status.value), info.message or "", info.driver_exit_code)

    def status(self, submission_id: str) -> JobState:
        """State of a job. Raises JobError if the cluster does not know it.

        Short outages of the cluster are waited out; after 60 s of silence SilentClusterError is raised.
        """
        asked = time.monotonic()
        while True:
            try:
                known = self.find(submission_id)
                break
            except SilentClusterError as error:
                silence_s = time.monotonic() - asked
                if silence_s > _LONGEST_SILENCE_S:
                    raise SilentClusterError(
                        f"{error}, and has not for {silence_s:.0f} s while job {submission_id} was followed. The run "
                        "goes on if its cluster does; the same command continues it"
                    ) from error
                time.sleep(_RETRY_S)
        if known is None:
            raise JobError(f"the cluster at {self.url} knows no job {submission_id}")
        return known

    def wait(
        self,
        submission_id: str,
        poll_s: float = 0.5,
        on_poll: Callable[[JobState], None] | None = None,
        timeout_s: float | None = None,
    ) -> JobState:
        """Block until the job has finished and return its last state; `on_poll` sees every state on the way."""
        started = time.monotonic()
        while True:
            state = self.status(submission_id)
            if on_poll is not None:
                on_poll(state)
            if state.is_finished:
                return state
            if timeout_s is not None and time.monotonic() - started > timeout_s:
                raise JobError(f"job {submission_id} is still {state.status} after {timeout_s:.0f} s")
            time.sleep(poll_s)

    def stop(self, submission_id: str) -> bool:
        """Ask a job to end: SIGTERM, then SIGKILL after 30 s. Returns whether it was still running."""
        state = self.status(submission_id)
        if state.is_finished:
            return False
        try:
            return bool(self._client.stop_job(submission_id))
        except RuntimeError as error:
            raise JobError(f"stopping job {submission_id} failed: {_one_line(error)}") from error

    def logs(self, submission_id: str) -> str:
        """Everything the job's driver has written so far."""
        try:
            return self._client.get_job_logs(submission_id)
        except RuntimeError as error:
            raise JobError(f"reading the log of job {submission_id} failed: {_one_line(error)}") from error

    def tail(self, submission_id: str) -> Iterator[str]:
        """Yield the driver's output in pieces as it grows, until the job ends."""
        loop = asyncio.new_event_loop()
        stream = self._client.tail_job_logs(submission_id)
        try:
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    yield loop.run_until_complete(anext(stream))
        except RuntimeError as error:
            raise JobError(f"following job {submission_id} failed: {_one_line(error)}") from error
        finally:
            loop.run_until_complete(stream.aclose())  # type: ignore[attr-defined]
            loop.close()


def require_guarded(url: str) -> None:
    """Raise ClusterError for an address that would give the cluster, or a password, away: what takes jobs without a
    token runs anybody's.
    """
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise ClusterError(
            f"the address of the Ray cluster at {parts.hostname} holds a user name or password, which Ray does not use "
            "and logs would keep; leave it out and put the cluster's token into RAY_AUTH_TOKEN"
        )
    if is_loopback(parts.hostname or "") or has_token(os.environ):
        return
    raise ClusterError(
        f"the Ray cluster at {url} is on another host and there is no token for it here, so either it refuses this "
        "command or it runs anybody's. Start it with RAY_AUTH_MODE=token, and put its token into RAY_AUTH_TOKEN, or "
        "into a file named by RAY_AUTH_TOKEN_PATH"
    )


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine, and no other can answer for it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def has_token(environ: Mapping[str, str]) -> bool:
    """Whether Ray would find a token, where it looks for one, and is told to send it."""
    if environ.get("RAY_AUTH_MODE") != "token":
        return False
    if environ.get("RAY_AUTH_TOKEN"):
        return True
    path = Path(environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.is_file() and path.stat().st_size > 0


def _innermost(error: BaseException) -> BaseException:
    """What went wrong first: requests wraps a refused connection in three messages that repeat the address."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _one_line(error: BaseException) -> str:
    """The telling part of an error that may carry a whole server traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines and "Traceback" in str(error) else " ".join(lines))[:500] or repr(error)
