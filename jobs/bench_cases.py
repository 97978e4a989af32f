"""What `svitt bench model` measures: one training step each of our attention, our encoder, and others to compare with.

The others are dense: torch's scaled dot product attention with the same trainable position bias written out, the same
without bias (which makes it fast, but blind to position), and Hugging Face's BEiT on single frames.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BeitConfig, BeitModel

from model.attention import Backend, sparse_attention, token_codes
from model.blocks import VideoAttention, VideoBlock
from model.config import ModelConfig, VideoConfig
from model.sparsity import EdgeLayout, draw_layouts
from model.video_encoder import VideoEncoder

Step = Callable[[], None]


class Setup(NamedTuple):
    """Where the cases run, in which type, and on how many clips at once."""

    device: str = "cpu"
    dtype: str = "float32"
    num_clips: int = 1

    @property
    def kernel(self) -> Backend:
        """The attention of ours that this device takes."""
        return "fused" if self.device == "cpu" else "triton"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


ON_CPU = Setup()


# Sparsity settings (K_l = 1, blocks of 56): changes to the settings of ViT-B.
SETTINGS: dict[str, dict[str, object]] = {
    "dense": {"num_random_blocks": None, "keep_rate": 1.0},
    "node 0.7": {"num_random_blocks": None, "keep_rate": 0.7},
    "edge (1,3,56)": {"num_random_blocks": 3, "keep_rate": 1.0},
    "both (1,3,56) 0.7": {"num_random_blocks": 3, "keep_rate": 0.7},
    "both (1,5,56) 0.7": {"num_random_blocks": 5, "keep_rate": 0.7},
}
# What the ends of names stand for.
RECOMPUTE = {"recomputed": "all", "recomputed but attention": "all_but_attention"}
SDPA_BIAS, SDPA, BEIT = "torch SDPA, same bias", "torch SDPA, no bias", "Hugging Face BEiT, per frame"


class Case(NamedTuple):
    """One thing to measure. `level` is layer (attention alone, one layer) or encoder (ViT-B, whole step)."""

    level: str
    name: str
    num_frames: int

    @property
    def title(self) -> str:
        """What `--only` looks in."""
        return f"{self.level} {self.name}"


def layer_cases(num_frames: int, setup: Setup = ON_CPU) -> list[Case]:
    """Attention of one layer, sparse and dense, and torch's. The plain form in blocks is for machines without a
    compiler, not for a GPU.
    """
    names = [f"{setup.kernel} {edges}" for edges in ("(1,3,56)", "(1,5,56)", "dense")]
    if setup.device == "cpu":
        names.insert(1, "blocks (1,3,56)")
    return [Case("layer", name, num_frames) for name in (*names, SDPA_BIAS, SDPA)]


def encoder_cases(num_frames: int) -> list[Case]:
    """The whole encoder in every setting. Dense with the bias written out is left out from 16 frames on: 12 layers
    would keep some 20 GiB for a clip in float32.
    """
    both = ("both (1,5,56) 0.7", "both (1,3,56) 0.7")
    names = [*SETTINGS, *(f"{setting} {end}" for setting in both for end in RECOMPUTE), SDPA, BEIT]
    if num_frames < 16:
        names.append(SDPA_BIAS)
    return [Case("encoder", name, num_frames) for name in names]


def video_config(name: str, num_frames: int) -> VideoConfig:
    """ViT-B with the setting that a case's name begins with; dense for torch's attention."""
    setting = next(
        (changes for known, changes in SETTINGS.items() if name.startswith(known)), SETTINGS["dense"]
    )
    mode = next((mode for end, mode in RECOMPUTE.items() if name.endswith(end)), "none")
    changes = {**setting, "num_frames": num_frames, "recompute": mode}
    return ModelConfig.named("base").replaced(video=changes).video


def flops(case: Case) -> float:
    """Floating point operations of a clip's step that nothing avoidable is added to: no recomputation, no padding."""
    if case.level == "encoder":
        if case.name == BEIT:
            return 6.0 * case.num_frames * video_config("dense", 1).macs()
        return 6.0 * video_config(case.name, case.num_frames).macs()
    config = video_config("dense", case.num_frames)
    keys = 1 + config.num_patches
    for key_blocks in (4, 6):
        if case.name.endswith(f"(1,{key_blocks - 1},56)"):
            keys = 1 + key_blocks * 56
    # Query-key and weight-value products: two going forward, four back, 2 operations each.
    return 12.0 * (config.num_patches + 1) * keys * config.width


