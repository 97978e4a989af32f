"""The parts of BERT that hold weights, named as in its published checkpoints.

transformers has the same modules, and importing them takes every rank 3 s of CPU time at every start: its BERT brings
TorchDynamo, SciPy and SymPy along. Tests hold these to its values and gradients.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from model.config import TextConfig

_NORM_EPS = 1e-12
_NUM_TOKEN_TYPES = 2  # of which captions use the first


class Dense(nn.Module):
    """A linear map alone, where checkpoints give it a module of its own."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, width_out)


class Output(Dense):
    """The map at the end of a block and the norm after its residual."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__(width_in, width)
        self.LayerNorm = nn.LayerNorm(width, eps=_NORM_EPS)


class Projections(nn.Module):
    """Queries from the text, keys and values from what it attends to, `width_kv` wide."""

    def __init__(self, width: int, width_kv: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width_kv, width)
        self.value = nn.Linear(width_kv, width)


class Attention(nn.Module):
    """Projections and output map of one attention."""

    def __init__(self, width: int, width_kv: int) -> None:
        super().__init__()
        self.self = Projections(width, width_kv)
        self.output = Output(width, width)


class Transform(Dense):
    """What the head for masked words does before its decoder: linear, GELU, norm."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=_NORM_EPS)

    def forward(self, states_KD: Float[Tensor, "K D"]) -> Float[Tensor, "K D"]:
        """Transformed states."""
        return self.LayerNorm(functional.gelu(self.dense(states_KD)))


class Embeddings(nn.Module):
    """Words and their positions, all of the first token type; no dropout."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width, padding_idx=config.pad_id)
        self.position_embeddings = nn.Embedding(config.max_length, config.width)
        self.token_type_embeddings = nn.Embedding(_NUM_TOKEN_TYPES, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=_NORM_EPS)

    def forward(self, text_ids_BL: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """States of the captions' tokens."""
        positions_L = torch.arange(text_ids_BL.shape[1], device=text_ids_BL.device)
        words = self.word_embeddings(text_ids_BL) + self.token_type_embeddings(torch.zeros_like(text_ids_BL))
        return self.LayerNorm(words + self.position_embeddings(positions_L))
