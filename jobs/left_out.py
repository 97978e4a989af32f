"""Steps that are left out of training, with what they showed: damaged clips, losses that are not finite, and windows
that are skipped after a rollback. All stand in the ledger, so that a run started again leaves out the same.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from infra.journal import Tracker
from infra.ledger import Ledger
from jobs.ranks import Ranks
from jobs.summary import DAMAGED_STEPS, NON_FINITE_STEPS, SKIPPED_WINDOWS
from jobs.train_loop import NonFiniteError, RollbackError, TrainingError
from pipeline.errors import ClipError

logger = logging.getLogger(__name__)


class LeftOutSteps:
    """What the loop asks and tells about steps without an update. Every method but `is_skipped` is collective."""

    def __init__(
        self,
        ledger: Ledger,
        stage: int,
        ranks: Ranks,
        tracker: Tracker,
        max_damaged_steps: int,
        max_nonfinite_in_a_row: int,
    ) -> None:
        self._ledger, self._stage = ledger, stage
        self._ranks, self._tracker = ranks, tracker
        self._max_damaged, self._max_in_a_row = max_damaged_steps, max_nonfinite_in_a_row
        windows = ranks.gather(ledger.read().stage(stage).facts.get(SKIPPED_WINDOWS, []))[0]
        self._skipped = [range(first, end) for first, end in windows]

    def is_skipped(self, step: int) -> bool:
        """Whether the step lies in a window that a rollback took out."""
        return any(step in window for window in self._skipped)

    def damaged(self, step: int, error: ClipError | None) -> None:
        """A rank met a damaged clip; `error` on that rank, None on the others. Raises TrainingError on all ranks when
        more steps than the budget were left out.
        """
        found = [text for text in self._ranks.gather(str(error) if error is not None else None) if text]
        known = self._record_damaged(step, found)
        logger.warning("step %d is left out, %d so far: %s", step, len(known), "; ".join(found))
        self._tracker.metrics(step + 1, {"data/damaged_steps": float(len(known))})
        if len(known) > self._max_damaged:
            listed = "\n".join(f"    step {number}: {'; '.join(texts)}" for number, texts in known.items())
            raise TrainingError(
                f"stage {self._stage}: {len(known)} steps had damaged clips, loader.max_damaged_steps allows "
                f"{self._max_damaged}:\n{listed}\nRun svitt prepare RECIPE --repair, which rebuilds what is damaged, "
                "and resume the run"
            )

    def non_finite(
        self, step: int, in_a_row: int, clip_ids: Sequence[str], error: NonFiniteError, saved: int
    ) -> None:
        """A loss or gradient was not finite on some rank, so none of them made the update; `saved` is the step of the
        newest checkpoint. After too many in a row the steps since it are taken out for good and RollbackError is
        raised on all ranks: the stage goes on from that checkpoint behind them.
        """
        clips = [name for names in self._ranks.gather(tuple(clip_ids)) for name in names]
        known = self._add(NON_FINITE_STEPS, step, {"found": str(error), "clips": clips})
        logger.warning("step %d is left out, its clips stand in the ledger: %s", step, error)
        self._tracker.metrics(step + 1, {"train/nonfinite_steps": float(len(known))})
        if in_a_row < self._max_in_a_row:
            return
        window = (saved, step + 1)
        if self._ranks.rank == 0:
            state = self._ledger.read().stage(self._stage)
            windows = [*state.facts.get(SKIPPED_WINDOWS, []), window]
            self._ledger.record_stage(self._stage, state.status, **{SKIPPED_WINDOWS: windows})
        raise RollbackError(
            f"stage {self._stage}: {in_a_row} steps in a row were not finite ({error}); it goes on from the checkpoint "
            f"of step {saved} and leaves out steps {window[0]} to {window[1] - 1}"
        )

    def _record_damaged(self, step: int, found: Sequence[str]) -> Mapping[str, Sequence[str]]:
        return self._add(DAMAGED_STEPS, step, list(found))

    def _add(self, fact: str, step: int, value: Any) -> Mapping[str, Any]:
        """Under the number of the step, so that a step met again counts once. What stands there now, on all ranks."""
        known: Mapping[str, Any] | None = None
        if self._ranks.rank == 0:
            state = self._ledger.read().stage(self._stage)
            known = {**state.facts.get(fact, {}), str(step): value}
            self._ledger.record_stage(self._stage, state.status, **{fact: known})
        return self._ranks.gather(known)[0]
