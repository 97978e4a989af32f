"""How busy the machine of a process is: CPU, memory, disk, and the GPU where NVIDIA's library is there.

Read between two reports of a training process: some system calls, no thread of its own.
"""

import ctypes
import logging
import platform
import shutil
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

_GIB = 2**30


class SystemMetrics:
    """Samples under the names of the journal, `system/*`. Percent of CPU are since the sample before, of one core for
    this process and of all cores for its machine.
    """

    def __init__(self, folder: Path, gpu: "Gpu | None" = None) -> None:
        """`folder` lies on the disk whose free space is told."""
        self._folder, self._gpu = folder, gpu
        self._process = psutil.Process()
        self._process.cpu_percent()
        psutil.cpu_percent()

    def sample(self) -> dict[str, float]:
        values = {
            "system/process_cpu_percent": self._process.cpu_percent(),
            "system/cpu_percent": psutil.cpu_percent(),
            "system/rss_gib": self._process.memory_info().rss / _GIB,
            "system/free_memory_gib": psutil.virtual_memory().available / _GIB,
            "system/free_disk_gib": shutil.disk_usage(self._folder).free / _GIB,
        }
        return values | (self._gpu.sample() if self._gpu is not None else {})


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Gpu:
    """One device by NVML, the library that comes with NVIDIA's driver."""

    def __init__(self, nvml: ctypes.CDLL, handle: ctypes.c_void_p) -> None:
        self._nvml, self._handle = nvml, handle

    def sample(self) -> dict[str, float]:
        """What the device tells; a value it refuses is left out."""
        values: dict[str, float] = {}
        used, memory = _Utilization(), _Memory()
        if self._nvml.nvmlDeviceGetUtilizationRates(self._handle, ctypes.byref(used)) == 0:
            values["system/gpu_percent"] = float(used.gpu)
        if self._nvml.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory)) == 0:
            values["system/gpu_memory_gib"] = memory.used / _GIB
        return values


def open_gpu(bus_id: str) -> Gpu | None:
    """The device at a PCI address such as 00000000:04:00.0; None, and a line in the log, where NVML lacks it."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        logger.info("no GPU load among the system metrics: %s", error)
        return None
    handle = ctypes.c_void_p()
    code = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByPciBusId_v2(bus_id.encode(), ctypes.byref(handle))
    if code:
        logger.info("no GPU load among the system metrics: NVML answers %d for the device %s", code, bus_id)
        return None
    return Gpu(nvml, handle)


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model as Linux tells it, else its architecture."""
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
