"""A few blows on a small run of `make chaos`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.chaos.asks import asks
from tests.e2e.chaos.blows import plan
from tests.e2e.chaos.harness import Chaos
from tests.e2e.chaos.report import gaps, summary
from tests.e2e.chaos.run import served, verdict_of

SEED = 8
_LONGEST_GAP_S = 60.0
"""Other tests run beside this one; gaps are judged by `make chaos`, which has the machine for itself."""


@pytest.mark.verify  # takes minutes beside other tests; tests/e2e/test_serve_split.py has a small one
@pytest.mark.timeout(300)
def test_three_blows_change_no_answer(tmp_path: Path, record_result: Callable[[str, object], None]) -> None:
    """Answers of every kind, on a server of the demo model, which must leave nothing."""
    asked, blows = asks(1, tokens=150), plan(SEED, 3, ("worker", "shard", "coordinator"), apart_s=(1.0, 2.0))
    with served(tmp_path / "log.txt") as cluster:
        record = asyncio.run(Chaos(cluster, blows, print).run(asked))
    verdict = verdict_of(record, asked, _LONGEST_GAP_S)
    print("\n".join(summary(record, verdict)))
    record_result("seconds of the longest gap, by blow", {str(hit.blow): round(gap, 2) for hit, gap in gaps(record)})
    assert [hit.processes for hit in record.struck] == [1, 1, 1]
    assert verdict.whole >= 8
    assert verdict.faults == []
