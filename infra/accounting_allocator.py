"""Builds and loads the allocator that counts torch's CPU memory (`accounting_allocator.cpp`).

Compiled at first use against the headers that torch brings, into a folder of the user, once for each source,
compiler and torch, and loaded by ctypes. Loading it changes nothing yet: `memory_budget` installs it.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("accounting_allocator.cpp")
_FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC")
_COMPILERS = ("g++", "c++", "clang++")
_COMPILE_TIMEOUT_S = 300
# Result and arguments of every function, without the prefix.
_FUNCTIONS: Mapping[str, tuple[Any, Sequence[Any]]] = {
    "install": (ctypes.c_char_p, ()),
    "set_limit": (None, (ctypes.c_int64,)),
    "limit": (ctypes.c_int64, ()),
    "live": (ctypes.c_int64, (ctypes.c_int64,)),
    "peak": (ctypes.c_int64, (ctypes.c_int64,)),
    "reset_peaks": (None, ()),
    "fail": (None, (ctypes.c_int64, ctypes.c_int64)),
    "enter_host": (None, ()),
    "leave_host": (None, ()),
    "move_to_host": (ctypes.c_bool, (ctypes.c_void_p,)),
}


class AllocatorBuildError(Exception):
    """The allocator cannot be built or loaded on this machine; the message names the reason."""


@lru_cache(maxsize=1)
def load_allocator() -> ctypes.CDLL:
    """The compiled allocator, built if it is not there yet. Raises AllocatorBuildError with the reason."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise AllocatorBuildError(
            f"no C++ compiler found (looked for {', '.join(_COMPILERS)}); install one (Debian, Ubuntu: "
            "apt-get install g++)"
        )
    try:
        loaded = _load_or_build(compiler, _library_path(compiler))
    except (OSError, subprocess.SubprocessError, Timeout) as error:
        raise AllocatorBuildError(f"building or loading it with {compiler} failed: {error}") from error
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, f"svitt_budget_{name}")
        function.restype, function.argtypes = result, arguments
    return loaded


def _load_or_build(compiler: str, library: Path) -> ctypes.CDLL:
    if library.exists():
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            logger.warning("building the accounting allocator again: %s is damaged (%s)", library, error)
            library.unlink(missing_ok=True)
    # The ranks of a machine come here at the same moment.
    with FileLock(library.with_suffix(".lock"), timeout=_COMPILE_TIMEOUT_S):
        if not library.exists():
            _compile(compiler, library)
    return ctypes.CDLL(str(library))


def _library_path(compiler: str) -> Path:
    import torch  # also loads libc10, against which the allocator is linked

    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    key = "\n".join((_SOURCE.read_text(), version, *_FLAGS, torch.__version__))
    name = f"accounting_allocator-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    try:
        folder = Path.home() / ".cache" / "svitt-ego"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder / name
    except (OSError, RuntimeError):
        pass  # said below, as for a folder that is there and cannot be written to
    folder = Path(tempfile.mkdtemp(prefix="svitt-ego-"))
    logger.warning(
        "no cache folder below the home folder can be written to; the allocator is built in %s", folder
    )
    return folder / name


def _compile(compiler: str, library: Path) -> None:
    """Writes `library` whole or not at all."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths  # slow to import, and seldom needed

    start = time.perf_counter()
    includes = (f"-I{path}" for path in include_paths())
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    libraries = (*(f"-L{path}" for path in library_paths()), "-lc10")
    handle, part = tempfile.mkstemp(dir=library.parent, suffix=".part")
    os.close(handle)
    try:
        run = subprocess.run(
            [compiler, *_FLAGS, abi, *includes, str(_SOURCE), *libraries, "-o", part],
            capture_output=True,
            text=True,
            timeout=_COMPILE_TIMEOUT_S,
        )
        if run.returncode:
            raise AllocatorBuildError(f"{compiler} could not compile {_SOURCE}:\n{run.stderr[-2000:]}")
        os.replace(part, library)
    finally:
        Path(part).unlink(missing_ok=True)
    logger.info("compiled the accounting allocator in %.1f s: %s", time.perf_counter() - start, library)
