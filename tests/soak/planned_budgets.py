"""Plans for budgets, each rehearsed under its limit, and then with one clip more at once, which must not fit.

`python -m tests.soak.planned_budgets` goes through all, in some ten minutes on idle cores.
"""

import argparse
import sys
import time
from dataclasses import replace

from infra.config import EngineConfig
from jobs.memory_probe import ShortageError, probe
from jobs.plan import engine_words, probe_request, recompute_words
from jobs.plan_search import Plan, Planner, Workload, candidates, search, usable_bytes
from model.config import ModelConfig

MIB, GIB = 2**20, 2**30
LENGTH, TAGS = 32, (118, 582)


def work(size: str, frames: int, clips: int, ranks: int) -> Workload:
    model = ModelConfig.named(size).replaced(video={"num_frames": frames})
    return Workload(f"{size} T {frames}", model, clips, ranks, LENGTH, TAGS)


BUDGETS = (
    (work("tiny", 4, 64, 1), 100 * MIB),
    (work("tiny", 16, 32, 2), 60 * MIB),
    (work("small", 4, 32, 1), 1400 * MIB),
    (work("small", 8, 16, 2), 900 * MIB),
    (work("base", 16, 32, 1), 2900 * MIB),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", type=int, nargs="+", default=range(len(BUDGETS)), help="numbers of budgets, from 0"
    )
    chosen = [BUDGETS[number] for number in parser.parse_args().only]
    engine, failures = EngineConfig(bucket_bytes=4 * MIB), 0
    for load, memory_bytes in chosen:
        began_s = time.monotonic()
        tried = list(candidates(engine, load.model, load.world_size, has_kernel=True))
        plan = search([load], tried, usable_bytes(memory_bytes), 16 * GIB, Planner())
        if not isinstance(plan, Plan):
            print(f"{load.name}, {memory_bytes / MIB:.0f} MiB: nothing fits, {plan}", flush=True)
            failures += 1
            continue
        (choice,) = plan.choices
        words = f"{engine_words(choice.settings)}, recompute {recompute_words(choice.settings.recompute)}"
        planned_s = time.monotonic() - began_s
        try:
            found = f"took {probe(probe_request(load, choice, False, memory_bytes)).peak_bytes / MIB:.1f}"
        except ShortageError as shortage:
            found, failures = f"RAN SHORT ({shortage})", failures + 1
        larger = replace(choice, micro_batch_size=choice.micro_batch_size + 1)
        try:
            more = probe(probe_request(load, larger, False, memory_bytes))
            refused, failures = f"FITS TOO ({more.peak_bytes / MIB:.1f} MiB)", failures + 1
        except ShortageError:
            refused = "does not fit"
        print(
            f"{load.name}, {load.clips_per_rank} clips on each of {load.world_size}, {memory_bytes / MIB:.0f} MiB: "
            f"{words}, {choice.micro_batch_size} at once (planned in {planned_s:.0f} s); predicted "
            f"{choice.prediction.total / MIB:.1f} MiB, {found}; {larger.micro_batch_size} at once {refused}",
            flush=True,
        )
    print(f"{len(chosen)} budgets, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
