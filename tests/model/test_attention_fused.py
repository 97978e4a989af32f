"""The compiled kernel as a torch op: tracing, building, and what happens without a compiler."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model import attention_fused, kernel_build
from model.attention import choose_backend, sparse_attention, token_codes
from model.attention_fused import block_attention
from model.kernel_build import FusedUnavailableError, load_kernel
from model.row_draws import RowDraws
from model.sparsity import draw_edge_layout
from model.video_encoder import VideoEncoder
from tests.model.tiny import tiny_batch, tiny_config

CACHED = (load_kernel, kernel_build.unavailable_reason, kernel_build.warn_if_unavailable)


def _arguments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 28, 3, 2, 8, generator=generator, requires_grad=True)
    table = torch.randn(5 * 5 * 5 + 3, 2, generator=generator, requires_grad=True)
    layout = draw_edge_layout(27, 4, 1, 2, generator)
    return qkv, table, token_codes(3, 3, 3), layout.key_blocks_SK


@pytest.mark.parametrize("dense", [False, True])
def test_the_op_keeps_the_rules_of_torch_library(dense: bool) -> None:
    qkv, table, codes, blocks = _arguments()
    torch.library.opcheck(block_attention, (qkv, table, codes, None if dense else blocks, 4, None, True))


def test_fake_tensors_pass_forward_and_back_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_fused, "_run", None)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        qkv, table = torch.randn(2, 28, 3, 2, 8, requires_grad=True), torch.randn(128, 2, requires_grad=True)
        codes, blocks = mode.from_tensor(token_codes(3, 3, 3)), torch.zeros(7, 3, dtype=torch.long)
        out, lse, cls_weights = block_attention(qkv, table, codes, blocks, 4, None, True)
        out.sum().backward()
        assert [tuple(x.shape) for x in (out, lse, cls_weights)] == [(2, 28, 2, 8), (2, 2, 28), (2, 2, 27)]
        assert qkv.grad is not None
        assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("backend", ["auto", "fused", "blocks"])
def test_a_compiled_encoder_equals_the_plain_one_in_values_and_gradients(backend: str) -> None:
    clips, results = tiny_batch(tiny_config()).video, []
    for wrap in (lambda encoder: encoder, lambda encoder: torch.compile(encoder, backend="aot_eager")):
        torch.manual_seed(0)
        encoder = VideoEncoder(tiny_config({"attention_backend": backend}).video)
        pooled = wrap(encoder)(clips, edge_seed=1).pooled_BD
        pooled.square().sum().backward()
        results.append([pooled, *(p.grad for p in encoder.parameters())])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled)


@pytest.mark.parametrize(
    ("backend", "mode"),
    [
        ("reference", "all"),
        ("blocks", "all"),
        ("blocks", "all_but_attention"),
        ("fused", "all"),
        ("fused", "all_but_attention"),
    ],
)
def test_recomputation_gives_bitwise_equal_gradients_with_pruning_and_keyed_edges(
    backend: str, mode: str
) -> None:
    clips, results = tiny_batch(tiny_config()).video, []
    for recompute in ("none", mode):
        torch.manual_seed(0)
        video = {"attention_backend": backend, "recompute": recompute, "drop_path": 0.5}
        encoder = VideoEncoder(tiny_config(video).video).train()
        encoding = encoder(clips, edge_seed=7, draws=RowDraws.of(1, torch.arange(len(clips))))
        encoding.pooled_BD.square().sum().backward()
        results.append([encoding.pooled_BD, *encoding.keep_indices, *(p.grad for p in encoder.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.fixture
def fresh_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty home folder and nothing built or decided yet; afterwards all as before."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for cached in CACHED:
        cached.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    for cached in CACHED:
        cached.cache_clear()


def test_without_a_compiler_plain_torch_serves_and_the_reason_is_said_once(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernel_build, "_COMPILERS", ("no-such-compiler",))
    qkv, table, codes, _ = _arguments()
    layout = draw_edge_layout(27, 4, 1, 2, torch.Generator())
    with caplog.at_level(logging.WARNING):
        first = sparse_attention(qkv, codes, table, layout).values_BNAE
        second = sparse_attention(qkv, codes, table, layout).values_BNAE
    assert torch.equal(first, second)
    assert choose_backend(qkv.device, qkv.dtype, 10**7, "auto") == "blocks"
    assert [record.getMessage() for record in caplog.records] == [
        "attention runs without its compiled CPU kernel, slower and with more memory: "
        "no C++ compiler found (looked for no-such-compiler)"
    ]
    with pytest.raises(FusedUnavailableError, match="no C\\+\\+ compiler found"):
        sparse_attention(qkv, codes, table, layout, backend="fused")


def test_a_compiler_that_fails_is_named_with_its_words_and_leaves_nothing_behind(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_build, "_FLAGS", ("-std=c++17", "-no-such-flag"))
    with pytest.raises(
        FusedUnavailableError, match=r"could not compile .*block_attention.cpp[\s\S]*no-such-flag"
    ):
        load_kernel()
    assert {path.suffix for path in (fresh_build / ".cache" / "svitt-ego").iterdir()} <= {".lock"}


def test_a_damaged_library_is_built_again(fresh_build: Path) -> None:
    built = kernel_build._library_path("g++")
    built.write_bytes(b"torn")
    assert load_kernel() is not None
    assert built.stat().st_size > 1000


def test_importing_the_model_compiles_and_loads_nothing() -> None:
    code = (
        "import model.video_encoder, model.kernel_build as fused\n"
        "assert fused.load_kernel.cache_info().currsize == 0\n"
        "assert 'block_attention-' not in open('/proc/self/maps').read()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
