"""A Ray cluster, owned and local or somebody else's, and tasks over it.

Jobs stand in ray_jobs, training in ray_train. A local cluster belongs to the process that opened it and dies
with it, even by SIGKILL. Its dashboard listens on loopback; other Ray clusters of the machine are left alone.
"""

import contextlib
import functools
import logging
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray
from ray._private import parameter, ray_constants, services
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._raylet import AuthenticationMode, get_authentication_mode  # type: ignore[attr-defined]
from ray.exceptions import RayError, RayTaskError

from infra.ray_jobs import ClusterError, Jobs
from infra.reaper import MARK_NAME
from infra.runtime import environment

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_CONNECT_S = 5.0
# Read by the processes of an owned cluster only.
_LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on any system: listen on loopback only
    "RAY_enable_metrics_collection": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away; saves a process per stage
    "RAY_ADDRESS": None,
    "RAY_API_SERVER_ADDRESS": None,
}
# Parameters of its node that `ray.init` does not take; see `_private_node`.
_LOCAL_NODE: dict[str, Any] = {
    "dashboard_agent_listen_port": 0,
    "no_monitor": True,
    "include_log_monitor": False,
}


class TaskError(ClusterError):
    """A task that failed for good. `item` is what it was given; the cause is what it raised."""

    def __init__(self, item: object, message: str) -> None:
        self.item = item
        super().__init__(message)


class Cluster:
    """An open connection: `jobs` for submitted jobs, `map_tasks` for work spread over the cluster."""

    def __init__(self, url: str | None, is_owned: bool, is_connected: bool) -> None:
        self.url = url
        self.is_owned = is_owned
        self.is_connected = is_connected
        self._jobs: Jobs | None = None

    @property
    def address_inside(self) -> str:
        """What a job of this cluster joins it with. "auto" is a guess where several clusters share a machine."""
        return ray.get_runtime_context().gcs_address if self.is_connected else "auto"

    @property
    def jobs(self) -> Jobs:
        if self.url is None:
            raise ClusterError("this Ray cluster has no dashboard, so it takes no jobs; start it with one")
        if self._jobs is None:
            self._jobs = Jobs(self.url)
        return self._jobs

    def map_tasks(
        self,
        fn: Callable[[ItemT], ResultT],
        items: Sequence[ItemT],
        num_cpus: float = 1,
        max_in_flight: int | None = None,
        max_retries: int = 3,
        describe: Callable[[ItemT], str] = repr,
    ) -> Iterator[tuple[int, ResultT]]:
        """Run `fn(item)` for every item on the cluster; yield (index, result) in order of completion.

        At most `max_in_flight` tasks exist at a time (default: twice what the cluster's CPUs can run). A task
        whose process dies is repeated `max_retries` times; an exception of `fn` is not repeated. The first
        failure cancels the rest and raises TaskError naming the item (`describe(item)`).
        """
        if not self.is_connected:
            raise ClusterError(
                f"tasks start only from inside the cluster at {self.url}: submit this command as a job"
            )
        if max_in_flight is None:
            max_in_flight = 2 * max(1, int(ray.cluster_resources().get("CPU", 1) / max(num_cpus, 1e-3)))
        task = ray.remote(fn).options(num_cpus=num_cpus, max_retries=max_retries, retry_exceptions=False)
        waiting = iter(enumerate(items))
        running: dict[Any, int] = {}
        try:
            while True:
                while len(running) < max_in_flight and (following := next(waiting, None)) is not None:
                    index, item = following
                    running[task.remote(item)] = index
                if not running:
                    return
                finished, _ = ray.wait(list(running), num_returns=1)
                for reference in finished:
                    index = running.pop(reference)
                    yield index, _result(reference, items[index], describe)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


@contextlib.contextmanager
def open_cluster(address: str | None = None, num_cpus: int | None = None) -> Iterator[Cluster]:
    """Open a cluster for the duration of a `with` block.

    `address` None starts a local Ray owned by this process (`num_cpus` CPUs, default all) and stops it at the
    end; "auto" or host:port joins the cluster this process runs in (as a job does); http://host:8265 reaches
    the jobs of one elsewhere. Call `runtime.prepare_process()` before. Raises ClusterError.
    """
    if address is None:
        with _local_cluster(num_cpus) as cluster:
            yield cluster
    elif address.startswith(("http://", "https://")):
        yield Cluster(address.rstrip("/"), is_owned=False, is_connected=False)
    else:
        with _joined_cluster(address) as cluster:
            yield cluster


