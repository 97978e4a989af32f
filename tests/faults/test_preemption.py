"""A machine that is about to be taken away: noticed once, kept, and not charged as a crash."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from infra.ledger import Ledger
from jobs.pretrain import PreemptionNotice, end_kind
from jobs.ranks import SingleRank
from jobs.retry_budget import spent
from jobs.train_loop import HalvedError, RollbackError


class OtherRank(SingleRank):
    """Another rank, whose machine is the one."""

    def any(self, flag: bool) -> bool:
        return True


def context_of(ledger: Ledger, ranks: SingleRank) -> Any:
    return SimpleNamespace(ledger=ledger, ranks=ranks, number=1, generation=1, is_first_rank=True)


def test_a_notice_saves_once_and_what_follows_is_charged_to_preemptions(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    generation = ledger.record_start(1, 1)
    answers = iter([False, True, True])
    notice = PreemptionNotice(context_of(ledger, SingleRank()), lambda: next(answers))
    assert [notice(), notice(), notice()] == [False, True, False]
    ledger.record_end(1, generation, "collateral", "connection closed by peer")
    ledger.record_start(1, 1, died_at=9)
    used = spent(ledger.read().stage(1).starts)
    assert (used.preemptions, used.crashes) == (1, 0)


def test_a_notice_to_another_rank_counts_here_too(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record_start(1, 1)
    assert PreemptionNotice(context_of(ledger, OtherRank()), lambda: False)()


def test_errors_are_told_apart_by_what_they_say() -> None:
    assert end_kind(RollbackError("back")) == "rollback"
    assert end_kind(HalvedError("out of memory; timeout")) == "halved"
    assert end_kind(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4242")) == "collateral"
    assert end_kind(RuntimeError("Timed out waiting 12000ms for recv operation to complete")) == "collateral"
    assert end_kind(RuntimeError("shape mismatch")) == "error"
    assert end_kind(ValueError("timeout must be positive")) == "error"
