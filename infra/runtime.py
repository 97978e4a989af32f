"""What a process needs before heavy imports, where it came from, and how much memory it took.

The only module that reads or sets environment variables for the whole process.
"""

import contextlib
import ctypes
import logging
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "ray", "deepspeed", "mlflow", "webdataset", "transformers", "numpy", "av")
# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_BYTES = 2**30
# Of the processes of a training stage, from their start on: Ray Train trains in a thread, and memory of threads lies in
# pieces of 64 MiB that glibc hands back to the kernel whatever `keep_freed_memory` says, unless there is but one arena.
RANK_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
_DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")


def prepare_process(environ: MutableMapping[str, str] | None = None) -> None:
    """Set the environment defaults that Ray, DeepSpeed, MLflow and WebDataset read at import.

    A value already set by the user is left alone. Call it first in every entry point; children inherit.
    """
    environ = os.environ if environ is None else environ
    for name, value in _defaults(has_gpu=_has_gpu(environ)).items():
        environ.setdefault(name, value)
    # ninja and other console tools stand beside the interpreter; a bare PATH would hide them from DeepSpeed.
    bin_dir = str(Path(sys.executable).parent)
    if bin_dir not in environ.get("PATH", "").split(os.pathsep):
        environ["PATH"] = os.pathsep.join(filter(None, (bin_dir, environ.get("PATH", ""))))


def prepare_worker(num_threads: int) -> None:
    """Give this process `num_threads` compute threads (torch and OpenMP), let it keep memory that tensors free,
    quiet third-party loggers, and keep MLflow out of it.
    """
    import torch

    # DeepSpeed's autotuner, which comes with every import of DeepSpeed, takes MLflow in where it can: 1.3 s a rank.
    sys.modules.setdefault("mlflow", None)  # pyright: ignore[reportArgumentType]
    torch.set_num_threads(num_threads)
    keep_freed_memory()
    for name in ("DeepSpeed", "alembic", "mlflow.store.db.utils", "filelock"):
        logging.getLogger(name).setLevel(logging.WARNING)


def compute_repeatably() -> None:
    """On a GPU: operations that add up in the order of chance give way to those that repeat to the last bit.

    An operation that has no such form is warned of, once.
    """
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    # Fresh memory is written before it is read; filling it first would cost a pass over each tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def keep_freed_memory() -> bool:
    """Tell glibc to reuse freed memory instead of handing large blocks back to the kernel at every step.

    A step allocates the same tensors again and again, and each return costs their page faults anew. In a thread other
    than the first it needs `RANK_ENVIRONMENT` besides. Returns False where the C library is another one, which then
    stays as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_THRESHOLD, _LARGE_BYTES), (_M_TRIM_THRESHOLD, 2 * _LARGE_BYTES - 1))
    return all(bool(mallopt(name, value)) for name, value in settings)


def provenance(repository: Path | None = None) -> dict[str, Any]:
    """Commit, package versions and host facts of this process, as plain JSON values without paths or names.

    `repository` defaults to the checkout this package was imported from; `commit` is None outside of git.
    """
    root = repository or Path(__file__).resolve().parent.parent
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no") if commit else None
    return {
        "commit": commit,
        "is_dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "packages": _versions(),
        "os": platform.system(),
        "machine": platform.machine(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _gpu_names(),
    }


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _defaults(has_gpu: bool) -> dict[str, str]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    defaults = {
        "RAY_AUTH_MODE": "token",  # without it the HTTP client sends no token and gets 401
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # keep CUDA_VISIBLE_DEVICES for tasks that ask for no GPU
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise every worker line comes twice
        "RAY_worker_niceness": "0",  # at Ray's 15, ranks of a local cluster wait for a core when a daemon wakes
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # our journal retries; MLflow's own would block for minutes
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
        "WDS_SECURE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_EXTENSIONS_DIR": str(cache / "svitt-ego" / "torch_extensions"),
        "DO_NOT_TRACK": "1",
    }
    if has_gpu:
        # One workspace of a fixed size: without it cuBLAS may take another way from run to run.
        defaults["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    else:
        defaults["DS_ACCELERATOR"] = "cpu"
    return defaults


def _has_gpu(environ: MutableMapping[str, str]) -> bool:
    """Whether an NVIDIA device may be used; answered without importing torch."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in _PACKAGES + _DALI:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _gpu_names() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@contextlib.contextmanager
def environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Change environment variables for the duration of a `with` block; None removes one."""
    before = {name: os.environ.get(name) for name in changes}
    _assign(changes)
    try:
        yield
    finally:
        _assign(before)


def _assign(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