@contextlib.contextmanager
def _joined_cluster(address: str) -> Iterator[Cluster]:
    if ray.is_initialized():
        yield Cluster(_dashboard_url(), is_owned=False, is_connected=True)
        return
    try:
        found = _reachable(address)
        ray.init(address=found, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise ClusterError(
            f"joining the Ray cluster at {address!r} failed: {str(error).rstrip('.')}. Give http://host:8265, run "
            "this on a node of the cluster, or leave the address out to start a local one."
        ) from error
    try:
        yield Cluster(_dashboard_url(), is_owned=False, is_connected=True)
    finally:
        ray.shutdown()


def _reachable(address: str) -> str:
    """host:port that `address` means to Ray, once something listens there: Ray itself tries for minutes, noisily.

    Raises OSError or ValueError.
    """
    found = canonicalize_bootstrap_address_or_die(address)
    host, _, port = found.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ConnectionError(f"nothing answers at {found} ({error})") from error
    return found


@contextlib.contextmanager
def _local_cluster(num_cpus: int | None) -> Iterator[Cluster]:
    if ray.is_initialized():
        raise ClusterError("this process is connected to Ray already; open one cluster at a time")
    if get_authentication_mode() != AuthenticationMode.TOKEN:
        raise ClusterError(
            "Ray was imported before runtime.prepare_process() was called, so it would run without its token; call "
            "it first (or unset RAY_AUTH_MODE if you set it)"
        )
    short = (
        tempfile.gettempdir() if len(tempfile.gettempdir()) < 30 else "/tmp"
    )  # sockets allow 107 characters
    # A folder for each cluster: Ray notes the "current" cluster in it, and jobs look there for the one they are in.
    all_clusters = Path(short) / f"svitt-ray-{os.getuid()}"
    all_clusters.mkdir(mode=0o700, exist_ok=True)
    _remove_old_clusters(all_clusters)
    temp_dir = all_clusters / str(os.getpid())
    mark = secrets.token_hex(8)
    with _reaper(mark, rf"{re.escape(str(temp_dir))}/"):
        yield from _started_cluster(num_cpus, temp_dir, mark)


def _started_cluster(num_cpus: int | None, temp_dir: Path, mark: str) -> Iterator[Cluster]:
    try:
        with environment({**_LOCAL_ENVIRONMENT, MARK_NAME: mark}), _private_node():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=256 * 2**20,
                _temp_dir=str(temp_dir),
                _node_ip_address="127.0.0.1",
            )
    except Exception as error:  # Ray raises plain Exception, RuntimeError, ValueError, TimeoutError here
        ray.shutdown()
        first_line = str(error).strip().splitlines()[0]
        raise ClusterError(f"starting a local Ray failed: {first_line} Its logs are in {temp_dir}") from error
    try:
        _protect_token()
        yield Cluster(_dashboard_url(), is_owned=True, is_connected=True)
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _reaper(mark: str, logs: str) -> Iterator[None]:
    """A process outside of this one's session that ends marked processes when this one ends, however it ends."""
    reaper = subprocess.Popen(
        [sys.executable, "-m", "infra.reaper", mark, logs, str(os.getpid())],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in the terminal is not for it
    )
    assert reaper.stdin is not None
    try:
        yield
    finally:
        reaper.stdin.close()
        reaper.wait()


@contextlib.contextmanager
def _private_node() -> Iterator[None]:
    """Let `ray.init` start a node that keeps to itself; it has no parameters for any of this.

    The agent that starts jobs listens on a free port instead of 52365, which a second cluster of the machine
    would find taken (its jobs then fail with "No available agent"). And Ray's servers stay on loopback, as they
    do on macOS: _LOCAL_ENVIRONMENT says so to the processes Ray starts, this to the library loaded here. And its
    processes are a group of their own: a Ctrl-C in the terminal goes to all of the foreground group, and ends Ray's
    dashboard, which jobs are asked about through. And it does without two processes that only cost time: the
    autoscaler, which has no machines to start, and what sends the workers' lines to drivers, which do not show them.
    Private names, guarded by tests.
    """
    whole_params, is_reachable = parameter.RayParams, ray_constants.ENABLE_RAY_CLUSTER
    popen = services.ConsolePopen
    parameter.RayParams = functools.partial(whole_params, **_LOCAL_NODE)  # type: ignore
    ray_constants.ENABLE_RAY_CLUSTER = False
    services.ConsolePopen = functools.partial(popen, process_group=0)  # type: ignore
    try:
        yield
    finally:
        services.ConsolePopen = popen  # type: ignore[misc]
        parameter.RayParams = whole_params  # type: ignore[misc]
        ray_constants.ENABLE_RAY_CLUSTER = is_reachable


def _result(reference: Any, item: ItemT, describe: Callable[[ItemT], str]) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause if isinstance(getattr(error, "cause", None), BaseException) else error
        raise TaskError(item, f"{describe(item)}: {type(cause).__name__}: {cause}") from cause
    except RayError as error:
        first_line = str(error).strip().splitlines()[0]
        raise TaskError(item, f"{describe(item)}: its process died again and again: {first_line}") from error


def _dashboard_url() -> str | None:
    host_port = ray._private.worker._global_node.webui_url  # type: ignore[attr-defined]  # no public name for it
    return f"http://{host_port}" if host_port else None


def _protect_token() -> None:
    """Ray writes its token readable by everyone; take that back."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with contextlib.suppress(OSError):
        if path.is_file() and path.stat().st_mode & 0o077:
            path.chmod(0o600)


def _remove_old_clusters(all_clusters: Path, keep: int = 3) -> None:
    """Delete what earlier local clusters left (logs), except the newest few; a folder is named by its owner's pid."""
    ended: list[tuple[float, Path]] = []
    for path in all_clusters.iterdir():
        if path.is_symlink() or (path.name.isdigit() and psutil.pid_exists(int(path.name))):
            continue
        with contextlib.suppress(FileNotFoundError):  # another command may be tidying up at the same time
            ended.append((path.stat().st_mtime, path))
    for _, folder in sorted(ended)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)
