"""One optimizer step: a batch becomes losses becomes a weight update, in micro-batches where it does not fit whole.

The step computes `model.objective.training_losses` of the whole batch over all ranks, whatever the micro-batch. It
goes over the batch twice, as gradient caching does (Gao et al., arXiv 2101.06983): first all features without graph,
for the contrastive loss, its gradient and the negatives; then each micro-batch again with graph, to which the cached
gradient is handed. A batch that is one micro-batch is encoded once.
"""

import gc
import logging
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from infra.engine import Engine
from infra.memory_budget import is_out_of_memory
from jobs.batch_work import BatchWork, MemoryShortageError
from jobs.ranks import Ranks
from jobs.rehearsal import RehearsalWork
from jobs.train_loop import HalvedError, NonFiniteError, TrainingError
from model.step_key import StepKey
from pipeline.loader import Batch

logger = logging.getLogger(__name__)

_ADVICE = (
    "Set recompute: all, then offload_activations: true, in model.video and model.text, engine.zero_stage 2 or 3, or "
    "engine.offload_optimizer: cpu; or train with fewer frames, a lower keep_rate or more ranks. svitt plan finds what "
    "fits"
)


class TrainStep:
    """Computes the losses of a global batch, of which each rank holds equally many rows, and updates the weights.

    Every draw is a function of (seed, step, clip), so a repeated step repeats, and neither `micro_batch_size` nor the
    number of ranks changes what is computed. None: all rows of a rank at once. Where memory runs out, all ranks halve
    the micro-batch and do the step again; `remember` is told the new size.
    """

    def __init__(
        self,
        engine: Engine,
        seed: int,
        ranks: Ranks,
        learning_rate_at: Callable[[int], float],
        micro_batch_size: int | None = None,
        remember: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.engine, self.seed, self.ranks, self.learning_rate_at = engine, seed, ranks, learning_rate_at
        self.micro_batch_size, self.remember = micro_batch_size, remember

    def __call__(self, step: int, batch: Batch) -> Float[Tensor, " metrics"]:
        """Returns loss, vtc, vtm, mlm and the gradient norm, detached, in the order of StepMetrics.

        The mean over ranks of each is that of the whole batch. Raises NonFiniteError on all ranks, with the gradient
        thrown away and the weights as they were, when a loss or a gradient of one of them is not finite.
        """
        losses = self.gradient(step, batch)
        self._require_finite(step, losses)
        self.engine.step(self.learning_rate_at(step))
        return torch.cat([losses, losses.new_tensor([self.engine.grad_norm or 0.0])])

    def _require_finite(self, step: int, losses: Float[Tensor, " 4"]) -> None:
        is_finite = bool(losses.isfinite().all()) and self.engine.has_finite_gradient()
        if not self.ranks.any(not is_finite):
            return
        self.engine.discard()
        names = ("loss", "vtc", "vtm", "mlm")
        found = self.ranks.gather(
            None
            if is_finite
            else ", ".join(f"{n} {v:.4g}" for n, v in zip(names, losses.tolist(), strict=True))
        )
        told = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(found) if text)
        raise NonFiniteError(f"step {step}: loss or gradient is not finite ({told})")

    def rehearse(self, batch: Batch, reserved_bytes: int = 0) -> None:
        """Computes a gradient as costly as any of the stage and throws it away: memory that does not suffice shows
        before there is work to lose. `batch` is that of `rehearsal_batch`; `reserved_bytes` are left free, for what the
        first update will bring. Raises TrainingError as `gradient` does.
        """
        try:
            reserved = torch.empty(reserved_bytes, dtype=torch.uint8, device=self.engine.device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"memory does not suffice for the {reserved_bytes / 2**20:.0f} MiB of the optimizer's moments "
                f"({str(error).splitlines()[0]}). {_ADVICE}"
            ) from error
        self._gradient(0, batch, RehearsalWork)
        del reserved
        self.engine.discard()

    def gradient(self, step: int, batch: Batch) -> Float[Tensor, " 4"]:
        """All of a step but the update; returns loss, vtc, vtm, mlm. Raises TrainingError when memory is too small
        for one clip at a time.
        """
        return self._gradient(step, batch, BatchWork)

    def _gradient(self, step: int, batch: Batch, kind: type[BatchWork]) -> Float[Tensor, " 4"]:
        while True:
            try:
                with self.engine.accumulate():
                    key = StepKey(self.seed, step)
                    return kind(self.engine, batch, key, self.ranks, self.micro_batch_size).run()
            except MemoryShortageError as shortage:
                self.engine.discard()
                self._halve(step, len(batch.index_B), str(shortage))
            # Outside of the handler, which holds the frames and so the tensors of what failed. They may lie in a cycle
            # with their exception: on Python 3.12 they do, by `contextmanager`.
            gc.collect()
            if self.engine.device.type == "cuda":
                torch.cuda.empty_cache()

    def _halve(self, step: int, num_rows: int, shortage: str) -> None:
        size = min(self.micro_batch_size or num_rows, num_rows)
        if size == 1:
            raise TrainingError(
                f"step {step}: memory does not suffice for one clip at a time ({shortage}). {_ADVICE}"
            )
        self.micro_batch_size = size // 2
        logger.warning(
            "step %d: out of memory with %d clips at once (%s); done again with %d, the losses stay the same",
            step,
            size,
            shortage,
            self.micro_batch_size,
        )
        self.remember(self.micro_batch_size)
        if self.engine.calls_are_collective:
            # Other ranks may wait inside a call that this one has left: the stage starts again from its checkpoint.
            raise HalvedError(
                f"step {step}: out of memory with {size} clips at once; the stage goes on from its last checkpoint "
                f"with {self.micro_batch_size} ({shortage})"
            )
