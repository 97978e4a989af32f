"""What counts as which kind of end, and when a stage is given up."""

from dataclasses import replace

import pytest

from infra.ledger import EndKind, Start
from jobs.retry_budget import Budgets, Spent, give_up_reason, spent

BUDGETS = Budgets(crashes=2, crashes_at_one_step=2, preemptions=3, rollbacks=1)


def starts(*ends: tuple[EndKind | None, int | None], is_preempted: bool = False) -> list[Start]:
    """One start for each end (kind, step where it was lost), and the one at work."""
    found = [Start(1, 1, 1, 0.0)]
    for kind, step in ends:
        found[-1] = replace(found[-1], ended=kind, reason=f"{kind} at {step}", is_preempted=is_preempted)
        found.append(Start(len(found) + 1, 1, 1, 0.0, died_at=step))
    return found


def test_the_first_start_has_spent_nothing() -> None:
    assert spent(starts()) == Spent()
    assert give_up_reason(spent(starts()), BUDGETS) is None


def test_a_kill_an_error_and_what_others_met_are_crashes() -> None:
    used = spent(starts((None, 3), ("error", 5), ("collateral", 9)))
    assert (used.crashes, used.preemptions, used.rollbacks, used.at_one_step) == (3, 0, 0, 1)


def test_ends_of_their_own_cost_nothing() -> None:
    assert (
        spent(
            starts(("stopped", None), ("done", None), ("halved", 0), ("halved", 0), ("gave_up", None))
        ).crashes
        == 0
    )


def test_a_preempted_start_is_no_crash_whatever_its_ranks_met() -> None:
    used = spent(starts((None, 3), ("error", 3), ("collateral", 3), is_preempted=True))
    assert (used.crashes, used.preemptions, used.at_one_step) == (0, 3, 0)
    assert give_up_reason(used, BUDGETS) is None
    assert "4 preemptions" in str(give_up_reason(replace(used, preemptions=4), BUDGETS))


def test_more_crashes_than_the_budget_end_the_stage_with_the_last_reason() -> None:
    assert give_up_reason(spent(starts(("error", 1), ("error", 5))), BUDGETS) is None
    reason = give_up_reason(spent(starts(("error", 1), ("error", 5), ("error", 8))), BUDGETS)
    assert reason == "3 crashes, cluster.max_failures allows 2. Last reason: error at 8"


def test_two_crashes_in_a_row_at_one_step_end_it_at_once() -> None:
    reason = give_up_reason(spent(starts(("error", 7), ("error", 7))), BUDGETS)
    assert reason is not None
    assert reason.startswith("2 crashes in a row at step 7")


@pytest.mark.parametrize("between", [("error", 9), ("rollback", 7), ("stopped", None)])
def test_only_crashes_in_a_row_count_as_the_same(between: tuple[EndKind, int | None]) -> None:
    used = spent(starts(("error", 7), between, ("error", 7)))
    assert used.at_one_step == (2 if between[0] == "stopped" else 1)


def test_crashes_that_left_no_sign_are_not_the_same_step() -> None:
    assert spent(starts((None, None), (None, None))).at_one_step == 1


def test_rollbacks_have_their_own_budget() -> None:
    used = spent(starts(("rollback", 7), ("rollback", 9)))
    assert (used.crashes, used.rollbacks) == (0, 2)
    assert "2 rollbacks, guard.max_rollbacks allows 1" in str(give_up_reason(used, BUDGETS))


def test_no_limit_at_one_step_when_it_is_zero() -> None:
    budgets = Budgets(crashes=9, crashes_at_one_step=0, preemptions=0, rollbacks=0)
    assert give_up_reason(spent(starts(("error", 7), ("error", 7), ("error", 7))), budgets) is None
