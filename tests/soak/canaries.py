"""No secret is written anywhere: `python -m tests.soak.canaries --folder SCRATCH`.

A tiny run under Ray with strings in secret environment variables that stand nowhere else, and recipes with passwords in
addresses, which have to be refused. Then every byte of the run directory, the MLflow store, what the commands printed,
the logs of Ray's session and the report page is searched for them.
"""

import argparse
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.jobs.whole_runs import WholeRun, prepare_tiny

NAMES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "HF_TOKEN",
    "WANDB_API_KEY",
)
OVERRIDES = ("stages.0.num_steps=6", "stages.1.num_steps=6", "checkpoint.every_steps=3")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    folder: Path = parser.parse_args().folder
    canaries = {name: f"canary{secrets.token_hex(8)}" for name in NAMES}
    prepare_tiny(folder)
    in_address = f"canary{secrets.token_hex(8)}"
    refused = {
        "a password": f"tracking.uri=http://me:{in_address}@127.0.0.1:5000",
        "a signature": f"checkpoint.mirror=https://127.0.0.1/c?X-Amz-Signature={in_address}",
    }
    for what, override in refused.items():
        job = WholeRun(folder, "canary-refused", (*OVERRIDES, override))
        job.start()
        code = job.wait()
        print(
            f"a recipe with {what} in an address: exit code {code}, {job.log.read_text().strip()}", flush=True
        )
        if code != 2 or job.run.recipe_file.exists():
            raise SystemExit("it was not refused")
    job = WholeRun(folder, "canary", OVERRIDES, environment=canaries)
    sessions: list[Path] = []
    try:
        job.start()
        assert job.process is not None
        job.wait_until(lambda: job.step(2) >= 1)
        sessions += [path for path in sessions_of_ray() if path.name == str(job.process.pid)]
        if not sessions:
            raise SystemExit("the logs of Ray's session were not found, so they cannot be searched")
        found = search(sessions, canaries | {"in a recipe": in_address})
        if job.wait() != 0:
            raise SystemExit(job.tails())
    finally:
        job.kill_everything()
    made = subprocess.run(
        [sys.executable, "-m", "jobs", "report", str(job.run.path)],
        env={**os.environ, **canaries},
        capture_output=True,
        text=True,
    )
    (folder / "canary-report.log").write_text(made.stdout + made.stderr)
    if made.returncode != 0:
        raise SystemExit(made.stderr)
    places = [
        job.run.path,
        *folder.glob("mlflow.db*"),
        folder / "mlartifacts",
        *folder.glob("canary*.log"),
        *sessions,
    ]
    found += search(places, canaries | {"in a recipe": in_address})
    for line in found:
        print(line)
    print("no canary was found" if not found else f"{len(found)} files hold one")
    return 1 if found else 0


def sessions_of_ray() -> Iterator[Path]:
    """Folders of the local clusters of this user."""
    yield from Path(tempfile.gettempdir()).glob(f"svitt-ray-{os.getuid()}/*")


def search(places: list[Path], canaries: Mapping[str, str]) -> list[str]:
    """Which files hold which canary."""
    found, num_files, num_bytes = [], 0, 0
    for place in places:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if not path.is_file():
                continue
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue
            num_files, num_bytes = num_files + 1, num_bytes + len(content)
            found += [f"{path}: {name}" for name, canary in canaries.items() if canary.encode() in content]
    print(
        f"searched {num_files} files, {num_bytes / 2**20:.1f} MiB, of {[str(p) for p in places]}", flush=True
    )
    return found


if __name__ == "__main__":
    raise SystemExit(main())
