"""DeepSpeed's C++ operations: built once into TORCH_EXTENSIONS_DIR, at first use or ahead with `make native`.

torch guards a build by a file named `lock`. A killed build leaves it behind, and every later run then waits for
ever without a word. Here a lock of the operating system, which ends with its process, stands around the build:
whoever holds it knows that a `lock` file belongs to nobody, and deletes it.
"""

import argparse
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from infra.runtime import prepare_process

logger = logging.getLogger(__name__)

OpName = Literal["cpu_adam", "async_io"]
_BUILDERS: dict[OpName, str] = {"cpu_adam": "CPUAdamBuilder", "async_io": "AsyncIOBuilder"}
# What an operation builds besides itself, each in a folder (with a `lock`) of its own.
_PARTS: dict[OpName, tuple[str, ...]] = {"cpu_adam": ("cpu_adam",), "async_io": ("pin_memory", "async_io")}
_FIRST_BUILD_S = 900.0


class NativeBuildError(Exception):
    """An operation that cannot be built or loaded on this machine."""


def load(name: OpName) -> Any:
    """The compiled module; built first where it is missing, which takes 1 to 2 minutes.

    Ranks of one host may call it together: one builds, the others wait. Raises NativeBuildError, which names
    what is missing.
    """
    folder = build_folder()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name}.guard")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for another process that builds or loads DeepSpeed's %s in %s", name, folder)
        try:
            lock.acquire(timeout=_FIRST_BUILD_S)
        except Timeout:
            raise NativeBuildError(
                f"waited {_FIRST_BUILD_S:.0f} s for another process that holds {lock.lock_file} to build "
                f"{name}; end that process and start again"
            ) from None
    try:
        clear_stale_locks(name)
        return _build(name, folder)
    finally:
        lock.release()


def is_built(name: OpName) -> bool:
    """Whether `load` finds the operation ready."""
    return (build_folder() / name / f"{name}.so").is_file()


def build_folder() -> Path:
    """Where operations are built. Raises NativeBuildError if `runtime.prepare_process` was not called before."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not folder:
        raise NativeBuildError(
            "TORCH_EXTENSIONS_DIR is not set; call runtime.prepare_process() first, or set it to a writable folder"
        )
    return Path(folder)


def clear_stale_locks(name: OpName) -> list[Path]:
    """Delete what killed builds left; only for the holder of the guard. Returns the files deleted."""
    stale = [path for part in _PARTS[name] if (path := build_folder() / part / "lock").exists()]
    for path in stale:
        logger.warning("deleted %s, left by a build that was killed: it would block every later run", path)
        path.unlink(missing_ok=True)
    return stale


def _build(name: OpName, folder: Path) -> Any:
    from deepspeed.accelerator import get_accelerator  # heavy: only where it is used

    accelerator: Any = get_accelerator()
    builder = accelerator.create_op_builder(_BUILDERS[name])
    if not is_built(name):
        _require_tools(name, builder)
        logger.info("building DeepSpeed's %s into %s: 1 to 2 minutes, once per machine", name, folder)
    try:
        return builder.load(verbose=False)
    except Exception as error:  # the compiler, the linker and the loader each raise their own
        cause = error if error.__cause__ is None else error.__cause__
        raise NativeBuildError(f"building DeepSpeed's {name} in {folder} failed: {cause}") from error


def _require_tools(name: OpName, builder: Any) -> None:
    compiler = os.environ.get("CXX", "c++")
    missing = [tool for tool in (compiler, "ninja") if shutil.which(tool) is None]
    if missing:
        raise NativeBuildError(
            f"building DeepSpeed's {name} needs {' and '.join(missing)}, not found on PATH; install a C++ compiler "
            "(Debian, Ubuntu: apt-get install g++) and ninja (pip install ninja)"
        )
    if name == "async_io" and not builder.has_function("io_submit", ("aio",)):
        raise NativeBuildError(
            "DeepSpeed's async_io needs libaio with its header, not found here; install it (Debian, Ubuntu: "
            "apt-get install libaio-dev; Red Hat: dnf install libaio-devel), or name its folders in CFLAGS and LDFLAGS"
        )


def main() -> None:
    """Build the named operations (by default cpu_adam) ahead of the first run that needs them."""
    parser = argparse.ArgumentParser(prog="python -m infra.native_ops", description=main.__doc__)
    parser.add_argument("--name", choices=list(_BUILDERS), action="append", help="default: cpu_adam")
    names: list[OpName] = parser.parse_args().name or ["cpu_adam"]
    prepare_process()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in names:
        try:
            load(name)
        except NativeBuildError as error:
            raise SystemExit(f"error: {error}") from None
        logger.info("DeepSpeed's %s is ready in %s", name, build_folder())


if __name__ == "__main__":
    main()
