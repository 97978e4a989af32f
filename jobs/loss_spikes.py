"""Losses that stand out from those before them: told and counted, nothing is left out for them."""

import math
from collections import deque
from statistics import fmean, pstdev

# Below this many losses there is no saying what is usual.
_FEWEST = 16


class SpikeWatch:
    """A rolling z-score over the last `window` losses, as in OLMo-core's skip-step optimizer (6 sigma, 128 steps)."""

    def __init__(self, window: int, sigma: float) -> None:
        self._losses: deque[float] = deque(maxlen=window)
        self._sigma = sigma

    def add(self, loss: float) -> float | None:
        """How many standard deviations the loss lies above the mean of those before it, if that is a spike.

        A spike does not count as usual for the ones after it.
        """
        if len(self._losses) >= min(_FEWEST, self._losses.maxlen or _FEWEST):
            spread = max(pstdev(self._losses), 1e-12)
            score = (loss - fmean(self._losses)) / spread
            if score > self._sigma:
                return score
        if math.isfinite(loss):
            self._losses.append(loss)
        return None
