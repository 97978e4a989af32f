"""Steps that are left out of training because a clip of theirs is damaged: counted over all attempts, with a budget."""

import logging
from collections.abc import Mapping, Sequence

from infra.journal import Tracker
from infra.ledger import Ledger
from jobs.ranks import Ranks
from jobs.summary import DAMAGED_STEPS, damaged_steps
from jobs.train_loop import TrainingError
from pipeline.errors import ClipError

logger = logging.getLogger(__name__)


class DamagedSteps:
    """A `Hooks.leave_out`: writes the step to the ledger and the metrics, and stops the stage above the budget."""

    def __init__(self, ledger: Ledger, stage: int, max_steps: int, ranks: Ranks, tracker: Tracker) -> None:
        self._ledger, self._stage, self._max_steps = ledger, stage, max_steps
        self._ranks, self._tracker = ranks, tracker

    def __call__(self, step: int, error: ClipError | None) -> None:
        """Collective. Raises TrainingError on all ranks when more steps than the budget were left out."""
        found = [text for text in self._ranks.gather(str(error) if error is not None else None) if text]
        known = self._ranks.gather(self._record(step, found) if self._ranks.rank == 0 else None)[0]
        logger.warning("step %d is left out, %d so far: %s", step, len(known), "; ".join(found))
        self._tracker.metrics(step + 1, {"data/damaged_steps": float(len(known))})
        if len(known) > self._max_steps:
            listed = "\n".join(f"    step {number}: {'; '.join(texts)}" for number, texts in known.items())
            raise TrainingError(
                f"stage {self._stage}: {len(known)} steps had damaged clips, loader.max_damaged_steps allows "
                f"{self._max_steps}:\n{listed}\nRun svitt prepare RECIPE --repair, which rebuilds what is damaged, and "
                "resume the run"
            )

    def _record(self, step: int, found: Sequence[str]) -> Mapping[str, Sequence[str]]:
        state = self._ledger.read().stage(self._stage)
        known = {**damaged_steps(state), str(step): list(found)}
        self._ledger.record_stage(self._stage, state.status, **{DAMAGED_STEPS: known})
        return known
