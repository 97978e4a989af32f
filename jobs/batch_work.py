"""One batch on its way through the two passes of a training step; `train_step` says what they are for."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from infra.memory_budget import is_out_of_memory
from jobs.pair_plan import BatchSplit, PairChunk, plan_pairs
from jobs.ranks import Ranks
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


class Accumulator(Protocol):
    """As much of an engine as the work on a batch needs; a rehearsal on the meta device has no more."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def calls_are_collective(self) -> bool: ...

    def backward(self, loss: Tensor) -> None: ...


class BatchFeatures(NamedTuple):
    """What the first pass leaves of this rank's rows. The second one, which needs the room, goes without it."""

    text_BP: Float[Tensor, "B P"]
    video_BP: Float[Tensor, "B P"]
    temperature_1: Float[Tensor, " 1"]
    tags: ActionTags


class BatchWork:
    """One batch on its way through the two passes.

    What depends on draws (which words are hidden, which pairs are wrong) stands in methods of its own: a rehearsal
    puts the most that can come up in their place.
    """

    def __init__(
        self, engine: Accumulator, batch: Batch, key: StepKey, ranks: Ranks, micro_batch_size: int | None
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

    def run(self) -> Float[Tensor, " 4"]:
        """Losses of the batch (total, vtc, vtm, mlm; this rank's share of their mean) and all backward calls."""
        config, pieces = self.config, self.pieces()
        features, kept = self.first_pass(pieces)
        contrastive = self.contrastive(features) if config.vtc_weight else None
        plans, has_negative_B = self.plan_negatives(features)
        del features
        num_words = self.count_words()
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

    def first_pass(self, pieces: list[slice]) -> tuple[BatchFeatures, EncodedRows | None]:
        """Features without graph; where all rows are one piece, encoded with graph and handed out too."""
        kept: EncodedRows | None = None
        parts: list[tuple[Tensor, Tensor]] = []
        with self.leaving_together():
            if len(pieces) == 1:
                kept = self.encode(pieces[0])
                parts = [(kept.video_features_BP.detach(), kept.text_features_BP.detach())]
            else:
                with torch.no_grad():
                    for piece in pieces:
                        encoded = self.encode(piece)
                        parts.append((encoded.video_features_BP, encoded.text_features_BP))
                        del encoded
        video_BP, text_BP = (self.whole(rows) for rows in zip(*parts, strict=True))
        temperature_1, device = self.call(VideoTextModel.temperature).detach(), self.engine.device
        tags = ActionTags(
            self.batch.verbs_BV.to(device), self.batch.nouns_BU.to(device), self.captions.clip_index_B
        )
        return BatchFeatures(text_BP, video_BP, temperature_1, tags), kept

    def pieces(self) -> list[slice]:
        """This rank's rows, micro-batch by micro-batch."""
        return self.split.micro_batches()

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        """Features of all rows of this rank from those of its pieces."""
        return torch.cat(list(parts))

    def count_words(self) -> int:
        """Hidden words of this rank."""
        return 0 if self.masked is None else int(self.masked.selected_BL.sum())

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

    def contrastive(self, features: BatchFeatures) -> ContrastiveResult:
        config = self.config
        return contrastive_tiles(
            *features,
            loss=config.vtc_loss,
            positives=config.vtc_positives,
            directions=config.vtc_directions,
        )

    def plan_negatives(
        self, features: BatchFeatures
    ) -> tuple[list[list[PairChunk | None]], Bool[Tensor, " B"]]:
        """Chunks of wrong pairs for each micro-batch (None: no pairs, only hidden words), and which rows have any."""
        num_rows, num_pieces = self.split.rows_per_rank, len(self.split.micro_batches())
        if not self.config.vtm_weight:
            chunks: list[PairChunk | None] = [None] if self.masked else []
            return [chunks] * num_pieces, torch.zeros(num_rows, dtype=torch.bool, device=self.engine.device)
        found_3B = self.draw_negatives(features)
        found_G3 = all_gather_rows(found_3B.T.contiguous()).cpu().numpy()
        plans = plan_pairs(
            found_G3[:, 0], found_G3[:, 1], found_G3[:, 2].astype(bool), self.split, self.ranks.rank
        )
        return [list(chunks) for chunks in plans], found_3B[2].bool()

    def draw_negatives(self, features: BatchFeatures) -> Int[Tensor, "3 B"]:
        """For each row: the wrong clip of its caption, the wrong caption of its clip, whether there are any."""
        text_BP, video_BP, temperature_1, tags = features
        text_GP, video_GP, all_tags = all_gather_rows(text_BP), all_gather_rows(video_BP), tags.gathered()
        rows_at_once = max(1, _SIMILARITIES_AT_ONCE // len(text_GP))
        found = []
        for start in range(0, len(text_BP), rows_at_once):
            part = slice(start, start + rows_at_once)
            positives = tags.rows(part).positives(all_tags, self.config.vtc_positives)
            wrong = negatives_of(
                self.model,
                text_BP[part] @ video_GP.T / temperature_1,
                positives,
                self.captions.clip_index_B[part],
                self.all_captions.clip_index_B,
                self.key,
                video_BP[part] @ text_GP.T / temperature_1,
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
