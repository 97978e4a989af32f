"""Block-sparse attention by one compiled CPU kernel, as torch ops with gradient.

`kernel_build` compiles it at the first call; nothing is compiled or loaded at import.
"""

import ctypes
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from model.kernel_build import load_kernel

FUSED_DTYPES = (torch.float32, torch.bfloat16)


class _Problem(ctypes.Structure):
    """`Problem` of block_attention.cpp, field by field."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "heads", "tokens", "width", "table_rows", "block_size")
        ),
        *((name, ctypes.c_int64) for name in ("slots", "codes_stride")),
        *((f"stride_{name}", ctypes.c_int64) for name in ("batch", "token", "part", "head")),
        *((name, ctypes.c_int64) for name in ("bf16", "threads", "groups")),
        *(
            (name, ctypes.c_void_p)
            for name in ("qkv", "table", "codes", "key_blocks", "key_mask", "out", "lse")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in ("cls_weights", "grad_out", "grad_qkv", "grad_table", "scratch")
        ),
        ("parallel", ctypes.c_void_p),
    )


@lru_cache(maxsize=1)
def _openmp_parallel() -> int | None:
    """Entry of the OpenMP runtime that torch has loaded, so that its threads are shared; None where not GNU's."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError):
        return None


def _problem(
    qkv: Tensor,
    table: Tensor,
    codes: Tensor,
    key_blocks: Tensor | None,
    block_size: int,
    key_mask: Tensor | None,
) -> _Problem:
    num_clips, num_tokens, _, num_heads, width = qkv.shape
    return _Problem(
        batch=num_clips,
        heads=num_heads,
        tokens=num_tokens,
        width=width,
        table_rows=table.shape[0],
        block_size=block_size,
        slots=-1 if key_blocks is None else key_blocks.shape[1],
        codes_stride=codes.stride(0) if codes.dim() == 2 else 0,
        stride_batch=qkv.stride(0),
        stride_token=qkv.stride(1),
        stride_part=qkv.stride(2),
        stride_head=qkv.stride(3),
        bf16=qkv.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        groups=min(num_clips, math.ceil(32 / num_heads)),
        qkv=qkv.data_ptr(),
        table=table.data_ptr(),
        codes=codes.data_ptr(),
        key_blocks=None if key_blocks is None else key_blocks.data_ptr(),
        key_mask=None if key_mask is None else key_mask.data_ptr(),
        parallel=_openmp_parallel(),
    )


def _run(entry: str, problem: _Problem) -> None:
    kernel = load_kernel()
    scratch = torch.empty(problem.threads * kernel.svitt_scratch_floats(ctypes.byref(problem)))
    problem.scratch = scratch.data_ptr()
    getattr(kernel, entry)(ctypes.byref(problem))


@torch.library.custom_op("svitt::block_attention", mutates_args=(), device_types="cpu")
def block_attention(
    qkv: Tensor,
    table: Tensor,
    codes: Tensor,
    key_blocks: Tensor | None,
    block_size: int,
    key_mask: Tensor | None,
    with_cls_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mixed values (B, N, A, E), log of the softmax denominators (B, A, N), CLS weights (B, A, n) or empty."""
    num_clips, num_tokens, _, num_heads, width = qkv.shape
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    table, codes = table.float().contiguous(), codes.contiguous()
    key_blocks = None if key_blocks is None else key_blocks.contiguous()
    key_mask = None if key_mask is None else key_mask.contiguous()
    problem = _problem(qkv, table, codes, key_blocks, block_size, key_mask)
    if fault := load_kernel().svitt_check(ctypes.byref(problem)):
        raise ValueError(f"attention of {num_tokens - 1} patches in blocks of {block_size}: {fault.decode()}")
    out = qkv.new_empty(num_clips, num_tokens, num_heads, width)
    lse = table.new_empty(num_clips, num_heads, num_tokens)
    cls_weights = table.new_empty((num_clips, num_heads, num_tokens - 1) if with_cls_weights else (0,))
    problem.out, problem.lse = out.data_ptr(), lse.data_ptr()
    problem.cls_weights = cls_weights.data_ptr() if with_cls_weights else None
    _run("svitt_forward", problem)
    return out, lse, cls_weights


@block_attention.register_fake
def _(
    qkv: Tensor,
    table: Tensor,
    codes: Tensor,
    key_blocks: Tensor | None,
    block_size: int,
    key_mask: Tensor | None,
    with_cls_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_clips, num_tokens, _, num_heads, width = qkv.shape
    cls_shape = (num_clips, num_heads, num_tokens - 1) if with_cls_weights else (0,)
    return (
        qkv.new_empty(num_clips, num_tokens, num_heads, width),
        qkv.new_empty(num_clips, num_heads, num_tokens, dtype=torch.float32),
        qkv.new_empty(cls_shape, dtype=torch.float32),
    )


@torch.library.custom_op("svitt::block_attention_backward", mutates_args=(), device_types="cpu")
def block_attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    table: Tensor,
    codes: Tensor,
    key_blocks: Tensor | None,
    block_size: int,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv (B, N, 3, A, E) and of the table (R, A)."""
    num_heads = qkv.shape[3]
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    grad_out, codes, float_table = grad_out.contiguous(), codes.contiguous(), table.float().contiguous()
    key_blocks = None if key_blocks is None else key_blocks.contiguous()
    key_mask = None if key_mask is None else key_mask.contiguous()
    problem = _problem(qkv, float_table, codes, key_blocks, block_size, key_mask)
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype)
    grad_table = float_table.new_empty(problem.groups, num_heads, table.shape[0])
    problem.out, problem.lse, problem.grad_out = out.data_ptr(), lse.data_ptr(), grad_out.data_ptr()
    problem.grad_qkv, problem.grad_table = grad_qkv.data_ptr(), grad_table.data_ptr()
    _run("svitt_backward", problem)
    return grad_qkv, grad_table.sum(0).T.contiguous().to(table.dtype)


@block_attention_backward.register_fake
def _(
    grad_out: Tensor,
    qkv: Tensor,
    table: Tensor,
    codes: Tensor,
    key_blocks: Tensor | None,
    block_size: int,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device), torch.empty_like(table)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    qkv, table, codes, key_blocks, block_size, key_mask, _ = inputs
    out, lse, cls_weights = output
    ctx.mark_non_differentiable(lse, cls_weights)
    ctx.save_for_backward(qkv, table, codes, key_blocks, key_mask, out, lse)
    ctx.block_size = block_size


def _backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    qkv, table, codes, key_blocks, key_mask, out, lse = ctx.saved_tensors
    grad_qkv, grad_table = block_attention_backward(
        grad_out, qkv, table, codes, key_blocks, ctx.block_size, key_mask, out, lse
    )
    return grad_qkv, grad_table, None, None, None, None, None


block_attention.register_autograd(_backward, setup_context=_setup_context)
