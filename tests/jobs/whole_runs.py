"""The smallest whole run in processes of its own, to be killed in every way: started, watched, killed, compared.

Everything below a started command inherits a mark in its environment, by which all of it can be killed.
"""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from infra.checkpoint import WEIGHTS
from infra.journal import metric_history
from infra.ledger import Ledger, RunState
from jobs.heartbeat import read_beats
from jobs.run_dir import RunDir

# Two stages of a model that trains in milliseconds a step, on clips drawn in seconds.
TINY = (
    "world.num_train_videos=2",
    "world.num_heldout_videos=1",
    "world.video_s=[12, 14]",
    "prepare.num_frames=4",
    "prepare.short_side=48",
    "prepare.clips_per_shard=8",
    "loader.image_size=32",
    "model.video.image_size=32",
    "model.video.patch_size=8",
    "model.video.width=32",
    "model.video.depth=3",
    "model.video.num_heads=2",
    "model.video.prune_layers=[0, 1]",
    "model.video.block_size=8",
    "model.text.width=32",
    "model.text.num_heads=2",
    "model.joint_width=16",
    "stages.0.name=short",
    "stages.0.num_frames=2",
    "stages.0.global_batch_size=8",
    "stages.0.warmup_steps=2",
    "stages.1.name=long",
    "stages.1.num_frames=4",
    "stages.1.global_batch_size=8",
    "stages.1.warmup_steps=2",
    "log_every_steps=1",
)
MARK = "SVITT_TEST_MARK"


@dataclass
class WholeRun:
    """A run in `workspace`, driven by `svitt` commands that may be killed and started again: the demo's recipe with the
    changes of `size`, then `overrides`.
    """

    workspace: Path
    name: str
    overrides: Sequence[str] = ()
    size: Sequence[str] = TINY
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    num_commands: int = 0
    mark: str = field(default_factory=lambda: f"whole-run-{uuid.uuid4().hex}")

    @property
    def run(self) -> RunDir:
        return RunDir(self.workspace / "runs" / self.name)

    @property
    def state(self) -> RunState:
        return Ledger(self.run.ledger_file).read()

    def start(self, verb: str = "submit", *options: str) -> None:
        """One `svitt` command over the run; what it prints goes to <workspace>/<name>-<n>.log."""
        self.num_commands += 1
        place = [str(self.run.path)]
        if verb == "demo":
            place = ["--workspace", str(self.workspace)]
        elif verb != "resume":
            place = ["demo", "--workspace", str(self.workspace)]
            if verb == "submit":
                place += ["--run-dir", str(self.run.path)]
        sets = [] if verb == "resume" else [p for o in (*self.size, *self.overrides) for p in ("--set", o)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", MARK: self.mark}
        self.workspace.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs", verb, *place, *sets, *options],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**environment, **self.environment},
            )

    @property
    def log(self) -> Path:
        return self.workspace / f"{self.name}-{self.num_commands}.log"

    def wait(self, deadline_s: float = 600.0) -> int:
        """Exit code of the command at work; all of it is killed and TimeoutError raised at the deadline."""
        assert self.process is not None
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.kill_everything()
            raise TimeoutError(f"{self.name} did not end in {deadline_s:.0f} s\n{self.tails()}") from None

    def wait_until(self, is_so: Callable[[], bool], deadline_s: float = 480.0) -> None:
        """Returns when it is so. Raises AssertionError when the command ends before, or at the deadline."""
        end_s = time.monotonic() + deadline_s
        while not is_so():
            assert self.process is not None
            assert self.process.poll() is None, f"it ended, {self.process.poll()}\n{self.tails()}"
            assert time.monotonic() < end_s, f"not so after {deadline_s:.0f} s\n{self.tails()}"
            time.sleep(0.02)

    def step(self, number: int) -> int:
        """The step that a stage's newest start is in; -1 where it has none yet."""
        starts = self.state.stage(number).starts
        generation = starts[-1].generation if starts else -1
        beats = read_beats(self.run.heartbeats(number))
        return max(
            (b.step for b in beats if b.generation == generation and b.phase in ("step", "save")), default=-1
        )

    def current_stage(self) -> int:
        """The first stage that is not done; 0 when all are."""
        state = self.state
        stages = range(1, len(self.run.recipe().stages) + 1) if self.run.recipe_file.exists() else [1]
        return next((n for n in stages if state.stage(n).status != "done"), 0)

    def kill_worker(self, number: int, rank: int, how: int = signal.SIGKILL) -> int:
        """A signal to one rank of the newest start; its process id."""
        generation = self.state.stage(number).starts[-1].generation
        (beat,) = [
            b
            for b in read_beats(self.run.heartbeats(number))
            if b.rank == rank and b.generation == generation
        ]
        os.kill(beat.pid, how)
        return beat.pid

    def kill_job(self, verb: str, how: int = signal.SIGKILL) -> list[int]:
        """A signal to the processes that run `svitt <verb>` of this run: `pretrain` or `control`."""
        found = [p for p in self.processes() if _runs(p, verb)]
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(how)
        return [process.pid for process in found]

    def processes(self) -> set[psutil.Process]:
        """All that was started by this run's commands and lives."""
        found = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark and is_alive(process):
                    found.add(process)
        return found

    def kill_everything(self) -> None:
        """SIGKILL to the command, all its descendants, and all that carry the mark, until none is left."""
        victims: set[psutil.Process] = set()
        if self.process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                root = psutil.Process(self.process.pid)
                victims |= {root, *root.children(recursive=True)}
        end_s = time.monotonic() + 60
        while victims := {victim for victim in victims | self.processes() if is_alive(victim)}:
            for victim in victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
            if self.process is not None:
                self.process.poll()
            assert time.monotonic() < end_s, f"could not be killed: {victims}"
            time.sleep(0.05)
        if self.process is not None:
            self.process.wait(10)

    def losses(self, number: int) -> list[tuple[int, float]]:
        """(step, loss) of all steps of a stage that count."""
        return metric_history(self.run.journal(number), "train/loss")

    def weights_hash(self, number: int) -> str:
        """Of the last committed checkpoint of a stage."""
        folder = Path(self.state.stage(number).facts["checkpoint"])
        return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()

    def tails(self, num_lines: int = 25) -> str:
        """The last lines of the newest command's output and of all logs of the run, for failure messages."""
        paths = [self.log, self.run.ledger_file, *sorted(self.run.path.glob("stage-*/logs/*.log"))]
        lines: list[str] = []
        for path in paths:
            if path.is_file():
                lines += [f"== {path}", *path.read_text(errors="replace").splitlines()[-num_lines:]]
        return "\n".join(lines)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def prepare_tiny(workspace: Path) -> None:
    """Videos, clips and shards of the tiny recipe, once for many runs."""
    for verb in ("synth", "clips", "prepare"):
        made = WholeRun(workspace, f"make-{verb}")
        made.start(verb)
        code = made.wait()
        assert code == 0, made.log.read_text()


def _runs(process: psutil.Process, verb: str) -> bool:
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    return verb in command and "jobs" in command
