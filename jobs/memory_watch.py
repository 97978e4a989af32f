"""Device memory of a stage while it runs: the limit that is enforced, what was predicted, what is measured."""

import logging
from collections.abc import Sequence

import torch

from infra.memory_budget import Budget, MemoryBudgetError, device_budget, parse_memory
from jobs.memory_plan import Prediction
from jobs.ranks import Ranks

logger = logging.getLogger(__name__)

MIB = 2**20
# A prediction that is further off than this is worth a word.
TOLERANCE = 0.1


def open_budget(device: torch.device, limit: str | None) -> tuple[Budget | None, int]:
    """The device's budget, kept from now on, and the bytes that were there before. None where memory cannot be counted
    and nothing has to be enforced. Raises MemoryBudgetError.
    """
    try:
        before = device_budget(device, None).live_bytes()
    except MemoryBudgetError as error:
        if limit is not None:
            raise
        logger.warning("device memory is neither predicted nor measured: %s", error)
        return None, 0
    return device_budget(device, None if limit is None else before + parse_memory(limit)), before


def batches_that_fit(wanted: int, batch_bytes: int, free_bytes: int) -> int:
    """How many batches may be decoded ahead: at most `wanted`, in half of the free host memory, and at least one.

    Another one is being decoded and one is in use meanwhile. Fewer than wanted are a warning of the log.
    """
    fitting = max(1, free_bytes // 2 // batch_bytes - 2)
    if fitting < wanted:
        logger.warning(
            "host memory: %d batches of %.0f MiB ahead do not fit in half of the %.0f MiB that are free for each "
            "rank; %d from now on. Lower loader.prefetch_batches or global_batch_size, or add hosts",
            wanted,
            batch_bytes / MIB,
            free_bytes / MIB,
            fitting,
        )
    return min(wanted, fitting)


class MemoryWatch:
    """Compares the largest peak of all ranks with the prediction, and says so once for each size that is reached."""

    def __init__(self, budget: Budget, bytes_before: int, predicted: Prediction, ranks: Ranks) -> None:
        self._budget, self._before, self._ranks = budget, bytes_before, ranks
        self.predicted = predicted
        self._said_bytes = 0

    def measure(self) -> int:
        """Largest peak of any rank so far in bytes. Collective."""
        peak = int(self._ranks.max([float(self._budget.peak_bytes() - self._before)])[0])
        if peak > self._said_bytes and self._ranks.rank == 0:
            self._say(peak)
        self._said_bytes = max(peak, self._said_bytes)
        return peak

    def _say(self, peak: int) -> None:
        error = self.predicted.total / peak - 1
        line = "device memory: predicted %.0f MiB (%s), measured %.0f MiB (%+.1f %%)"
        values: Sequence[object] = (
            self.predicted.total / MIB,
            self.predicted.moment,
            peak / MIB,
            100 * error,
        )
        logger.info(line, *values)
        if abs(error) > TOLERANCE:
            logger.warning(
                line + "; svitt plan is off by as much on this machine: leave it more room", *values
            )
