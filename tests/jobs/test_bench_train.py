"""The arithmetic of `svitt bench train`, what it refuses, its processes at tiny sizes. No figure of speed is tested."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, cast
from unittest.mock import Mock

import psutil
import pytest
from video_files import write_video

from infra.config_io import load_config
from infra.journal import Journal, valid_records
from infra.ledger import Ledger
from jobs import bench_overhead, bench_train
from jobs.bench_overhead import (
    Loop,
    LoopWindow,
    Overhead,
    PipelineWindow,
    Round,
    one_stage,
    overhead_lines,
    pipeline_windows,
    run_pipeline,
    running_loop,
)
from jobs.bench_record import BenchError, Ratio, Spread
from jobs.bench_train import ENGINES, TrainPlan, batch_row, engine_rows, pass_rows, with_options
from jobs.bench_train_worker import (
    Shape,
    TimeLimitError,
    arguments_of,
    ask,
    measure_passes,
    random_batch,
    step_times,
)
from jobs.bench_turns import Turns, leaving_at_sigterm, tree
from jobs.prepare import run_prepare
from jobs.prepare_work import serial_mapper
from jobs.recipe import Recipe, load_recipe
from jobs.run_dir import RunDir
from model.video_text_model import VideoTextModel
from pipeline.egoclip import EgoClipRow, write_egoclip

TINY = Shape("tiny", 1, 4, 2)
QUICK = replace(TrainPlan.quick(), batches=(16, 32), engines=("plain", "ZeRO 2"), rounds=2)


def _answer(*step_s: float, device: int = 0, host: int = 0) -> dict[str, Any]:
    memory = {"resident_bytes": device // 2, "peak_device_bytes": device, "peak_host_bytes": host}
    return {"step_s": list(step_s), **memory}


def test_growth_and_rate_of_a_batch_are_over_the_first():
    first = batch_row(64, _answer(2.0, device=1000), None)
    assert (first.clips_per_s, first.resident_bytes, first.growth) == (32.0, 500, 0.0)
    assert batch_row(256, _answer(10.0, device=1015), first).growth == pytest.approx(1.5)


def test_passes_are_compared_with_one_pass_round_by_round():
    one, two = pass_rows((16, 8), [[[2.0, 4.0], [4.0, 8.0]], [[3.0, 5.0], [4.0, 8.0]]])
    assert one.wall == Ratio(1.0, Spread(2, 1.0, 1.0, 1.0))
    assert two.wall == Ratio(3.5 / 3.0, Spread(2, 1.25, 1.0, 1.5))
    assert two.cpu == Ratio(6.5 / 6.0, Spread(2, 1.125, 1.0, 1.25))


def test_an_engine_is_as_slow_as_its_slower_rank_and_as_large_as_its_larger_one():
    samples = {
        "plain": [[_answer(1.0, 3.0), _answer(2.0, 2.0)], [_answer(4.0), _answer(3.0)]],
        "ZeRO 2": [[_answer(4.0, device=7), _answer(5.0, device=5)], [_answer(2.0, host=3), _answer(2.0)]],
    }
    plain, zero = engine_rows(samples, 32)
    assert plain.step_s == Spread(2, 3.0, 2.0, 4.0)
    assert zero.step_s == Spread(2, 3.5, 2.0, 5.0)
    assert (zero.clips_per_s, zero.peak_device_bytes, zero.peak_host_bytes) == (32 / 3.5, 7, 3)
    assert zero.to_plain == Ratio(3.5 / 3.0, Spread(2, 1.5, 0.5, 2.5))


def test_windows_lie_between_saves_and_leave_out_what_ran_while_others_did(tmp_path):
    times_ms = iter([5_000, 9_000, 9_500, 14_000, 15_500, 17_500, 18_500, 20_000, 20_500])
    journal = Journal(tmp_path / "journal.jsonl", clock=lambda: next(times_ms) / 1000)

    def report(step: int, step_ms: float, wait_ms: float) -> None:
        journal.metrics(step, {"perf/step_ms": step_ms, "perf/data_wait_ms": wait_ms})

    report(10, 900.0, 100.0)  # what comes before the first save is start-up
    report(20, 400.0, 100.0)
    journal.metrics(20, {"perf/save_s": 0.5})
    report(30, 450.0, 50.0)
    report(40, 150.0, 30.0)
    report(50, 200.0, 10.0)
    journal.metrics(50, {"perf/save_s": 0.9})
    report(60, 150.0, 50.0)
    journal.metrics(60, {"perf/save_s": 0.3})
    journal.close()
    # It ran all the time but for 3 of the 9 s between the first two saves and for 1 s that begins with the second save.
    turns = Turns([], [(0.0, 10.0), (13.0, 18.5), (19.5, 30.0)])
    records = valid_records(journal.path)
    seen = {0: 1.0, 20: 10.0, 50: 25.0, 60: 27.0}
    first, second = pipeline_windows(records, seen, turns, least_s=1.0)
    # 9 s by the clock, 6 its own. Of the clock's: 8 s in steps, 0.9 waiting among them, 0.9 saving, 0.1 elsewhere.
    assert (first.since_s, first.until_s, first.num_steps) == (9.5, 18.5, 30)
    assert (first.step_ms, first.cpu_ms) == pytest.approx((200.0, 500.0))
    assert (first.busy_ms, first.wait_ms, first.save_ms) == pytest.approx((7100 / 45, 20.0, 20.0))
    assert first.rest_ms == pytest.approx(100 / 45)
    assert (second.num_steps, second.step_ms, second.cpu_ms) == pytest.approx((10, 100.0, 200.0))
    # 11 s by the clock, 7 its own; short windows are put together, and so are those without a time of their own.
    for whole in (
        pipeline_windows(records, seen, turns),
        pipeline_windows(records, {**seen, 50: 10.0}, turns, least_s=1.0),
    ):
        assert [(w.since_s, w.until_s, w.num_steps) for w in whole] == [(9.5, 20.5, 40)]
        assert (whole[0].step_ms, whole[0].cpu_ms, whole[0].save_ms) == pytest.approx(
            (175.0, 425.0, 1200 * 7 / 440)
        )
    with pytest.raises(BenchError, match=r"saves of \[20, 50, 60\].*more --steps"):
        pipeline_windows(records, {20: 10.0, 50: 3.0}, turns)  # the ranks were gone


def _window(since_s: float, until_s: float) -> PipelineWindow:
    return PipelineWindow(since_s, until_s, 10, 300.0, 500.0, 240.0, 30.0, 20.0)


def test_the_steps_of_a_loop_count_by_the_time_in_which_it_ran(tmp_path):
    ends_s = ((9.0, 1.0), (11.0, 2.0), (12.0, 3.0), (16.0, 4.5), (18.0, 5.0), (21.0, 6.0))
    for rank, factor in enumerate((1.0, 2.0)):
        lines = [f"{time_s} {factor * cpu_s}\n" for time_s, cpu_s in ends_s]
        (tmp_path / f"rank-{rank}.steps").write_text(
            "".join(lines) + "22.0 7."
        )  # the last one is being written
    loop = Loop(cast(Any, None), Turns([1, 2], [(8.0, 12.5), (15.5, 17.0), (17.5, 30.0)]), tmp_path)
    # From 11 to 18, three steps: 1.5 + 1.5 + 0.5 s its own; 3 s of one rank's processor and 6 of the other's.
    window = loop.window(_window(10.0, 20.0))
    assert (window.num_steps, window.step_ms, window.cpu_ms) == pytest.approx((3, 3500 / 3, 3000.0))
    with pytest.raises(BenchError, match=r"took 1 steps.*more --steps"):
        loop.window(_window(17.0, 20.0))
    assert step_times(tmp_path / "none", 2) == [[], []]


def test_a_tree_of_processes_stands_still_while_it_is_not_its_turn():
    grow = "import time\nwhile True:\n    print(1, flush=True)\n    time.sleep(0.01)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grow!r}])"
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        turns = Turns([process.pid])
        turns.halt()
        assert turns.spans == []
        until_s = time.monotonic() + 10.0
        states = {p.status() for p in tree(turns.roots)}
        # One that waits for a core is stopped as soon as it gets one.
        while states != {psutil.STATUS_STOPPED} and time.monotonic() < until_s:
            time.sleep(0.01)
            states = {p.status() for p in tree(turns.roots)}
        turns.go()
        assert states == {psutil.STATUS_STOPPED}
        for _ in range(10):
            process.stdout.readline()
        assert len(tree(turns.roots)) == 2
        turns.halt()
        ((since_s, ended_s),) = turns.spans
        assert turns.own_s(since_s - 5.0, ended_s + 5.0) == ended_s - since_s
        assert turns.own_s(since_s, since_s + 0.01) == pytest.approx(0.01, abs=1e-4)
        for child in reversed(tree(turns.roots)):
            child.kill()


def test_a_second_go_does_not_forget_the_first_and_sigterm_lets_go_before_it_ends():
    turns = Turns([])
    turns.go()
    time.sleep(0.02)
    turns.go()
    turns.halt()
    ((since_s, until_s),) = turns.spans
    assert until_s - since_s >= 0.02
    with pytest.raises(SystemExit) as left, leaving_at_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert left.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_overhead_is_said_by_window_and_split():
    first = PipelineWindow(0.0, 1.0, 30, 300.0, 500.0, 240.0, 30.0, 20.0)
    second = PipelineWindow(1.0, 2.0, 30, 330.0, 600.0, 310.0, 10.0, 0.0)
    reading = (LoopWindow(30, 290.0, 480.0), LoopWindow(30, 310.0, 520.0))
    bare = (LoopWindow(30, 250.0, 400.0), LoopWindow(30, 300.0, 500.0))
    rounds = [
        Round((window,), (reads,), (shows,), start_s)
        for window, reads, shows, start_s in zip((first, second), reading, bare, (31.0, 41.0), strict=True)
    ]
    overhead = Overhead.of(rounds)
    assert overhead.over_bare == Ratio(315 / 275, Spread(2, 1.15, pytest.approx(1.1), pytest.approx(1.2)))
    times, over_reading, over_bare, split, start = overhead_lines(overhead)
    assert "315.0 [300.0, 330.0] ms in the pipeline" in times
    assert "300.0 [290.0, 310.0] in a loop that reads the shards, 275.0 [250.0, 300.0] bare" in times
    assert (
        "reads: +5.0 % (+3.4 to +6.5 %, n 2), processor time +10.0 % (+4.2 to +15.4 %, n 2)" in over_reading
    )
    assert (
        "bare steps: +14.5 % (+10.0 to +20.0 %, n 2), processor time +22.2 % (+20.0 to +25.0 %" in over_bare
    )
    assert "the step itself takes longer 0.00 [-10.00, 10.00], waiting for data 20.00 [10.00, 30.00]" in split
    assert "saving 10.00 [0.00, 20.00], the rest 10.00 [10.00, 10.00]" in split
    assert "36.0 [31.0, 41.0] s" in start


def test_only_options_that_were_given_change_the_plan():
    plan = with_options(TrainPlan(), size="tiny", batches=(), rounds=None, steps=0)
    assert plan == replace(TrainPlan(), size="tiny", steps=0)
    assert replace(plan, pass_batch=32).micro_batch_sizes == (32, 16, 8)
    assert plan.micro_batch_sizes == (16, 8)


def test_the_record_holds_every_part_and_what_came_before_a_failure(report_lines, tmp_path, monkeypatch):
    def fake(
        measure: str, arguments: dict[str, Any], num_ranks: int, threads: int, limit_s: float
    ) -> list[Any]:
        if measure == "passes":
            return [[[[2.0, 4.0]] * 2, [[2.5, 5.0]] * 2]]
        if measure == "engine" and arguments["engine"]["zero_stage"] == 3:
            raise BenchError("no such engine")
        return [_answer(100.0, device=2**20)] * num_ranks

    monkeypatch.setattr(bench_train, "ask", fake)
    report, lines = report_lines
    plan = replace(QUICK, parts=("batch", "engines"), batches=(16, 32, 64), limit_s=250.0)
    record_file = tmp_path / "records" / "train.json"
    assert bench_train.bench_train(plan, None, 2, record_file, report) == 0
    record = json.loads(record_file.read_text())
    assert {"commit", "packages", "num_cpus", "memory_bytes"} <= record["provenance"].keys()
    # A step of 16 takes 100 s, so 64 would take 200 s; one of 32 took 100 s too.
    assert [row["batch_size"] for row in record["batch"]] == [16, 32, 64]
    assert [row["cpu"]["of_medians"] for row in record["passes"]] == [1.0, 1.25]
    assert [row["name"] for row in record["engines"]] == ["plain", "ZeRO 2"]
    assert any("1.250 (1.250-1.250)" in line for line in lines())
    with pytest.raises(BenchError, match="no such engine"):
        bench_train.bench_train(replace(plan, engines=("plain", "ZeRO 3")), None, 2, record_file, report)
    assert json.loads(record_file.read_text()).keys() >= {"batch", "passes"}


def test_a_batch_that_takes_too_long_is_left_out_and_said(report_lines, tmp_path, monkeypatch):
    asked: list[int] = []

    def fake(measure: str, arguments: dict[str, Any], *_: Any) -> list[Any]:
        if measure == "passes":
            return [[[[1.0, 1.0]], [[1.0, 1.0]]]]
        asked.append(arguments["shape"]["num_clips"])
        if asked[-1] == 32:
            raise TimeLimitError("measuring took longer than 10 s")
        return [_answer(4.0, device=2**20)]

    monkeypatch.setattr(bench_train, "ask", fake)
    report, lines = report_lines
    plan = replace(QUICK, parts=("batch",), batches=(64, 32, 16), limit_s=10.0)
    bench_train.bench_train(plan, None, 2, tmp_path / "train.json", report)
    assert asked == [16, 32]  # a step of 64 would take 16 s
    left_out = [line for line in lines() if "is left out" in line]
    assert len(left_out) == 2
    assert left_out[1].startswith("batch 64 is left out: a step would take longer than 10 s")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, r"rounds.*1 or more"),
        ({"batches": (4, 64)}, r"batches are \(4, 64\).*larger --batches"),
        ({"pass_batch": 8}, r"8 for the passes.*--pass-batch"),
        ({"batches": (10**9,)}, r"pixels of 1000000000 clips.*smaller --batches"),
        ({"engine_batch": 8}, r"batch of 8 for the engines.*--engine-batch"),
        ({"engines": ("plain", "ZeRO 4")}, r"ZeRO 4.*ZeRO 0"),
        ({"stage": 3}, r"no stage 3 in demo; there are 1 to 2"),
        ({"steps": 100}, r"--steps is 100, checkpoint.every_steps 40.*multiple of at least 80"),
        ({"steps": 40}, r"--steps is 40.*multiple of at least 80"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused_before_anything_is(
    changes: dict[str, Any], message: str, report_lines, tmp_path
):
    with pytest.raises(BenchError, match=message):
        bench_train.bench_train(
            replace(QUICK, **changes), load_recipe("demo"), 2, tmp_path / "record.json", report_lines[0]
        )
    assert not (tmp_path / "record.json").exists()


def test_a_stage_alone_is_a_recipe_that_scores_nothing_and_starts_once():
    recipe = load_recipe("demo", ("tracking.uri=http://mlflow:5000", "cluster.address=auto"))
    staged = one_stage(recipe, 2, 5)
    assert [(s.name, s.num_steps, s.warmup_steps) for s in staged.stages] == [("8-frames", 5, 5)]
    assert (staged.data.egomcq, staged.tracking.uri, staged.cluster.address) == (None, None, None)
    assert staged.cluster.max_failures == 0
    assert staged.engine == recipe.engine


_Popen = subprocess.Popen


class FakeSubmit:
    """Stands for `svitt submit`: nothing yet, then one more save every time it is looked at, then an exit code."""

    commands: ClassVar[list[list[str]]] = []
    saves_at: ClassVar[tuple[int, ...]] = (0, 2, 4)

    def __init__(self, command: list[str], stdout: Any, **_: Any) -> None:
        self.commands.append(command)
        self.busy = _Popen([sys.executable, "-c", "while True: pass"])  # processor time to see
        while not psutil.Process(self.busy.pid).cpu_times().user:
            time.sleep(0.01)
        self.pid, self.returncode, self.saves = self.busy.pid, None, iter(self.saves_at)
        run = RunDir(Path(command[-1]))
        self.journal, self.ledger = Journal(run.journal(1)), Ledger(run.ledger_file)
        stdout.write(b"it failed")

    def poll(self) -> int | None:
        step = next(self.saves, None)
        if step is None:
            self.journal.close()
            self.returncode = len(self.commands) - 1
            return self.returncode
        if step:
            self.journal.metrics(step, {"perf/step_ms": 10.0, "perf/data_wait_ms": 1.0})
            self.journal.metrics(step, {"perf/save_s": 0.5})
            self.ledger.record_stage(1, "running", step=step)
        return None

    def kill(self) -> None:
        self.journal.close()
        self.busy.kill()

    def wait(self) -> None:
        self.busy.wait()


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_pipeline_run_is_svitt_submit_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_overhead.subprocess, "Popen", FakeSubmit)
    recipe, later_s = one_stage(load_recipe("demo"), 1, 4), time.monotonic() + 60
    (window,), start_s = run_pipeline(recipe, _folder(tmp_path / "first"), (), later_s)
    assert window.num_steps == 2
    assert window.step_ms > 0
    assert window.cpu_ms > 0
    assert 0 < start_s < 60
    command = FakeSubmit.commands[0]
    assert command[2:5] == ["jobs", "submit", str(tmp_path / "first" / "recipe.yaml")]
    assert load_config(Recipe, tmp_path / "first" / "recipe.yaml") == recipe
    with pytest.raises(BenchError, match="svitt submit ended with 1:\nit failed"):
        run_pipeline(recipe, _folder(tmp_path / "second"), (), later_s)
    with pytest.raises(TimeLimitError, match="did not end in time; give fewer --steps"):
        run_pipeline(recipe, _folder(tmp_path / "third"), (), 0.0)


def test_pipeline_and_loops_never_run_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_overhead.subprocess, "Popen", FakeSubmit)
    monkeypatch.setattr(FakeSubmit, "commands", [])
    monkeypatch.setattr(FakeSubmit, "saves_at", (0, 2, *[0] * 12, 4))
    monkeypatch.setattr(bench_overhead, "_PIPELINE_TURN_S", 0.25)
    monkeypatch.setattr(bench_overhead, "_LOOP_TURN_S", 0.05)
    seen: list[Turns] = []
    monkeypatch.setattr(bench_overhead, "Turns", lambda roots: seen.append(Turns(roots)) or seen[-1])
    loops = [Loop(cast(Any, Mock()), Turns([]), tmp_path) for _ in range(2)]
    run_pipeline(
        one_stage(load_recipe("demo"), 1, 4), _folder(tmp_path / "run"), loops, time.monotonic() + 60
    )
    (pipeline,) = seen
    assert all(len(loop.turns.spans) >= 2 for loop in loops)
    spans = sorted(span for turns in (pipeline, *(loop.turns for loop in loops)) for span in turns.spans)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def test_passes_are_taken_in_turn_and_the_first_of_each_is_not_counted():
    samples = measure_passes(0, 1, asdict(TINY), (4, 2), rounds=2)
    assert [len(taken) for taken in samples] == [2, 2]
    assert all(wall > 0 and cpu > 0 for taken in samples for wall, cpu in taken)


def test_a_process_that_fails_is_named_with_its_words_and_a_slow_one_is_ended():
    with pytest.raises(BenchError, match=r"rank 0 ended with 1 [\s\S]*no-such-size"):
        ask("batch", arguments_of(replace(TINY, size="no-such-size"), num_steps=1), 1, 1, 300.0)
    with pytest.raises(TimeLimitError, match="took longer than 0 s"):
        ask("batch", arguments_of(TINY, num_steps=1), 1, 1, 0.0)


def test_the_pixels_of_a_batch_are_not_counted():
    (answer,) = ask(
        "batch", arguments_of(replace(TINY, num_clips=64, micro_batch_size=8), num_steps=1), 1, 1, 300.0
    )
    size = sum(p.numel() for p in VideoTextModel(TINY.model_config()).parameters())
    pixel_bytes = 64 * 3 * 96 * 96
    # Parameters, their copies and both moments, 4 bytes each.
    assert answer["resident_bytes"] - 16 * size < pixel_bytes / 4
    assert answer["peak_device_bytes"] > answer["resident_bytes"] + 4 * size
    assert answer["peak_host_bytes"] == 0


@pytest.mark.dist
def test_what_is_offloaded_counts_as_memory_of_the_host():
    config = ENGINES["ZeRO 3 offload all"]
    answers = ask(
        "engine", arguments_of(TINY, engine=config.model_dump(mode="json"), num_steps=1), 2, 1, 300.0
    )
    share = sum(p.numel() for p in VideoTextModel(TINY.model_config()).parameters()) / 2
    for answer in answers:
        # Parameters, their copies, both moments, gradients, what they add up in: 4 bytes each; the update's room.
        assert 24 * share <= answer["peak_host_bytes"] <= 24 * share + 2 * config.bucket_bytes
        assert answer["resident_bytes"] <= 2 * config.bucket_bytes + 24 * share / 2


def test_rows_of_two_ranks_are_different_clips_of_one_batch():
    first, second = (random_batch(TINY.model_config(), 4, rank * 4) for rank in (0, 1))
    assert first.index_B.tolist() == [0, 1, 2, 3]
    assert second.index_B.tolist() == [4, 5, 6, 7]
    assert not first.video_BTCHW.equal(second.video_BTCHW)


def test_loops_take_steps_from_prepared_shards_and_wait_for_their_turn(report_lines, tmp_path):
    write_video(tmp_path / "videos" / "a.mp4", num_frames=180)
    rows = [
        EgoClipRow(k, "a", 6.0, "narration_pass_1", k, k + 0.5, float(k), k + 1.0, "#C C waits", (k,), (k,))
        for k in range(5)
    ]
    write_egoclip(tmp_path / "egoclip.csv", rows)
    recipe = load_recipe(
        "demo",
        (
            f"data.egoclip={tmp_path}/egoclip.csv",
            f"data.videos={tmp_path}/videos",
            f"data.shards={tmp_path}/shards",
            "data.taxonomy=null",
            "stages.0.global_batch_size=4",
            "cluster.num_workers=1",
            "engine.backend=plain",
            "checkpoint.every_steps=1",
        ),
    )
    data, report = recipe.data, report_lines[0]
    run_prepare(data.egoclip, None, data.videos, None, data.shards, recipe.prepare, serial_mapper, report)
    staged = one_stage(recipe, 1, 3)
    for name in ("reading", "bare"):
        with running_loop(staged, tmp_path / name, name == "reading", time.monotonic() + 300) as loop:
            assert len(step_times(loop.steps_dir, 1)[0]) >= 2
            loop.turns.go()
            while len(step_times(loop.steps_dir, 1)[0]) < 6:  # more than the stage has
                assert loop.measuring.check()
                time.sleep(0.05)
            loop.turns.halt()
        assert not list((tmp_path / name / "stage-1" / "checkpoints").iterdir())
    with (
        pytest.raises(TimeLimitError, match=r"took no 2 steps in time"),
        running_loop(staged, tmp_path / "late", False, 0.0),
    ):
        pass
