"""The controller killed at every line of the hand-over between two stages, on a cluster's job table in memory."""

import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any, cast

import pytest
from fake_jobs import FakeJobs, state
from small_runs import small_run

from infra.ledger import Ledger
from infra.ray_jobs import Jobs, JobState
from jobs.run_dir import RunDir
from jobs.stage_jobs import Outcome, run_stage_jobs

KILLED = 77


class TableOnDisk(FakeJobs):
    """A job table that outlives its process: a file for each submitted job. A job waited for has done its stage."""

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        super().__init__(on_look=self._finish)
        self._folder, self._ledger = folder, ledger
        folder.mkdir(exist_ok=True)
        self.states = {path.name: state(path.name, path.read_text()) for path in folder.iterdir()}

    def submit_once(self, submission_id: str, *arguments: Any, **options: Any) -> JobState:
        found = super().submit_once(submission_id, *arguments, **options)
        (self._folder / submission_id).write_text("RUNNING")
        return found

    def _finish(self, job_id: str) -> JobState:
        number = int(job_id.rsplit("-s", 1)[1].split("-a")[0])
        if number == 2:
            assert self._ledger.read().stage(1).status == "done"
        self._ledger.record_stage(number, "done")
        (self._folder / job_id).write_text("SUCCEEDED")
        return state(job_id, "SUCCEEDED", 0)


def drive_both_stages(run: RunDir) -> list[Outcome]:
    """As the controller does."""
    ledger = Ledger(run.ledger_file)
    table = cast(Jobs, TableOnDisk(run.path / "table", ledger))
    return [run_stage_jobs(table, run, ledger, n, 3, say=lambda *values: None) for n in (1, 2)]


def killed_at_line(run: RunDir, line: int) -> bool:
    """Whether a process that drives both stages came to the `line`-th line of `stage_jobs`, or of what appends to the
    ledger, and died there.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
    try:
        seen = 0

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal seen
            code = frame.f_code
            if not code.co_filename.endswith("jobs/stage_jobs.py") and code.co_name != "_append":
                return None
            if event == "line":
                seen += 1
                if seen == line:
                    os._exit(KILLED)
            return trace

        sys.settrace(trace)
        drive_both_stages(run)
    finally:
        os._exit(0)


def test_a_controller_killed_at_any_line_submits_no_stage_twice_and_the_chain_goes_on(tmp_path: Path) -> None:
    fresh = small_run(tmp_path / "fresh")
    line = 0
    while True:
        line += 1
        run = RunDir(tmp_path / str(line))
        run.path.mkdir()
        (run.path / "recipe.yaml").write_bytes(fresh.recipe_file.read_bytes())
        was_killed = killed_at_line(run, line)
        assert drive_both_stages(run) == ["done", "done"]
        # An attempt whose job Ray never saw is followed by the next; none is trained twice.
        submitted = [path.name for path in (run.path / "table").iterdir()]
        assert sorted(name.rsplit("-s", 1)[1][0] for name in submitted) == ["1", "2"]
        assert [Ledger(run.ledger_file).read().stage(n).status for n in (1, 2)] == ["done", "done"]
        if not was_killed:
            break
    assert line > 60


@pytest.mark.parametrize("status", ["pending", "running", "failed", "stopped"])
def test_what_is_not_committed_is_not_started_from(status: str, tmp_path: Path) -> None:
    from jobs.pretrain import StageError, inherit_weights

    run = small_run(tmp_path)
    ledger = Ledger(run.ledger_file)
    ledger.record_stage(1, status)  # type: ignore[arg-type]

    class Context:
        pass

    context = Context()
    context.number, context.ledger, context.run = 2, ledger, run  # type: ignore[attr-defined]
    with pytest.raises(StageError, match=f"stage 1, which is {status}"):
        inherit_weights(context, None)  # type: ignore[arg-type]
