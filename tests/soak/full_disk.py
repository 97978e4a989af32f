"""A disk that fills up under a run: `python -m tests.soak.full_disk --small MOUNT --scratch FOLDER`.

MOUNT is a file system of its own of some tens of MiB, such as `mount -t tmpfs -o size=40m tmpfs MOUNT`; the run
directory lies there. In the middle of stage 1 all that is free is taken for 20 s. Then it is given back, and the run
told to go on if it ended. Ends with 1 unless the newest checkpoint of before was good all the time, what failed was
said, and losses and weights are those of a calm run in FOLDER.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from infra.checkpoint import CheckpointStore
from jobs.run_dir import RunDir
from tests.jobs.whole_runs import WholeRun, prepare_tiny

STEPS, SAVE_EVERY, FILLED_AT = 160, 5, 42
OVERRIDES = (
    f"stages.0.num_steps={STEPS}",
    f"stages.1.num_steps={STEPS}",
    f"checkpoint.every_steps={SAVE_EVERY}",
)


@dataclass
class RunElsewhere(WholeRun):
    """Its run directory lies in another folder than its clips."""

    place: Path = Path()

    @property
    def run(self) -> RunDir:
        return RunDir(self.place / self.name)


def fill(folder: Path) -> Path:
    """Takes all that is free there, to the last page."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for piece in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(piece))
            except OSError:
                continue
    return ballast


def newest_good(job: WholeRun) -> int:
    """Step of the newest checkpoint of stage 1 whose files are what its manifest says; 0 where there is none."""
    # As another rank than the first, which tidies up when it opens a store.
    found = CheckpointStore(job.run.checkpoints(1), rank=1, world_size=2).newest_good()
    return found.step if found is not None else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    options = parser.parse_args()
    if options.small.stat().st_dev == options.small.parent.stat().st_dev:
        raise SystemExit(f"{options.small} is no file system of its own; filling it would fill others' disk")
    prepare_tiny(options.scratch)
    calm = WholeRun(options.scratch, "calm", OVERRIDES)
    calm.start()
    if calm.wait(1800) != 0:
        raise SystemExit(calm.tails())

    job = RunElsewhere(options.scratch, "full", OVERRIDES, place=options.small)
    job.start()
    job.wait_until(lambda: job.step(1) >= FILLED_AT)
    ballast = fill(options.small)
    before, began_s = newest_good(job), time.monotonic()
    # Steps take a tenth of a second: time for several saves.
    while job.process is not None and job.process.poll() is None and time.monotonic() - began_s < 20:
        time.sleep(0.2)
    code = job.process.poll() if job.process is not None else None
    during = newest_good(job)
    print(
        f"filled when {before} was the newest good checkpoint; 20 s later {during}, exit code {code}",
        flush=True,
    )
    ballast.unlink()
    if code is None:
        code = job.wait(1800)
    if code != 0:
        print(f"ended with {code}; its last words:\n{job.tails(6)[-3000:]}", flush=True)
        job.start("resume")
        code = job.wait(1800)
    words = [line for log in job.run.path.glob("stage-1/logs/*.log") for line in log.read_text().splitlines()]
    said = [line for line in words if "No space left" in line or "free" in line]
    print("\n".join(said[:3]))
    problems = [f"exit code {code}"] if code else []
    problems += [] if during >= before > 0 else ["the checkpoint from before is lost"]
    problems += [] if said else ["nothing was said of the full disk"]
    for stage in (1, 2):
        if job.losses(stage) != calm.losses(stage):
            problems.append(
                f"stage {stage}: losses differ, {len(job.losses(stage))} of {len(calm.losses(stage))}"
            )
        if job.weights_hash(stage) != calm.weights_hash(stage):
            problems.append(f"stage {stage}: weights differ")
    print("; ".join(problems) or "losses and weights are those of the calm run, bit for bit")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