def build(case: Case, setup: Setup = ON_CPU) -> Step:
    """The step of a case: forward and backward pass, random weights and inputs."""
    torch.manual_seed(0)
    return _layer_step(case, setup) if case.level == "layer" else _encoder_step(case, setup)


def _layer_step(case: Case, setup: Setup) -> Step:
    config = video_config("dense", case.num_frames)
    codes = token_codes(case.num_frames, config.grid, config.grid).to(setup.device)
    head_width = config.width // config.num_heads
    place = {"device": setup.device, "dtype": setup.torch_dtype}
    shape = (setup.num_clips, len(codes) + 1)
    qkv = torch.randn(*shape, 3, config.num_heads, head_width, requires_grad=True, **place)
    table = torch.zeros(config.table_rows, config.num_heads, requires_grad=True, **place)
    attend = _layer_attention(case, codes)
    grad = torch.randn(*shape, config.num_heads, head_width, **place)

    def step() -> None:
        attend(qkv, table).backward(grad)
        # Their memory is the step's, so it is not held between steps.
        qkv.grad = table.grad = None

    return step


def _layer_attention(case: Case, codes: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    if case.name in (SDPA_BIAS, SDPA):
        rows = _table_rows(codes, case) if case.name == SDPA_BIAS else None
        return lambda qkv, table: _sdpa(qkv, table, rows)
    backend, edges = cast(tuple[Backend, str], tuple(case.name.split()))
    layout: EdgeLayout | None = None
    if edges != "dense":
        layout = draw_layouts(video_config(f"both {edges} 0.7", case.num_frames), 0)[0]
        assert layout is not None
        layout = layout.to(codes.device)
    return lambda qkv, table: sparse_attention(qkv, codes, table, layout, backend=backend).values_BNAE


def _encoder_step(case: Case, setup: Setup) -> Step:
    place = {"device": setup.device, "dtype": setup.torch_dtype}
    if case.name == BEIT:
        model = (
            BeitModel(BeitConfig(use_relative_position_bias=True, use_mask_token=False)).to(**place).train()
        )
        frames = torch.randn(setup.num_clips * case.num_frames, 3, 224, 224, **place)
        return _step_of(model, lambda: model(frames).pooler_output)
    encoder = VideoEncoder(video_config(case.name, case.num_frames)).train()
    if case.name in (SDPA_BIAS, SDPA):
        codes = cast(Tensor, encoder.codes).to(setup.device)
        rows = _table_rows(codes, case) if case.name == SDPA_BIAS else None
        for layer in encoder.layers:
            assert isinstance(layer, VideoBlock)
            layer.add_module("attention", _SdpaAttention(layer.attention, rows))
    encoder.to(**place)
    side = encoder.config.image_size
    video = torch.randn(setup.num_clips, case.num_frames, 3, side, side, **place)
    return _step_of(encoder, lambda: encoder(video, edge_seed=0).pooled_BD)


def _step_of(model: nn.Module, forward: Callable[[], Tensor]) -> Step:
    # Gradients stand ready, as in a training loop that zeroes them: they are no activations.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        forward().sum().backward()

    return step


class _SdpaAttention(nn.Module):
    """`VideoAttention` by torch's function, on the weights of the module it replaces."""

    def __init__(self, plain: VideoAttention, rows: Tensor | None) -> None:
        super().__init__()
        self.plain, self.rows = plain, rows

    def forward(
        self, tokens: Tensor, codes: Tensor, layout: EdgeLayout | None, with_cls_scores: bool
    ) -> tuple[Tensor, None]:
        plain = self.plain
        bias = torch.cat([plain.q_bias, torch.zeros_like(plain.q_bias), plain.v_bias])
        qkv = functional.linear(tokens, plain.qkv_weight, bias).unflatten(-1, (3, plain.num_heads, -1))
        return plain.output(_sdpa(qkv, plain.bias_table, self.rows).flatten(2)), None


def _sdpa(qkv: Tensor, table: Tensor, rows: Tensor | None) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    mask = None if rows is None else table.T[:, rows].unsqueeze(0)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _table_rows(codes: Tensor, case: Case) -> Tensor:
    """Table row of every pair of tokens, CLS first: the index that BEiT keeps as a buffer."""
    num_rows = video_config("dense", case.num_frames).table_rows
    rows = functional.pad(codes[:, None] - codes + (num_rows - 4) // 2, (1, 0, 1, 0), value=num_rows - 2)
    rows[0] = num_rows - 3
    rows[0, 0] = num_rows - 1
    return rows
