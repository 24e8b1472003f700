"""What the leader makes of who announces what."""

from __future__ import annotations

import pytest

from divisi.cluster.gang.control.agreement import NOTHING, StepAgreement, merge
from divisi.cluster.passes import Pass, PassKind
from tests.cluster.gang.control.passes import draft, full


def test_agreement_waits_for_those_that_run_and_not_for_the_idle() -> None:
    agreement = StepAgreement(range(3))
    assert agreement.unfinished == (0, 1, 2)
    for worker in range(3):
        agreement.announce(worker, NOTHING)
    assert agreement.begin() is None
    assert agreement.unfinished == (), "all idle: nothing to wait for but a ring"
    agreement.announce(1, (5,))
    assert agreement.begin() == full({1: 5})
    assert agreement.unfinished == (1,)
    agreement.announce(0, (2,))
    assert agreement.begin() is None, "worker 1 is still in the step"
    agreement.announce(1, (0,))
    assert agreement.begin() == full({0: 2})


def test_who_wants_to_be_alone_takes_turns_with_all_others() -> None:
    agreement, wanted = StepAgreement(range(4)), {0: (1,), 1: (2,), 2: (3,), 3: (4,)}
    for worker, counts in wanted.items():
        agreement.announce(worker, counts, alone=worker in (1, 3))
    steps = []
    for _ in range(6):
        passes = agreement.begin()
        assert passes is not None
        ran = [worker for worker in wanted if passes[0].rows(worker)]
        assert agreement.unfinished == tuple(ran), "those who were left out still bring what they have announced"
        steps.append(tuple(ran))
        for worker in ran:
            agreement.announce(worker, wanted[worker], alone=worker in (1, 3))
    assert steps == [(1,), (3,), (0, 2)] * 2
    for worker in (1, 3):
        agreement.announce(worker, wanted[worker])
    assert agreement.begin() == full({0: 1, 1: 2, 2: 3, 3: 4})


def test_second_micro_batches_are_those_of_who_takes_part() -> None:
    agreement = StepAgreement(range(3))
    agreement.announce(0, (2, 5), second=3)
    agreement.announce(1, (4,))
    agreement.announce(2, (6,), second=1)
    assert agreement.begin() == (draft({0: 2}), Pass(PassKind.FULL, {0: 5, 1: 4, 2: 6}, {0: 3, 2: 1}))
    for worker in range(3):
        agreement.announce(worker, (2,) if worker else NOTHING)
    assert agreement.begin() == full({1: 2, 2: 2})


def test_micro_batches_of_a_pass() -> None:
    cut = Pass(PassKind.FULL, {0: 5, 1: 4, 2: 6}, {0: 3, 2: 1})
    assert cut.micro_batches == (Pass(PassKind.FULL, {0: 2, 1: 4, 2: 5}), Pass(PassKind.FULL, {0: 3, 2: 1}))
    assert full({0: 5})[0].micro_batches == full({0: 5})


def test_who_brings_rows_to_a_draft_only_is_waited_for_too() -> None:
    agreement = StepAgreement(range(2))
    agreement.announce(0, (4, 0))
    agreement.announce(1, NOTHING)
    assert agreement.begin() == (draft({0: 4}), *full({}))
    assert agreement.unfinished == (0,)


@pytest.mark.parametrize(
    ("announced", "passes"),
    [
        ({0: (2, 1, 5), 1: (3,)}, (draft({0: 2}), draft({0: 1}), *full({0: 5, 1: 3}))),
        ({4: (3,), 9: (3,)}, full({4: 3, 9: 3})),
        ({0: (1, 4), 1: (2, 2, 6), 2: (3, 9)}, (draft({0: 1, 1: 2, 2: 3}), draft({1: 2}), *full({0: 4, 1: 6, 2: 9}))),
    ],
)
def test_drafts_are_merged_from_the_first_and_the_full_pass_last(
    announced: dict[int, tuple[int, ...]], passes: tuple[Pass, ...]
) -> None:
    assert merge(announced) == passes
