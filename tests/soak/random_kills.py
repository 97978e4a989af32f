"""Training under fire: `python -m tests.soak.random_kills --zero 1 2 3 --kills 20 --folder SCRATCH [--record F]`.

A two-stage run of two workers, calm and then with kills at random steps: of a worker, of the stage's driver, of the
controller, of everything at once. Ends with 1 unless the whole list of losses and the hash of the final weights of both
stages are those of the calm run. Prints how long it took from each kill to the next step that was not there before.
"""

import argparse
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.jobs.whole_runs import WholeRun, prepare_tiny

# A controller takes some ten seconds to come back, in which a stage goes on: fifty steps of this model.
STEPS, SAVE_EVERY = 400, 7
KINDS = ("worker", "driver", "controller", "everything")


@dataclass(frozen=True)
class Kill:
    """`back_s`: until a rank was in a step that this run had not been in, None where the stage ended before."""

    kind: str
    stage: int
    step: int
    back_s: float | None


def whole_run(folder: Path, name: str, zero: int) -> WholeRun:
    overrides = (
        f"engine.zero_stage={zero}",
        f"stages.0.num_steps={STEPS}",
        f"stages.1.num_steps={STEPS}",
        f"checkpoint.every_steps={SAVE_EVERY}",
        "cluster.max_failures=1000",
        "cluster.max_crashes_at_one_step=0",
    )
    return WholeRun(folder, f"{name}-zero-{zero}", overrides)


def has_come(job: WholeRun, stage: int, step: int) -> bool:
    """Whether the run is at that step of that stage, or past it."""
    current = job.current_stage()
    return current == 0 or current > stage or (current == stage and job.step(stage) >= step)


def under_fire(job: WholeRun, num_kills: int, draw: random.Random) -> list[Kill]:
    """Starts the run and kills it; the kinds take turns in drawn order."""
    kills: list[Kill] = []
    job.start()
    while len(kills) < num_kills:
        kinds = draw.sample(KINDS, len(KINDS))
        for kind in kinds[: num_kills - len(kills)]:
            # The last sixth is left free, so that the run is still on when the last kill comes.
            share = 5 / 3 * STEPS * (len(kills) + 1) / num_kills
            stage = 1 if share < STEPS else 2
            wanted = round(share) - STEPS * (stage - 1)
            target = max(1, min(STEPS - 1, wanted + draw.randint(-1, 1)))
            job.wait_until(lambda s=stage, t=target: has_come(job, s, t))
            kills.append(kill_once(job, kind, draw))
            print(f"{job.name}: {kills[-1]}", flush=True)
    code = job.wait(3600)
    if code != 0:
        raise SystemExit(f"{job.name} ended with {code}\n{job.tails()}")
    return kills


def kill_once(job: WholeRun, kind: str, draw: random.Random) -> Kill:
    stage = job.current_stage()
    if stage == 0:
        raise SystemExit(
            f"{job.name} was over before a {kind} could be killed: it needs more steps\n{job.tails()}"
        )
    step, generation = job.step(stage), job.state.generation
    began_s = time.monotonic()
    if kind == "worker":
        job.kill_worker(stage, draw.randrange(2))
    elif kind == "driver":
        job.kill_job("pretrain")
    elif kind == "controller":
        job.kill_job("control")
        # The stage goes on under its own job; what has to come back is the one that forwards and submits.
        controllers = job.state.facts["controllers"]
        job.wait_until(lambda: job.state.facts["controllers"] > controllers or job.current_stage() == 0)
        return Kill(kind, stage, step, round(time.monotonic() - began_s, 1))
    else:
        job.kill_everything()
        job.start()
    job.wait_until(
        lambda: (job.state.generation > generation and job.step(stage) >= 0) or job.current_stage() != stage
    )
    return Kill(kind, stage, step, round(time.monotonic() - began_s, 1))


def compare(calm: WholeRun, shot: WholeRun) -> list[str]:
    """What differs; nothing is what it has to be."""
    problems = []
    for stage in (1, 2):
        expected, found = calm.losses(stage), shot.losses(stage)
        if [step for step, _ in expected] != list(range(1, STEPS + 1)):
            problems.append(f"stage {stage}: the calm run has steps {[step for step, _ in expected]}")
        if expected != found:
            problems.append(f"stage {stage}: losses differ, {len(found)} against {len(expected)}")
        if calm.weights_hash(stage) != shot.weights_hash(stage):
            problems.append(f"stage {stage}: weights differ")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zero", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    prepare_tiny(options.folder)
    record, has_failed = {}, False
    for zero in options.zero:
        calm = whole_run(options.folder, "calm", zero)
        if not calm.run.recipe_file.exists() or calm.current_stage() != 0:
            calm.start()
            if calm.wait(3600) != 0:
                raise SystemExit(calm.tails())
        shot = whole_run(options.folder, f"shot-{options.seed}", zero)
        began_s = time.monotonic()
        kills = under_fire(shot, options.kills, random.Random(options.seed))
        problems = compare(calm, shot)
        back = {k: [x.back_s for x in kills if x.kind == k and x.back_s is not None] for k in KINDS}
        times = ", ".join(
            f"{kind} {statistics.median(s):.1f} s ({min(s):.1f}-{max(s):.1f}, n {len(s)})"
            for kind, s in back.items()
            if s
        )
        print(
            f"ZeRO {zero}: {len(kills)} kills in {time.monotonic() - began_s:.0f} s, "
            f"{'; '.join(problems) or 'losses and weights are those of the calm run, bit for bit'}. "
            f"From kill to step: {times}",
            flush=True,
        )
        record[f"zero_{zero}"] = {"kills": [asdict(kill) for kill in kills], "problems": problems}
        has_failed |= bool(problems)
    if options.record:
        options.record.write_text(json.dumps(record, indent=1) + "\n")
    return int(has_failed)


if __name__ == "__main__":
    raise SystemExit(main())
