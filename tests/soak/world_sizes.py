"""Another number of ranks in the middle of a stage: `python -m tests.soak.world_sizes --folder SCRATCH [--zero 1 2 3]`.

A stage of two ranks is stopped, goes on with one, is stopped, and goes on with two. Ends with 1 unless it saw the same
clips at every step as the calm run and its losses are within 1e-5.
"""

import argparse
from pathlib import Path

from tests.jobs.whole_runs import WholeRun, prepare_tiny

STEPS, TOLERANCE = 45, 1e-5


def whole_run(folder: Path, name: str, zero: int) -> WholeRun:
    overrides = (
        f"engine.zero_stage={zero}",
        "stages.0.num_steps=6",
        f"stages.1.num_steps={STEPS}",
        "checkpoint.every_steps=6",
        "cluster.num_cpus=2",
    )
    return WholeRun(folder, f"{name}-zero-{zero}", overrides)


def stop_at(job: WholeRun, step: int) -> None:
    """Waits for a step of stage 2, asks the run to stop as `svitt stop` does, and waits for it."""
    job.wait_until(lambda: job.step(2) >= step)
    job.run.stop_file.write_text('{"reason": "user"}')
    code = job.wait()
    if code != 3:
        raise SystemExit(f"it ended with {code} instead of stopping\n{job.tails()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zero", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    prepare_tiny(options.folder)
    has_failed = False
    for zero in options.zero:
        calm, moved = whole_run(options.folder, "calm-w", zero), whole_run(options.folder, "moved", zero)
        calm.start()
        if calm.wait() != 0:
            raise SystemExit(calm.tails())
        moved.start()
        stop_at(moved, 12)
        moved.start("resume", "--set", "cluster.num_workers=1")
        stop_at(moved, 24)
        moved.start("resume", "--set", "cluster.num_workers=2")
        if moved.wait() != 0:
            raise SystemExit(moved.tails())
        expected, found = dict(calm.losses(2)), dict(moved.losses(2))
        same_steps = expected.keys() == found.keys() == set(range(1, STEPS + 1))
        worst = max(abs(expected[step] - found[step]) for step in expected.keys() & found.keys())
        exact = sum(expected[step] == found.get(step) for step in expected)
        starts = [(s.attempt, s.ended) for s in moved.state.stage(2).starts]
        print(
            f"ZeRO {zero}: 2 -> 1 -> 2 ranks, starts {starts}; steps the same: {same_steps}; largest difference of a "
            f"loss {worst:.2e} ({exact} of {STEPS} equal to the last bit)",
            flush=True,
        )
        has_failed |= not same_steps or worst > TOLERANCE
    return int(has_failed)


if __name__ == "__main__":
    raise SystemExit(main())
