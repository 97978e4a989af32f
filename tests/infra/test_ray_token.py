"""Which addresses jobs may be sent to, before anything is sent, and what is said where a token is refused."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from infra import ray_jobs
from infra.ray_jobs import ClusterError, Jobs, has_token, is_loopback, require_guarded


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


class Head(BaseHTTPRequestHandler):
    """Answers what a Ray head with a token answers: its version at first, then the status that the server holds."""

    def answer(self) -> None:
        is_open = self.path == "/api/version" and self.server.is_version_told  # type: ignore[attr-defined]
        status = 200 if is_open else self.server.status  # type: ignore[attr-defined]
        body = (
            json.dumps({"ray_version": "2.60.0"}) if is_open else "Unauthorized: Missing authentication token"
        )
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    do_GET = do_POST = answer

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def head() -> Iterator[Callable[[int, bool], str]]:
    """Address of a head that answers with a status, having told its version or not."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Head)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def answering(status: int, is_version_told: bool) -> str:
        server.status, server.is_version_told = status, is_version_told  # type: ignore[attr-defined]
        return f"http://127.0.0.1:{server.server_port}"

    yield answering
    server.shutdown()
    thread.join()
    server.server_close()


REFUSED = r"refuses this command: Authentication .*Missing authentication token\. .*RAY_AUTH_TOKEN_PATH"


@pytest.mark.parametrize("status", [401, 403])
def test_a_head_that_refuses_the_token_is_a_typed_error(
    status: int, head: Callable[[int, bool], str]
) -> None:
    with pytest.raises(ClusterError, match=REFUSED):
        Jobs(head(status, False))


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
    status: int, request_: Callable[[Jobs], object], head: Callable[[int, bool], str]
) -> None:
    jobs = Jobs(head(status, True))
    with pytest.raises(ClusterError, match=REFUSED):
        request_(jobs)
