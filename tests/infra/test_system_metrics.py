"""The load of a machine under the names of the journal."""

import ctypes
from pathlib import Path
from typing import Any

from infra.system_metrics import Gpu, SystemMetrics, cpu_name, open_gpu


class FakeNvml:
    """Answers as NVIDIA's library does: 0 where it has filled in what it was given."""

    def __init__(self, is_refused: bool = False) -> None:
        self.is_refused = is_refused

    def nvmlDeviceGetUtilizationRates(self, handle: Any, used: Any) -> int:  # noqa: N802
        used._obj.gpu = 63
        return 3 if self.is_refused else 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:  # noqa: N802
        memory._obj.used = 3 * 2**30
        return 0


def test_a_machine_without_gpu_tells_cpu_memory_and_disk(tmp_path: Path) -> None:
    values = SystemMetrics(tmp_path).sample()
    assert set(values) == {
        "system/process_cpu_percent",
        "system/cpu_percent",
        "system/rss_gib",
        "system/free_memory_gib",
        "system/free_disk_gib",
    }
    assert 0.01 < values["system/rss_gib"] < 100
    assert values["system/free_disk_gib"] > 0


def test_a_gpu_tells_its_load_and_memory_and_leaves_out_what_it_refuses(tmp_path: Path) -> None:
    def sample(nvml: Any) -> dict[str, float]:
        values = SystemMetrics(tmp_path, Gpu(nvml, ctypes.c_void_p())).sample()
        return {name: value for name, value in values.items() if "gpu" in name}

    assert sample(FakeNvml()) == {"system/gpu_percent": 63.0, "system/gpu_memory_gib": 3.0}
    assert sample(FakeNvml(is_refused=True)) == {"system/gpu_memory_gib": 3.0}


def test_a_gpu_that_is_not_there_is_none() -> None:
    assert open_gpu("ffffffff:ff:1f.0") is None


def test_a_processor_is_called_as_its_maker_calls_it(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: A Chip @ 2 GHz\nmodel name\t: A Chip @ 2 GHz\n")
    assert cpu_name(info) == "A Chip @ 2 GHz"
    assert cpu_name(tmp_path / "none")
