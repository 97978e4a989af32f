"""A cluster's job table in memory, for tests of what submits, waits and follows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from infra.ray_jobs import JobError, JobState


def state(job_id: str, status: str, exit_code: int | None = None, message: str = "") -> JobState:
    return JobState(job_id, status, message, exit_code)


@dataclass
class FakeJobs:
    """`states` is the table. A job waited for, or asked for by `status`, moves on through `on_look`."""

    states: dict[str, JobState] = field(default_factory=dict)
    on_look: Callable[[str], JobState | None] = lambda job_id: None
    has_logs: bool = True
    submitted: list[str] = field(default_factory=list)
    commands: dict[str, list[str]] = field(default_factory=dict)
    env_vars: dict[str, dict[str, str]] = field(default_factory=dict)
    waited: list[str] = field(default_factory=list)

    def find(self, submission_id: str) -> JobState | None:
        return self.states.get(submission_id)

    def submit_once(
        self,
        submission_id: str,
        entrypoint: str | Sequence[str],
        env_vars: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> JobState:
        if submission_id in self.states:
            return self.states[submission_id]
        self.submitted.append(submission_id)
        self.commands[submission_id] = list(entrypoint)
        self.env_vars[submission_id] = dict(env_vars or {})
        self.states[submission_id] = state(submission_id, "PENDING")
        return replace(self.states[submission_id], is_new=True)

    def status(self, submission_id: str) -> JobState:
        if submission_id not in self.states:
            raise JobError(f"no job {submission_id}")
        moved = self.on_look(submission_id)
        if moved is not None:
            self.states[submission_id] = moved
        return self.states[submission_id]

    def wait(self, submission_id: str, poll_s: float = 0.5) -> JobState:
        self.waited.append(submission_id)
        found = self.status(submission_id)
        assert found.is_finished, f"{submission_id} would be waited for without end"
        return found

    def logs(self, submission_id: str) -> str:
        if not self.has_logs:
            raise JobError("gone")
        return f"printed by {submission_id}\n"
