"""Which addresses jobs may be sent to, before anything is sent."""

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
