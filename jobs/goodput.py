"""Where the time of a run went, from its ledger and journals: what trained, and what was lost to starts, waits, saves
and faults. Wall-clock times of one machine, the first rank's; for people, nothing is decided by them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

from infra.journal import Record, read_journal
from infra.ledger import Ledger, Start
from jobs.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class Goodput:
    """Seconds of a run; they add up to `wall_s`.

    productive: steps whose result stands. data_wait, save: what those steps waited for. evaluation: scoring.
    start: from the submission of a stage to its first step. restart: the same after a fault, from the last sign of life
    on. lost: steps that were computed again. down: nobody drove the run. other: what no record tells.
    """

    productive_s: float = 0.0
    data_wait_s: float = 0.0
    save_s: float = 0.0
    evaluation_s: float = 0.0
    start_s: float = 0.0
    restart_s: float = 0.0
    lost_s: float = 0.0
    down_s: float = 0.0
    other_s: float = 0.0

    @property
    def wall_s(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def share(self) -> float:
        """Productive time / wall time."""
        return self.productive_s / self.wall_s if self.wall_s else 0.0

    def line(self) -> str:
        """`goodput 71 % of 5 min 43 s: start 12 %, ...`, the larger parts first."""
        parts = {f.name.removesuffix("_s").replace("_", " "): getattr(self, f.name) for f in fields(self)}
        parts.pop("productive")
        wall_s = self.wall_s or 1.0
        rest = ", ".join(
            f"{name} {100 * seconds / wall_s:.0f} % ({seconds:.0f} s)"
            for name, seconds in sorted(parts.items(), key=lambda item: -item[1])
            if seconds >= 0.5
        )
        minutes, seconds = divmod(round(self.wall_s), 60)
        return f"goodput {100 * self.share:.0f} % of {minutes} min {seconds} s" + (
            f": {rest}" if rest else ""
        )


@dataclass(frozen=True, slots=True)
class _Life:
    """One start of a stage as the journal has it. `from_s` is what its start-up counts from."""

    start: Start
    from_s: float
    is_first: bool
    records: tuple[Record, ...]

    @property
    def first_step_s(self) -> float | None:
        """When its first step began; None where it reported none."""
        for record in self.records:
            if "perf/busy_s" in record.values:
                used_s = record.values["perf/busy_s"] + record.values["perf/wait_s"]
                return record.time_ms / 1e3 - used_s
        return None

    @property
    def last_sign_s(self) -> float:
        return max([self.start.time_s, *(record.time_ms / 1e3 for record in self.records)])


def goodput(run: RunDir) -> Goodput:
    """Of everything the run has done so far."""
    state = Ledger(run.ledger_file).read()
    sums = {field.name: 0.0 for field in fields(Goodput)}
    signs = [*state.controller_times_s]
    for number, stage in state.stages.items():
        records = [r for r in read_journal(run.journal(number))[0] if r.kind in ("metrics", "resume")]
        lives = list(_lives(stage.starts, stage.attempt_times_s, state.controller_times_s, records))
        for life, following in pairwise([*lives, None]):
            assert life is not None
            _add_life(sums, life, following)
        times = stage.status_times_s
        if "trained" in times and "done" in times:
            sums["evaluation_s"] += max(0.0, times["done"] - times["trained"])
        signs += [*stage.attempt_times_s, *times.values(), *(start.time_s for start in stage.starts)]
        signs += [record.time_ms / 1e3 for record in records]
    for time_s in state.controller_times_s:
        sums["down_s"] += time_s - max((sign for sign in signs if sign < time_s), default=time_s)
    wall_s = max(signs) - min(signs) if signs else 0.0
    sums["other_s"] = max(0.0, wall_s - sum(sums.values()))
    return Goodput(**sums)


def _lives(
    starts: Sequence[Start],
    attempts_s: Sequence[float],
    controllers_s: Sequence[float],
    records: Sequence[Record],
) -> Iterator[_Life]:
    last_sign_s: float | None = None
    for start in starts:
        submitted_s = max((time_s for time_s in attempts_s if time_s <= start.time_s), default=start.time_s)
        own = tuple(record for record in records if record.generation == start.generation)
        from_s = submitted_s
        if last_sign_s is not None:
            # After a fault its start-up counts from the last sign of life, unless somebody started the run anew since.
            driven_s = max((time_s for time_s in controllers_s if time_s <= start.time_s), default=0.0)
            from_s = max(last_sign_s, driven_s)
        life = _Life(start, from_s, last_sign_s is None, own)
        last_sign_s = life.last_sign_s
        yield life


def _add_life(sums: dict[str, float], life: _Life, following: _Life | None) -> None:
    """Adds one start. Steps after what the following one resumed from were computed again."""
    first_step_s = life.first_step_s
    begun_s = life.last_sign_s if first_step_s is None else first_step_s
    sums["start_s" if life.is_first else "restart_s"] += max(0.0, begun_s - life.from_s)
    kept = float("inf")
    if following is not None:
        kept = min((r.step for r in following.records if r.kind == "resume"), default=kept)
    for record in life.records:
        values = record.values
        if record.kind != "metrics":
            continue
        if record.step > kept:
            sums["lost_s"] += sum(values.get(f"perf/{name}_s", 0.0) for name in ("busy", "wait", "save"))
            continue
        sums["productive_s"] += values.get("perf/busy_s", 0.0)
        sums["data_wait_s"] += values.get("perf/wait_s", 0.0)
        sums["save_s"] += values.get("perf/save_s", 0.0)
