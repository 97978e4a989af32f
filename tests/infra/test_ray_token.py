"""Which addresses jobs may be sent to, before anything is sent, and what is said where a token is refused."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from infra import ray_jobs
from infra.ray_jobs import ClusterError, Jobs, SilentClusterError, has_token, is_loopback, require_guarded


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token anywhere."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_is_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["10.0.0.5", "head.example", "0.0.0.0", "::", "localhost.example", ""])
def test_others_are_not(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.usefixtures("nobody")
def test_another_host_without_a_token_is_refused_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def send(*arguments: object) -> None:
        pytest.fail("it was asked")

    monkeypatch.setattr(ray_jobs, "JobSubmissionClient", send)
    with pytest.raises(ClusterError, match=r"no token for it here.*RAY_AUTH_MODE=token.*RAY_AUTH_TOKEN"):
        Jobs("http://head.example:8265")


@pytest.mark.usefixtures("nobody")
def test_this_machine_needs_none_to_be_asked() -> None:
    require_guarded("http://127.0.0.1:8265")
    require_guarded("http://[::1]:8265")


@pytest.mark.usefixtures("nobody")
def test_a_token_is_found_where_ray_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not has_token({"RAY_AUTH_MODE": "token"})
    assert has_token({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"})
    assert not has_token({"RAY_AUTH_TOKEN": "secret"})
    file = tmp_path / "token"
    file.touch()
    assert not has_token({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)})
    file.write_text("secret")
    assert has_token({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)})
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    require_guarded("http://head.example:8265")


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ClusterError, match="holds a user name or password") as caught:
        require_guarded("http://me:hunter2@127.0.0.1:8265")
    assert "hunter2" not in str(caught.value)


SILENT = 0
JOB = {"type": "SUBMISSION", "submission_id": "a", "status": "SUCCEEDED", "entrypoint": "true"}


class Head(BaseHTTPRequestHandler):
    """Answers as a Ray head does: its version, unless that needs a token too, then with one status after the other."""

    def answer(self) -> None:
        is_open = self.path == "/api/version" and self.server.is_version_told  # type: ignore[attr-defined]
        status = 200 if is_open else self.server.statuses.pop(0)  # type: ignore[attr-defined]
        if status == SILENT:
            self.server.is_over.wait(60)  # type: ignore[attr-defined]
            return
        body = "Unauthorized: Missing authentication token"
        if status == 200:
            body = json.dumps({"ray_version": "2.60.0"} if is_open else JOB)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    do_GET = do_POST = answer

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def head() -> Iterator[Callable[..., str]]:
    """Address of a head that answers so, having told its version or not."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Head)
    server.is_over = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def answering(*statuses: int, is_version_told: bool = True) -> str:
        server.statuses, server.is_version_told = list(statuses), is_version_told  # type: ignore[attr-defined]
        return f"http://127.0.0.1:{server.server_port}"

    yield answering
    server.is_over.set()  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()
    server.server_close()


REFUSED = r"refuses this command: Authentication .*Missing authentication token\. .*RAY_AUTH_TOKEN_PATH"


@pytest.mark.parametrize("status", [401, 403])
def test_a_head_that_refuses_the_token_is_a_typed_error(status: int, head: Callable[..., str]) -> None:
    with pytest.raises(ClusterError, match=REFUSED):
        Jobs(head(status, is_version_told=False))


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    "request_",
    [
        lambda jobs: jobs.find("a"),
        lambda jobs: jobs.submit_once("a", "true"),
        lambda jobs: jobs.wait("a"),
        lambda jobs: jobs.stop("a"),
        lambda jobs: jobs.logs("a"),
    ],
)
def test_so_is_one_that_refuses_it_later(
    status: int, request_: Callable[[Jobs], object], head: Callable[..., str]
) -> None:
    jobs = Jobs(head(status))
    with pytest.raises(ClusterError, match=REFUSED):
        request_(jobs)


def test_a_head_that_is_silent_for_a_moment_is_asked_again(
    head: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_jobs, "_REQUEST_S", 0.2)
    assert Jobs(head(SILENT, SILENT, 200)).wait("a").is_succeeded


def test_a_head_that_stays_silent_is_a_typed_error(
    head: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_jobs, "_REQUEST_S", 0.2)
    monkeypatch.setattr(ray_jobs, "_LONGEST_SILENCE_S", 0.3)
    jobs = Jobs(head(*[SILENT] * 9))
    with pytest.raises(SilentClusterError, match=r"does not answer: .*while job a was followed"):
        jobs.wait("a")
    with pytest.raises(SilentClusterError, match="does not answer"):
        jobs.submit_once("a", "true")
