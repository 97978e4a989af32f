"""The arithmetic of `svitt bench model`: fits, ratios, operations, the record. No figure of speed is tested."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from jobs import bench_model
from jobs.bench_cases import (
    BEIT,
    ON_CPU,
    SDPA,
    SDPA_BIAS,
    Case,
    Setup,
    build,
    encoder_cases,
    flops,
    layer_cases,
    video_config,
)
from jobs.bench_model import Plan, Row, exponent, table
from jobs.bench_record import BenchError, Spread
from jobs.bench_worker import measure_memory, measure_times
from jobs.progress import ProgressReport


def test_the_exponent_of_a_power_law_is_its_power() -> None:
    assert exponent((4, 8, 16), (3 * 4**1.5, 3 * 8**1.5, 3 * 16**1.5)) == pytest.approx(1.5)
    assert exponent((4, 32), (5.0, 5.0)) == pytest.approx(0.0)
    # Slopes 1 and 3 on either side of the middle: 2 on average.
    assert exponent((1, 2, 4), (1.0, 2.0, 16.0)) == pytest.approx(2.0)


def test_a_spread_is_number_median_and_ends() -> None:
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(3, 3.0, 1.0, 10.0)


def test_operations_of_a_layer_count_the_pairs_that_are_attended() -> None:
    # 4 frames: 785 tokens; 4 key blocks of 56 and CLS, or all; two products forward, four back, 768 wide.
    assert flops(Case("layer", "fused (1,3,56)", 4)) == 12 * 785 * 225 * 768
    assert flops(Case("layer", "blocks (1,5,56)", 4)) == 12 * 785 * 337 * 768
    assert flops(Case("layer", SDPA_BIAS, 4)) == 12 * 785 * 785 * 768


def test_operations_of_an_encoder_are_those_of_its_configuration() -> None:
    # The published table: 78.5 GMAC dense and 49.8 with (1,5,56) and 0.7 at 4 frames.
    assert flops(Case("encoder", SDPA, 4)) / 6e9 == pytest.approx(78.5, abs=0.05)
    assert flops(Case("encoder", "both (1,5,56) 0.7 recomputed", 4)) / 6e9 == pytest.approx(49.8, abs=0.05)
    assert flops(Case("encoder", BEIT, 4)) == 4 * flops(Case("encoder", "dense", 1))


def test_every_case_has_the_configuration_that_its_name_says() -> None:
    config = video_config("both (1,5,56) 0.7 recomputed", 8)
    assert (config.num_random_blocks, config.keep_rate, config.recompute, config.num_frames) == (
        5,
        0.7,
        "all",
        8,
    )
    assert video_config("both (1,5,56) 0.7 recomputed but attention", 8).recompute == "all_but_attention"
    assert video_config("both (1,5,56) 0.7", 8).recompute == "none"
    assert video_config("node 0.7", 4).is_dense
    assert {case.name for case in encoder_cases(8)} - {case.name for case in encoder_cases(16)} == {SDPA_BIAS}


@pytest.mark.parametrize("case", layer_cases(1), ids=lambda case: case.name)
def test_every_layer_case_runs_forward_and_back(case: Case) -> None:
    build(case)()


def test_the_measuring_process_alternates_samples_and_reads_its_memory() -> None:
    cases = [Case("layer", "blocks (1,3,56)", 1), Case("layer", SDPA, 1)]
    answer = measure_times(cases, 2)
    assert [len(samples) for samples in answer["samples"]] == [2, 2]
    assert all(wall > 0 and cpu > 0 for samples in answer["samples"] for wall, cpu in samples)
    assert answer["matmul_flops_per_s"] > 0
    # The gradients of the inputs alone are 197 x 3 x 768 x 4 bytes.
    assert measure_memory(cases[1])["peak_bytes"] > 0


def _row(name: str, cpu_s: float, peak_bytes: int) -> Row:
    return Row("layer", name, 4, Spread.of([cpu_s / 2]), Spread.of([cpu_s]), peak_bytes, 1e9)


def test_the_table_shows_ratios_to_both_peers_and_the_distance_from_the_limit() -> None:
    console = Console(file=io.StringIO(), width=160)
    rows = [_row("fused (1,3,56)", 0.2, 10 << 20), _row(SDPA_BIAS, 2.0, 100 << 20), _row(SDPA, 0.8, 40 << 20)]
    console.print(table("layer", rows, 2e10))
    assert isinstance(console.file, io.StringIO)
    lines = [line for line in console.file.getvalue().splitlines() if "fused" in line]
    cells = [cell.strip() for cell in lines[0].strip("│").split("│")]
    # 0.1 s of wall time against 1e9 / 2e10 = 0.05 s.
    assert cells == [
        "4",
        "fused (1,3,56)",
        "0.1",
        "0.1-0.1 (n 1)",
        "0.2",
        "0.100",
        "0.250",
        "10.0",
        "0.100",
        "0.250",
        "2.00",
    ]


def test_the_record_holds_where_it_comes_from_every_row_and_the_growth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(measure: str, cases: list[Case], num_samples: int, *_: Any) -> dict[str, Any]:
        frames = cases[0].num_frames
        if measure == "memory":
            return {"peak_bytes": frames << 20}
        return {
            "samples": [[(0.1 * frames, 0.2 * frames)] * num_samples] * len(cases),
            "matmul_flops_per_s": 1e11,
        }

    monkeypatch.setattr(bench_model, "_ask", ask)
    console = Console(file=io.StringIO(), width=160)
    record_file = tmp_path / "records" / "bench.json"
    plan = Plan((4, 8), (4, 8, 16), layer_samples=3, encoder_samples=2)
    assert bench_model.bench_model(plan, 2, record_file, ProgressReport(console)) == 0
    record = json.loads(record_file.read_text())
    assert {"commit", "packages", "num_cpus", "memory_bytes"} <= record["provenance"].keys()
    assert (record["num_threads"], record["dtype"], record["matmul_flops_per_s"]) == (2, "float32", 1e11)
    assert len(record["rows"]) == sum(len(layer_cases(f)) + len(encoder_cases(f)) for f in (4, 8))
    first = record["rows"][0]
    assert first["cpu_s"] == {"n": 3, "median": 0.8, "least": 0.8, "most": 0.8}
    assert first["peak_bytes"] == 4 << 20
    assert [fit["name"] for fit in record["growth"]] == ["fused (1,3,56)", "fused dense", "both (1,3,56) 0.7"]
    for fit in record["growth"]:
        assert (fit["time_exponent"], fit["memory_exponent"]) == (pytest.approx(1), pytest.approx(1))


def test_a_measuring_process_that_fails_is_named_with_its_words() -> None:
    with pytest.raises(BenchError, match=r"measuring memory of fused dense at 0 frames[\s\S]*Error"):
        bench_model._ask("memory", [Case("layer", "fused dense", 0)], 1, 1, ON_CPU, {})


@pytest.mark.parametrize(("threads", "frames"), [(0, (4,)), (2, (0,)), (2, ())])
def test_what_cannot_be_measured_is_refused_at_once(
    threads: int, frames: tuple[int, ...], tmp_path: Path
) -> None:
    with pytest.raises(BenchError, match=f"threads is {threads} and frames are"):
        bench_model.bench_model(
            Plan(frames), threads, tmp_path / "record.json", ProgressReport(Console(file=io.StringIO()))
        )


def test_a_record_that_cannot_be_written_is_found_before_measuring(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BenchError, match="the record cannot be written to"):
        bench_model.bench_model(
            Plan.quick(), 1, tmp_path / "file" / "record.json", ProgressReport(Console(file=io.StringIO()))
        )


def test_cases_are_chosen_by_a_part_of_their_title(tmp_path: Path) -> None:
    names = [case.name for case in Plan(only=("dense", "blocks")).chosen(layer_cases(4))]
    assert names == ["blocks (1,3,56)", "fused dense"]
    assert not Plan(only=("encoder fused",)).chosen(layer_cases(4))
    report = ProgressReport(Console(file=io.StringIO()))
    with pytest.raises(BenchError, match="no case has 'fusd' in its title"):
        bench_model.bench_model(Plan((4,), only=("fusd",)), 1, tmp_path / "record.json", report)


@pytest.mark.parametrize(
    ("setup", "told"),
    [(Setup(num_clips=0), "clips is 0"), (Setup("cuda", "bfloat16", 2), "torch finds no GPU here")],
)
def test_a_place_that_cannot_be_measured_is_refused(
    setup: Setup, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BenchError, match=told):
        bench_model.bench_model(
            Plan(setup=setup), 1, tmp_path / "record.json", ProgressReport(Console(quiet=True))
        )


def test_a_gpus_layers_are_those_of_its_kernels() -> None:
    names = [case.name for case in layer_cases(4, Setup("cuda", "bfloat16", 8))]
    assert names == ["triton (1,3,56)", "triton (1,5,56)", "triton dense", SDPA_BIAS, SDPA]
