"""Builds and loads the compiled CPU kernel of block-sparse attention (`block_attention.cpp`).

Compiled at first use by the machine's C++ compiler into a folder of the user, once for each source, compiler and
processor, and loaded by ctypes. Does not import torch, so that a process without it can build ahead.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

_LOG = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("block_attention.cpp")
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
    "-pthread",
)
_COMPILERS = ("g++", "c++", "clang++")
_COMPILE_TIMEOUT_S = 300


class FusedUnavailableError(RuntimeError):
    """The CPU kernel cannot be built or loaded on this machine; the message names the reason."""


@lru_cache(maxsize=1)
def load_kernel() -> ctypes.CDLL:
    """The compiled kernel, built if it is not there yet. Raises FusedUnavailableError with the reason."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise FusedUnavailableError(f"no C++ compiler found (looked for {', '.join(_COMPILERS)})")
    try:
        library = _library_path(compiler)
        kernel = _load_or_build(compiler, library)
    except (OSError, subprocess.SubprocessError) as error:
        raise FusedUnavailableError(f"building or loading it with {compiler} failed: {error}") from error
    kernel.svitt_check.restype = ctypes.c_char_p
    kernel.svitt_scratch_floats.restype = ctypes.c_int64
    return kernel


@lru_cache(maxsize=1)
def unavailable_reason() -> str | None:
    """None where the kernel can be used, else why not. Builds it at the first call."""
    try:
        load_kernel()
    except FusedUnavailableError as error:
        return str(error)
    return None


@lru_cache(maxsize=1)
def warn_if_unavailable() -> bool:
    """True where the kernel can be used. Where not, the reason is said once as a warning of the log."""
    reason = unavailable_reason()
    if reason is not None:
        _LOG.warning(
            "attention runs without its compiled CPU kernel, slower and with more memory: %s", reason
        )
    return reason is None


def _load_or_build(compiler: str, library: Path) -> ctypes.CDLL:
    if library.exists():
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            _LOG.warning("building the CPU attention kernel again: %s is damaged (%s)", library, error)
            library.unlink(missing_ok=True)
    with FileLock(
        library.with_suffix(".lock"), timeout=_COMPILE_TIMEOUT_S
    ):  # the ranks of a machine come here at the same moment
        if not library.exists():
            _compile(compiler, library)
    return ctypes.CDLL(str(library))


def _library_path(compiler: str) -> Path:
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    key = "\n".join((_SOURCE.read_text(), version, *_FLAGS, _processor()))
    name = f"block_attention-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    try:
        folder = Path.home() / ".cache" / "svitt-ego"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder / name
    except (OSError, RuntimeError):
        pass  # said below, as for a folder that is there and cannot be written to
    folder = Path(tempfile.mkdtemp(prefix="svitt-ego-"))
    _LOG.warning("no cache folder below the home folder can be written to; the kernel is built in %s", folder)
    return folder / name


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _compile(compiler: str, library: Path) -> None:
    """Writes `library` whole or not at all."""
    start = time.perf_counter()
    handle, part = tempfile.mkstemp(dir=library.parent, suffix=".part")
    os.close(handle)
    try:
        run = subprocess.run(
            [compiler, *_FLAGS, str(_SOURCE), "-o", part],
            capture_output=True,
            text=True,
            timeout=_COMPILE_TIMEOUT_S,
        )
        if run.returncode:
            raise FusedUnavailableError(f"{compiler} could not compile {_SOURCE}:\n{run.stderr[-2000:]}")
        os.replace(part, library)
    finally:
        Path(part).unlink(missing_ok=True)
    _LOG.info("compiled the CPU attention kernel in %.1f s: %s", time.perf_counter() - start, library)
