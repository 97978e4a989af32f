"""Whether a stage may be started once more: each kind of end has a budget of its own.

A machine that is taken away says nothing about the run, so preemptions have a large one. Crashes have a small one, and
two in a row at the same step a smaller one still: what is computed there is the same every time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from infra.ledger import Start


@dataclass(frozen=True, slots=True)
class Budgets:
    """How many of each a stage may have; one more ends it."""

    crashes: int
    crashes_at_one_step: int
    preemptions: int
    rollbacks: int


@dataclass(frozen=True, slots=True)
class Spent:
    """What the starts of a stage have used so far. `at_one_step`: crashes in a row at `step`."""

    crashes: int = 0
    preemptions: int = 0
    rollbacks: int = 0
    at_one_step: int = 0
    step: int | None = None
    last_reason: str = ""


def spent(starts: Sequence[Start]) -> Spent:
    """Judges every start but the last, which is the one at work; where each was lost, its follower knows.

    What other ranks met when they lost one (`collateral`) is part of the same crash.
    """
    crashes = preemptions = rollbacks = at_one_step = 0
    step: int | None = None
    reason = ""
    for start, following in pairwise(starts):
        # A micro-batch can be halved a few times only, so this ends by itself.
        if start.ended in ("done", "stopped", "halved", "gave_up"):
            continue
        if start.ended == "rollback":
            rollbacks, at_one_step = rollbacks + 1, 0
        elif start.is_preempted:
            preemptions, at_one_step = preemptions + 1, 0
        else:
            crashes += 1
            is_same = following.died_at is not None and following.died_at == step and at_one_step
            at_one_step, step = at_one_step + 1 if is_same else 1, following.died_at
        reason = start.reason or reason
    return Spent(crashes, preemptions, rollbacks, at_one_step, step, reason)


def give_up_reason(used: Spent, budgets: Budgets) -> str | None:
    """Why the stage must not be started again, for people; None while all budgets last."""
    tail = f" Last reason: {used.last_reason}" if used.last_reason else ""
    if used.step is not None and used.at_one_step >= budgets.crashes_at_one_step > 0:
        return (
            f"{used.at_one_step} crashes in a row at step {used.step} (cluster.max_crashes_at_one_step is "
            f"{budgets.crashes_at_one_step}): what happens there happens every time.{tail}"
        )
    for name, number, most, key in (
        ("crashes", used.crashes, budgets.crashes, "cluster.max_failures"),
        ("preemptions", used.preemptions, budgets.preemptions, "cluster.max_preemptions"),
        ("rollbacks", used.rollbacks, budgets.rollbacks, "guard.max_rollbacks"),
    ):
        if number > most:
            return f"{number} {name}, {key} allows {most}.{tail}"
    return None
