"""Preparation under fire: `python -m tests.soak.prepare_kills RECIPE --folder SCRATCH --kills 20`.

Prepares the same recipe with one worker, with two, and with two while it is killed at random moments and run again:
half of the kills take the driver alone, half every process of the run. Prints times and clips/s, and ends with 1
unless all three wrote the same bytes.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from pipeline.shards import sha256_of_file

# Files that a run may leave without being part of the set.
LEFT_OVER = ("prepare-recipe.yaml",)


def start(recipe: Path, shards: Path, num_workers: int) -> subprocess.Popen[bytes]:
    """A run in the background; its output goes to a file beside the shards."""
    command = [sys.executable, "-m", "jobs", "prepare", str(recipe)]
    command += ["--set", f"data.shards={shards}", "--set", f"cluster.num_cpus={num_workers}"]
    # A stage that would not fit on so few is refused, though none runs here.
    command += ["--set", "cluster.num_workers=1"]
    with shards.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def finish(run: subprocess.Popen[bytes], shards: Path) -> None:
    """Waits for a run that is left alone."""
    if run.wait() != 0:
        raise SystemExit(f"prepare ended with {run.returncode}: {shards.with_suffix('.log')}")


def kill_at(run: subprocess.Popen[bytes], after_s: float, takes_all: bool) -> bool:
    """SIGKILL after a time; False when the run had ended before."""
    try:
        run.wait(timeout=after_s)
        return False
    except subprocess.TimeoutExpired:
        pass
    family = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    for process in family if takes_all else []:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    run.wait()
    psutil.wait_procs(family, timeout=60)
    return True


def hashes(shards: Path) -> dict[str, str]:
    """SHA-256 of every file of the sets."""
    files = [path for path in sorted(shards.rglob("*")) if path.is_file() and path.name not in LEFT_OVER]
    return {str(path.relative_to(shards)): sha256_of_file(path) for path in files}


def main() -> int:
    """Runs and reports; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="where the three sets go; keeps them")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="decides the moments")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    outcome: dict[str, dict[str, str]] = {}
    calm_s = 0.0
    for num_workers in (1, 2):
        shards = folder / f"workers-{num_workers}"
        began = time.monotonic()
        finish(start(arguments.recipe, shards, num_workers), shards)
        calm_s = time.monotonic() - began
        outcome[shards.name] = hashes(shards)
        num_clips = json.loads((shards / "train" / "manifest.json").read_text())["num_clips"]
        print(
            f"{num_workers} worker(s): {num_clips} clips in {calm_s:.0f} s, {num_clips / calm_s:.1f} clips/s"
        )
    draw, shards = random.Random(arguments.seed), folder / "killed"
    began, num_kills, num_runs = time.monotonic(), 0, 0
    while num_kills < arguments.kills:
        # Spread over the whole work: a run that loses little gets as far as a calm one.
        after_s = draw.uniform(1.0, 2.0 * calm_s / arguments.kills + 20.0)
        run = start(arguments.recipe, shards, 2)
        num_runs += 1
        num_kills += kill_at(run, after_s, takes_all=num_kills % 2 == 1)
        found = len(list(shards.rglob("shard-*.tar")))
        print(
            f"run {num_runs}: {num_kills} kills, the last after {after_s:.1f} s; {found} shards", flush=True
        )
    finish(start(arguments.recipe, shards, 2), shards)
    outcome[shards.name] = hashes(shards)
    print(f"killed {num_kills} times and run again: {time.monotonic() - began:.0f} s")
    first, *others = outcome.values()
    same = all(first == other for other in others)
    print(f"{len(first)} files of each set; {'all the same bytes' if same else 'DIFFERENT'}")
    for name, found in outcome.items():
        differing = sorted(key for key in first.keys() | found.keys() if first.get(key) != found.get(key))
        if differing:
            print(f"{name}: {differing[:10]}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
