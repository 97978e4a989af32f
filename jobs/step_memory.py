"""Device memory of a training step, found by rehearsing it on torch's meta device: shapes without data, in seconds.

Every tensor that an operation makes is booked while its storage lives. Not seen are temporaries inside of an
operation. What the engine holds comes from `infra.engine_memory`, since ZeRO cannot run without its ranks.
"""

import importlib.util
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jobs.ranks import SingleRank
from jobs.rehearsal import RehearsalWork, rehearsal_batch
from model.collectives import pretended_ranks
from model.config import ModelConfig
from model.step_key import StepKey
from model.video_text_model import VideoTextModel

Kind = Literal["activations", "logits", "gradients", "host"]
_KEY = StepKey(0, 0)
# Bytes of which CUDA's allocator hands out multiples.
_GPU_ROUNDING = 512


class StepTrace(NamedTuple):
    """One rehearsal: its peak with whole gradients held, its peak without counting gradients, and what it kept on the
    host at most.
    """

    with_gradients: "StepBytes"
    without_gradients: "StepBytes"
    host: int


class StepBytes(NamedTuple):
    """Bytes on top of parameters and optimizer, at the moment when their sum was largest."""

    activations: int
    logits: int  # scores over the vocabulary
    gradients: int

    @property
    def total(self) -> int:
        return sum(self)

    @property
    def without_gradients(self) -> int:
        return self.activations + self.logits


def trace_step(
    config: ModelConfig,
    dtype: torch.dtype,
    num_clips: int,
    micro_batch_size: int,
    text_length: int,
    num_tags: tuple[int, int],
    world_size: int = 1,
    on_gpu: bool = False,
) -> StepTrace:
    """Rehearses one rank's step of `num_clips` clips; no memory of that size is needed. `on_gpu`: the step is one of
    a GPU, whose allocator rounds up and whose attention runs by Triton's kernels. Where this machine has no Triton,
    attention in blocks stands for them, which takes more.
    """
    if on_gpu and config.video.attention_backend in ("auto", "triton"):
        backend = "triton" if importlib.util.find_spec("triton") else "blocks"
        config = config.replaced(video={"attention_backend": backend})
    batch = rehearsal_batch(config, num_clips, micro_batch_size, text_length, num_tags)
    with pretended_ranks(world_size):
        with _Answer(False), torch.device("meta"):  # drawing weights asks whether any has to be drawn again
            engine = _MetaEngine(VideoTextModel(config).to(dtype))
        tally = _Tally(engine.module, config.text.vocab_size, _GPU_ROUNDING if on_gpu else 1)
        engine.module.offload_within(tally.on_host)
        with tally:
            work: type[RehearsalWork] = RehearsalWork
            if 2 * micro_batch_size <= num_clips:
                tally.hold_gradients()
                work = _OneMicroBatch
            work(engine, batch, _KEY, _PretendedRank(world_size), micro_batch_size).run()
    return StepTrace(tally.peak, tally.peak_without_gradients, tally.host_peak)


class _OneMicroBatch(RehearsalWork):
    """Of two equal micro-batches the second takes more, for the gradients that are there: given those, one will do."""

    def pieces(self) -> list[slice]:
        return super().pieces()[:1]


class _PretendedRank(SingleRank):
    """Rank 0 of so many, alone."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size


class _MetaEngine:
    """As much of an engine as a rehearsal asks for."""

    calls_are_collective: bool = False
    device: torch.device = torch.device("meta")

    def __init__(self, module: VideoTextModel) -> None:
        self.module = module.train()
        self.dtype = module.video_projection.weight.dtype

    def backward(self, loss: Tensor) -> None:
        loss.backward()


class _Answer(TorchDispatchMode):
    """Gives one answer to all questions about values, which tensors of the meta device do not have."""

    def __init__(self, answer: bool) -> None:
        super().__init__()
        self._answer = answer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return self._answer
        return func(*args, **(kwargs or {}))


class _Tally(_Answer):
    """Live bytes of the storages that operations make inside of it, and the largest sum there was."""

    def __init__(self, module: nn.Module, vocab_size: int, rounding: int) -> None:
        super().__init__(True)  # the checks that a step makes of its input pass
        self._vocab_size, self._rounding = vocab_size, rounding
        self._live: dict[Kind, int] = {"activations": 0, "logits": 0, "gradients": 0, "host": 0}
        self._kinds: dict[int, tuple[Kind, int]] = {}
        self.peak = self.peak_without_gradients = StepBytes(0, 0, 0)
        self.host_peak = 0
        self._is_on_host = False
        self._module = module
        self._known = weakref.WeakSet(
            part.untyped_storage() for part in [*module.parameters(), *module.buffers()]
        )
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(self._book_gradient)

    def hold_gradients(self) -> None:
        """As after a micro-batch."""
        for parameter in self._module.parameters():
            parameter.grad = torch.zeros_like(parameter)
            self._book_gradient(parameter)

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """What is made inside does not lie on the device."""
        self._is_on_host = True
        try:
            yield
        finally:
            self._is_on_host = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._book(leaf)
        return result

    def _book(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known or not storage.nbytes():
            return
        self._known.add(storage)
        size = -(-storage.nbytes() // self._rounding) * self._rounding
        is_logits = tensor.dim() > 1 and tensor.shape[-1] == self._vocab_size
        kind: Kind = "host" if self._is_on_host else "logits" if is_logits else "activations"
        key = id(storage)
        self._kinds[key] = kind, size
        weakref.finalize(storage, self._release, key)
        self._add(kind, size)

    def _add(self, kind: Kind, size: int) -> None:
        self._live[kind] += size
        live = self._live
        self.host_peak = max(self.host_peak, live["host"])
        now = StepBytes(live["activations"], live["logits"], live["gradients"])
        if now.total > self.peak.total:
            self.peak = now
        if now.without_gradients > self.peak_without_gradients.without_gradients:
            self.peak_without_gradients = now

    def _release(self, key: int) -> None:
        kind, size = self._kinds.pop(key)
        self._live[kind] -= size

    def _book_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = id(parameter.grad.untyped_storage())
        kind, size = self._kinds.get(key, ("gradients", 0))
        if kind != "gradients":
            self._live[kind] -= size
            self._live["gradients"] += size
            self._kinds[key] = "gradients", size
