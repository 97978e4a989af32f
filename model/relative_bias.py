"""Rows of the relative position table for pairs of tokens, written out for the readable attention paths.

`attention` explains position codes and the order of the rows; its backends look the same rows up in place.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional

CLS_ROWS = 3
CLS_TO_PATCH, PATCH_TO_CLS, CLS_TO_CLS = -3, -2, -1


def patch_query_rows(
    query_codes: Int[Tensor, "*S q"],
    key_codes: Int[Tensor, "*S k"],
    key_is_cls: Bool[Tensor, "*S k"],
    num_rows: int,
) -> Int[Tensor, "*S q k"]:
    """Table row of every (patch query, key). A key marked as CLS takes the patch-to-CLS row, whatever its code."""
    centre = (num_rows - CLS_ROWS - 1) // 2
    rows = query_codes.unsqueeze(-1) - key_codes.unsqueeze(-2) + centre
    return torch.where(key_is_cls.unsqueeze(-2), num_rows + PATCH_TO_CLS, rows)


def all_pair_rows(codes: Int[Tensor, "*B n"], num_rows: int) -> Int[Tensor, "*B N N"]:
    """Table row of every (query, key) of a clip, CLS first, N = n + 1."""
    is_cls = torch.zeros(codes.shape[-1] + 1, dtype=torch.bool, device=codes.device)
    is_cls[0] = True
    patches = patch_query_rows(codes, functional.pad(codes, (1, 0)), is_cls, num_rows)
    rows = functional.pad(patches, (0, 0, 1, 0), value=num_rows + CLS_TO_PATCH)
    rows[..., 0, 0] = num_rows + CLS_TO_CLS
    return rows
