"""What a layer keeps for its backward pass, and where: all it computed, or its input, from which it is run again.

The layers must repeat themselves: edges and draws come as arguments, nothing reads a generator.
"""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

OnHost = Callable[[], AbstractContextManager[object]]

# Each returns its mixed values and what else its backward pass reads, so that nothing of it has to be run again.
ATTENTION_OPS = ("svitt::block_attention", "svitt::triton_attention", "svitt::attention_in_blocks")


class LayerRunner:
    """Runs layers in one of the modes of `recompute`; without gradient they just run.

    none: the layer keeps what autograd keeps. all: its first argument alone. all_but_attention: also the results of
    its attention kernel. `offload` puts what is kept into host memory until the backward pass gets there, allocated
    within `on_host()`, so that whoever counts memory can book it there.
    """

    def __init__(self, recompute: Literal["none", "all_but_attention", "all"], offload: bool) -> None:
        self.recompute, self.offload = recompute, offload
        self.on_host: OnHost = nullcontext

    def __call__(self, layer: nn.Module, states: Tensor, *arguments: Any) -> Any:
        """`layer(states, *arguments)`."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return layer(states, *arguments)
        # The other arguments stay where they are: other layers share them, so that a copy would save nothing.
        with saved_tensors_hooks(self._keep, self._fetch) if self.offload else nullcontext():
            return checkpoint(
                lambda states: layer(states, *arguments),
                states,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=self._contexts,
            )

    def _contexts(self) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        """Around the first run of a layer, and around the second."""
        if self.recompute == "all":
            return nullcontext(), nullcontext()
        kept: deque[list[Any]] = deque()
        return _Keeping(kept, self._keep), _Returning(kept, self._fetch)

    def _keep(self, tensor: Tensor) -> Any:
        if not self.offload:
            return tensor.detach()
        # Pinned, the copies run in the order of the device's work and nobody waits for them.
        with self.on_host():
            device = "meta" if tensor.is_meta else "cpu"  # meta: somebody finds out what memory it takes
            host = torch.empty_like(tensor, device=device, pin_memory=tensor.is_cuda)
        return host.copy_(tensor, non_blocking=True), tensor.device

    def _fetch(self, kept: Any) -> Tensor:
        if not self.offload:
            return kept
        host, device = kept
        # A copy on the CPU too, where it stands for the one that a GPU would hold.
        return host.to(device, non_blocking=True, copy=True)


class _Keeping(TorchDispatchMode):
    """Keeps the results of attention kernels.

    torch's selective checkpointing does so too, but fails where other operations differ between the runs. Those of
    ZeRO 3 do: in the second run parameters may be there already, or not any more.
    """

    def __init__(self, kept: deque[list[Any]], keep: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.kept, self.keep = kept, keep

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.name() in ATTENTION_OPS:
            self.kept.append([self.keep(result) for result in results])
        return results


class _Returning(TorchDispatchMode):
    """Returns the kept results, once, instead of running the kernels."""

    def __init__(self, kept: deque[list[Any]], fetch: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.kept, self.fetch = kept, fetch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.kept and func.name() in ATTENTION_OPS:
            return tuple(self.fetch(result) for result in self.kept.popleft())
        return func(*args, **(kwargs or {}))
