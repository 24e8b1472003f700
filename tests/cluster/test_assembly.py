"""What a rank is put together from, and what is left of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from divisi.cluster.assembly import build_engine
from divisi.cluster.seats import GangShape
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from tests.support.thread_gang import small_spec


@pytest.mark.parametrize("shape", [GangShape(1, 0), GangShape(1, 2), GangShape(2, 2, colocated=True)], ids=str)
def test_no_file_of_the_checkpoint_stays_mapped(tmp_path: Path, shape: GangShape) -> None:
    """Pages of a mapped file count as the process's memory: an 80 B model's shards are 4 GB each."""
    config = write_random_checkpoint(tmp_path, SMALL_CONFIG | {"num_hidden_layers": 4}, seed=3)
    engine, _ = build_engine(small_spec(tmp_path, shape), config)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert engine.stats().running == 0, "the engine lives"
    assert mapped == []
