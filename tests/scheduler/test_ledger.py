"""What a failed step leaves unwritten, and who relies on it, without a scheduler. Blocks have four slots."""

import pytest

from vllm_lamina.scheduler.ledger import Span, StepLedger

NOBODY: Span = (0, 0, [])


@pytest.fixture
def ledger() -> StepLedger:
    return StepLedger()


def span(begin: int, end: int, blocks: list[int], size: int = 4) -> Span:
    """Tokens [begin, end) in these blocks of so many slots."""
    first_tokens = range(begin // size * size, end, size)
    return begin, end, list(zip(first_tokens, blocks, strict=False))


def nobody(name: str) -> Span:
    return NOBODY


def test_steps_end_in_their_order(ledger: StepLedger) -> None:
    ledger.begin({"a": span(0, 3, [7])})
    ledger.begin({"b": span(0, 9, [1, 2, 3])})
    assert ledger.in_flight == 2
    assert ledger.end(failed=False, held=nobody) == []
    assert ledger.end(failed=True, held=nobody) == ["b"]
    assert ledger.in_flight == 0
    assert ledger.unwritten == {1, 2, 3}


def test_a_step_that_is_completed_leaves_nothing(ledger: StepLedger) -> None:
    ledger.begin({"a": span(0, 3, [7])})
    assert ledger.end(failed=False, held=nobody) == []
    assert not ledger.failed
    assert not ledger.unwritten


def test_only_slots_from_the_first_unwritten_one_on(ledger: StepLedger) -> None:
    """Tokens 6 to 9 were to be written: in block 8 from its third slot on, and all of block 9."""
    ledger.begin({"a": span(6, 10, [8, 9])})
    assert ledger.end(failed=True, held=nobody) == ["a"]
    assert ledger.failed
    assert not ledger.relies_on_unwritten(span(0, 6, [5, 8])), "what it has was written before"
    assert ledger.relies_on_unwritten(span(0, 7, [5, 8]))
    assert ledger.relies_on_unwritten(span(0, 9, [5, 6, 9]))
    assert not ledger.relies_on_unwritten(span(0, 8, [5, 6, 9])), "block 9 is there for tokens to come"
    assert not ledger.relies_on_unwritten(NOBODY)


def test_an_earlier_loss_stays_the_first(ledger: StepLedger) -> None:
    ledger.begin({"a": span(5, 6, [8])})
    ledger.begin({"a": span(7, 8, [8])})
    for _ in range(2):
        ledger.end(failed=True, held=nobody)
    assert not ledger.relies_on_unwritten(span(0, 5, [5, 8]))
    assert ledger.relies_on_unwritten(span(0, 6, [5, 8]))


def test_a_step_that_reads_what_is_unwritten_is_lost_for_that_request(ledger: StepLedger) -> None:
    """And what it wrote is no better: who reads that next is lost too."""
    held: dict[str, Span] = {
        "hits": span(0, 6, [1, 2]),
        "other": span(0, 6, [3, 4]),
        "hits the hit": span(0, 9, [1, 2, 5]),
    }
    ledger.begin({"a": span(0, 4, [1])})
    ledger.begin({"hits": span(4, 6, [2]), "other": span(4, 6, [4])})
    ledger.begin({"hits the hit": span(8, 9, [5])})
    assert ledger.end(failed=True, held=held.__getitem__) == ["a"]
    assert ledger.end(failed=False, held=held.__getitem__) == ["hits"]
    assert ledger.unwritten == {1, 2}
    assert ledger.end(failed=False, held=held.__getitem__) == ["hits the hit"]
    assert ledger.relies_on_unwritten(span(0, 1, [2]))


def test_who_gave_blocks_up_may_have_relied_on_them(ledger: StepLedger) -> None:
    """Preempted, or gone, since its step was scheduled: nobody can say any more."""
    ledger.begin({"a": span(0, 4, [1])})
    ledger.begin({"preempted": span(4, 6, [2]), "goes on": span(4, 6, [4])})
    ledger.end(failed=True, held=nobody)
    held: dict[str, Span] = {"preempted": NOBODY, "goes on": span(0, 6, [3, 4])}
    assert ledger.end(failed=False, held=held.__getitem__) == ["preempted"]
    assert ledger.unwritten == {1, 2}


def test_a_recovery_clears_it(ledger: StepLedger) -> None:
    ledger.begin({"a": span(0, 4, [1])})
    ledger.end(failed=True, held=nobody)
    ledger.clear()
    assert not ledger.failed
    assert not ledger.unwritten
    assert not ledger.relies_on_unwritten(span(0, 4, [1]))
