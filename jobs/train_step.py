"""One optimizer step: a batch becomes losses becomes a weight update, in micro-batches where it does not fit whole.

The step computes `model.objective.training_losses` of the whole batch over all ranks, whatever the micro-batch. It
goes over the batch twice, as gradient caching does (Gao et al., arXiv 2101.06983): first all features without graph,
for the contrastive loss, its gradient and the negatives; then each micro-batch again with graph, to which the cached
gradient is handed. A batch that is one micro-batch is encoded once.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from infra.engine import Engine
from infra.memory_budget import is_out_of_memory
from jobs.pair_plan import BatchSplit, PairChunk, plan_pairs
from jobs.ranks import Ranks
from jobs.train_loop import TrainingError
from model.collectives import all_gather_rows, sum_over_ranks
from model.contrastive_tiles import ContrastiveResult, contrastive_tiles
from model.losses import ActionTags
from model.objective import (
    Captions,
    EncodedRows,
    HiddenWords,
    Pairs,
    encode_rows,
    hidden_words,
    hide_words,
    negatives_of,
    pair_losses,
)
from model.step_key import StepKey
from model.video_text_model import VideoTextModel
from pipeline.loader import Batch

logger = logging.getLogger(__name__)

# SViTT takes BEiT's normalisation: pixels scaled to [0, 1], mean and standard deviation 0.5.
PIXEL_MIDDLE = 127.5
# Similarities looked at together when negatives are drawn.
_SIMILARITIES_AT_ONCE = 2**17


def normalise(
    video_BTCHW: UInt8[Tensor, "B T C H W"], device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "B T C H W"]:
    """uint8 pixels to [-1, 1] on the device; only bytes cross to it."""
    return (video_BTCHW.to(device, non_blocking=True).float() / PIXEL_MIDDLE - 1).to(dtype)


class MemoryShortageError(RuntimeError):
    """A rank ran out of memory; raised on all ranks, unless the others wait inside a collective call."""


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

        The mean over ranks of each is that of the whole batch.
        """
        losses = self.gradient(step, batch)
        self.engine.step(self.learning_rate_at(step))
        return torch.cat([losses, losses.new_tensor([self.engine.grad_norm or 0.0])])

    def rehearse(self, batch: Batch) -> None:
        """Computes a gradient and throws it away: memory that does not suffice shows before there is work to lose."""
        self.gradient(0, batch)
        self.engine.discard()

    def gradient(self, step: int, batch: Batch) -> Float[Tensor, " 4"]:
        """All of a step but the update; returns loss, vtc, vtm, mlm. Raises TrainingError when memory is too small
        for one clip at a time.
        """
        while True:
            try:
                with self.engine.accumulate():
                    work = _BatchWork(
                        self.engine, batch, StepKey(self.seed, step), self.ranks, self.micro_batch_size
                    )
                    return work.run()
            except MemoryShortageError as shortage:
                self.engine.discard()
                self._halve(step, len(batch.index_B), str(shortage))
            # Outside of the handler, which holds the frames and so the tensors of what failed.
            if self.engine.device.type == "cuda":
                torch.cuda.empty_cache()

    def _halve(self, step: int, num_rows: int, shortage: str) -> None:
        size = min(self.micro_batch_size or num_rows, num_rows)
        if size == 1:
            raise TrainingError(
                f"step {step}: memory does not suffice for one clip at a time ({shortage}). Set recompute: all, then "
                "offload_activations: true, in model.video and model.text, engine.zero_stage 2 or 3, or "
                "engine.offload_optimizer: cpu; or train with fewer frames, a lower keep_rate or more ranks"
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
            raise TrainingError(
                f"step {step}: out of memory with {size} clips at once; the stage goes on from its last checkpoint "
                f"with {self.micro_batch_size} ({shortage})"
            )


class _BatchWork:
    """One batch on its way through the two passes."""

    def __init__(
        self, engine: Engine, batch: Batch, key: StepKey, ranks: Ranks, micro_batch_size: int | None
    ) -> None:
        self.engine, self.batch, self.key, self.ranks = engine, batch, key, ranks
        self.model: VideoTextModel = engine.module  # pyright: ignore[reportAttributeAccessIssue]
        self.config = self.model.config
        device, num_rows = engine.device, len(batch.index_B)
        self.split = BatchSplit(ranks.world_size, num_rows, min(micro_batch_size or num_rows, num_rows))
        on_host = Captions(batch.text_ids_BL, batch.text_mask_BL, batch.index_B)
        # Drawn on the host, so that their number is known without waiting for the device.
        self.masked = hide_words(self.model, on_host, key) if self.config.mlm_weight else None
        self.captions = Captions(*(part.to(device) for part in on_host))
        self.all_captions = Captions(
            all_gather_rows(self.captions.ids_BL),
            all_gather_rows(self.captions.mask_BL.to(torch.uint8)).bool(),
            all_gather_rows(self.captions.clip_index_B),
        )
        self.tags = ActionTags(
            batch.verbs_BV.to(device), batch.nouns_BU.to(device), self.captions.clip_index_B
        )

    def run(self) -> Float[Tensor, " 4"]:
        config, pieces = self.config, self.split.micro_batches()
        kept: EncodedRows | None = None
        features: list[tuple[Tensor, Tensor]] = []
        with self.leaving_together():
            if len(pieces) == 1:
                kept = self.encode(pieces[0])
                features = [(kept.video_features_BP.detach(), kept.text_features_BP.detach())]
            else:
                with torch.no_grad():
                    for piece in pieces:
                        encoded = self.encode(piece)
                        features.append((encoded.video_features_BP, encoded.text_features_BP))
                        del encoded
        video_BP, text_BP = (torch.cat(parts) for parts in zip(*features, strict=True))

        temperature = self.call(VideoTextModel.temperature).detach()
        contrastive = self.contrastive(text_BP, video_BP, temperature) if config.vtc_weight else None
        plans, has_negative_B = self.plan_negatives(text_BP, video_BP, temperature)
        num_words = 0 if self.masked is None else int(self.masked.selected_BL.sum())
        counts = torch.stack(
            [has_negative_B.sum(), has_negative_B.new_tensor(num_words, dtype=torch.int64)]
        ).float()
        counts = sum_over_ranks(counts).clamp_min(1)
        # The engine takes means over ranks: a rank's share of a sum counts `world_size` times.
        vtm_scale, mlm_scale = (
            self.split.world_size / (3 * counts[0]),
            self.split.world_size / counts[1],
        )

        vtm, mlm = torch.zeros_like(vtm_scale), torch.zeros_like(mlm_scale)
        with self.leaving_together():
            for number, piece in enumerate(pieces):
                encoded = kept or self.encode(piece)
                tokens, states = (_leaf(part) for part in encoded[:2])
                for chunk_number, chunk in enumerate(plans[number]):
                    pairs = self.pairs(piece, chunk, has_negative_B, is_first=chunk_number == 0)
                    sums = self.call(pair_losses, tokens, states, pairs, self.key)
                    terms = sums.vtm * vtm_scale, sums.mlm * mlm_scale
                    self.engine.backward(config.vtm_weight * terms[0] + config.mlm_weight * terms[1])
                    vtm, mlm = vtm + terms[0].detach(), mlm + terms[1].detach()
                    del sums, terms
                self.backward_encoders(encoded, tokens.grad, states.grad, contrastive, piece)
                del encoded, tokens, states
        vtc = contrastive.loss if contrastive else torch.zeros_like(vtm)
        total = config.vtc_weight * vtc + config.vtm_weight * vtm + config.mlm_weight * mlm
        return torch.stack([total, vtc, vtm, mlm])

    @contextmanager
    def leaving_together(self) -> Iterator[None]:
        """Around work that waits for nobody: if any rank runs out of memory, all leave it with MemoryShortageError."""
        shortage: str | None = None
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            shortage = str(error).splitlines()[0]
        if shortage is not None and self.engine.calls_are_collective:
            raise MemoryShortageError(shortage)
        if self.ranks.any(shortage is not None):
            raise MemoryShortageError(shortage or "another rank ran out of memory")

    def call(self, part: Callable[..., Any], *arguments: Any) -> Any:
        return self.engine.module(part, *arguments)

    def encode(self, piece: slice) -> EncodedRows:
        video = normalise(self.batch.video_BTCHW[piece], self.engine.device, self.engine.dtype)
        return self.call(encode_rows, video, self.captions.rows(piece), self.key)

    def contrastive(self, text_BP: Tensor, video_BP: Tensor, temperature: Tensor) -> ContrastiveResult:
        config = self.config
        return contrastive_tiles(
            text_BP,
            video_BP,
            temperature,
            self.tags,
            loss=config.vtc_loss,
            positives=config.vtc_positives,
            directions=config.vtc_directions,
        )

    def plan_negatives(
        self, text_BP: Tensor, video_BP: Tensor, temperature: Tensor
    ) -> tuple[list[list[PairChunk | None]], Bool[Tensor, " B"]]:
        """Chunks of wrong pairs for each micro-batch (None: no pairs, only hidden words), and which rows have any."""
        num_rows, num_pieces = self.split.rows_per_rank, len(self.split.micro_batches())
        if not self.config.vtm_weight:
            chunks: list[PairChunk | None] = [None] if self.masked else []
            return [chunks] * num_pieces, torch.zeros(num_rows, dtype=torch.bool, device=text_BP.device)
        found_3B = self.draw_negatives(text_BP, video_BP, temperature)
        found_G3 = all_gather_rows(found_3B.T.contiguous()).cpu().numpy()
        plans = plan_pairs(
            found_G3[:, 0], found_G3[:, 1], found_G3[:, 2].astype(bool), self.split, self.ranks.rank
        )
        return [list(chunks) for chunks in plans], found_3B[2].bool()

    def draw_negatives(self, text_BP: Tensor, video_BP: Tensor, temperature: Tensor) -> Int[Tensor, "3 B"]:
        """For each row: the wrong clip of its caption, the wrong caption of its clip, whether there are any."""
        text_GP, video_GP, tags = all_gather_rows(text_BP), all_gather_rows(video_BP), self.tags.gathered()
        rows_at_once = max(1, _SIMILARITIES_AT_ONCE // len(text_GP))
        found = []
        for rows in torch.arange(len(text_BP)).split(rows_at_once):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            positives = self.tags.rows(part).positives(tags, self.config.vtc_positives)
            wrong = negatives_of(
                self.model,
                text_BP[part] @ video_GP.T / temperature,
                positives,
                self.captions.clip_index_B[part],
                self.all_captions.clip_index_B,
                self.key,
                video_BP[part] @ text_GP.T / temperature,
            )
            found.append(torch.stack([*wrong, ~positives.all(dim=1)]))
        return torch.cat(found, dim=1)

    def pairs(self, piece: slice, chunk: PairChunk | None, has_negative_B: Tensor, is_first: bool) -> Pairs:
        device = self.engine.device

        def to_device(array: Any) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        empty = torch.zeros(0, dtype=torch.int64, device=device)
        has_foreign = chunk is not None and len(chunk.foreign_F) > 0
        return Pairs(
            own=self.captions.rows(piece),
            match_weight_B=has_negative_B[piece].float() if chunk is not None and is_first else None,
            hidden=self.hidden(piece) if is_first else None,
            foreign=self.all_captions.rows(to_device(chunk.foreign_F)) if chunk and has_foreign else None,
            caption_Q=empty if chunk is None else to_device(chunk.caption_Q),
            clip_Q=empty if chunk is None else to_device(chunk.clip_Q),
            wrong_weight_Q=empty.float() if chunk is None else to_device(chunk.weight_Q),
        )

    def hidden(self, piece: slice) -> HiddenWords | None:
        if self.masked is None:
            return None
        on_host = Captions(
            self.batch.text_ids_BL[piece], self.batch.text_mask_BL[piece], self.batch.index_B[piece]
        )
        masked = type(self.masked)(*(part[piece] for part in self.masked))
        return HiddenWords(*(part.to(self.engine.device) for part in hidden_words(masked, on_host)))

    def backward_encoders(
        self,
        encoded: EncodedRows,
        tokens_gradient: Tensor | None,
        states_gradient: Tensor | None,
        contrastive: ContrastiveResult | None,
        piece: slice,
    ) -> None:
        """Hands every gradient that is known to what the encoders returned."""
        ends = [(encoded.tokens_BMD, tokens_gradient), (encoded.states_BLD, states_gradient)]
        if contrastive is not None:
            weight = self.config.vtc_weight * self.split.world_size
            ends.append((encoded.video_features_BP, weight * contrastive.video_gradient_BP[piece]))
            ends.append((encoded.text_features_BP, weight * contrastive.text_gradient_BP[piece]))
            if self.config.learn_temperature and piece.start == 0:
                # Every rank knows the whole of it, and the engine takes the mean.
                gradient = self.config.vtc_weight * contrastive.temperature_gradient
                ends.append((self.call(VideoTextModel.temperature), gradient))
        known = [_Handover.apply(end, gradient) for end, gradient in ends if gradient is not None]
        self.engine.backward(torch.stack(known).sum())


def _leaf(end: Tensor) -> Tensor:
    return end.detach().requires_grad_()


class _Handover(torch.autograd.Function):
    """A 0-dim zero whose gradient with respect to `end` is the one given."""

    @staticmethod
    def forward(ctx: Any, end: Tensor, gradient: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(gradient)
        ctx.dtype = end.dtype
        return gradient.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(ctx.dtype), None
