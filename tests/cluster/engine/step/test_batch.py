"""Where a step's inputs lie on a device that is not the host's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from divisi.cluster.engine.scheduler import Scheduler, SchedulerConfig
from divisi.cluster.engine.step.batch import BatchBuilder
from divisi.cluster.engine.step.buckets import SIZES, bucket
from divisi.cluster.engine.step.drafts import Drafts
from divisi.cluster.request import Request, Sampling
from divisi.model.batch import StepBatch

CONFIG = SchedulerConfig(
    vocab_size=100, max_model_len=256, num_pages=64, page_size=4, num_slots=16, max_seqs=4, max_step_tokens=64
)

WIDE = CONFIG.model_copy(update={"num_pages": 256, "num_slots": 24, "max_seqs": 12, "max_step_tokens": 128})


def decode_steps(
    device: torch.device, prompts: Sequence[int] = (5, 9, 17), config: SchedulerConfig = CONFIG, *, padded: bool = False
) -> Iterator[StepBatch]:
    """Sequences with prompts of these lengths, until they are done."""
    scheduler, builder = Scheduler(config), BatchBuilder(config, device, padded=padded)
    for index, length in enumerate(prompts):
        scheduler.submit(Request(str(index), tuple(range(1, length + 1)), 14, Sampling(temperature=0.0)), None)
    while (plan := scheduler.plan()) is not None:
        builder.grow(plan.growths)
        batch = builder.build(plan, Drafts())
        if not plan.scans:
            yield batch
        scheduler.commit(plan, [[7] if run.chooses else [] for run in plan.runs], {})


def inputs(batch: StepBatch) -> list[Tensor]:
    decode = batch.decode
    assert decode is not None
    assert batch.prefill is None
    own = [] if decode.slots_T is None else [decode.slots_T]
    arrays = [decode.starts_S1, decode.lengths_S, decode.slots_S, *own, decode.pages_SN]
    return [batch.token_ids_T, batch.positions_T, batch.kv_rows_T, batch.logit_rows_R, *arrays]


def test_decode_steps_differ_in_numbers_only() -> None:
    """On the meta device, which has addresses of storages but no numbers."""
    places = [
        [(x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()) for x in inputs(batch)]
        for batch in decode_steps(torch.device("meta"))
    ]
    assert len(places) >= 12
    widths = {step[-1][2][1] for step in places}
    assert widths == {8}, "17 to 31 tokens are 5 to 8 pages"
    assert all(step == places[0] for step in places)


def test_page_tables_are_as_wide_as_the_next_power_of_two() -> None:
    widths = [inputs(batch)[-1].shape[1] for batch in decode_steps(torch.device("cpu"))]
    assert set(widths) == {8}
    assert next(decode_steps(torch.device("cpu"))).positions_T.tolist() == [5, 9, 17]


def test_page_tables_are_those_of_the_sequences_whoever_comes_and_goes() -> None:
    """They are taken side by side only when they have changed: here sequences end, others come, and all grow."""
    scheduler, builder = Scheduler(CONFIG), BatchBuilder(CONFIG, torch.device("cpu"))
    for index, (length, answer) in enumerate(((5, 3), (9, 14), (17, 7), (3, 9), (8, 12), (6, 2))):
        scheduler.submit(Request(str(index), tuple(range(1, length + 1)), answer, Sampling(temperature=0.0)), None)
    looked = 0
    while (plan := scheduler.plan()) is not None:
        builder.grow(plan.growths)
        batch = builder.build(plan, Drafts())
        if batch.decode is not None:
            for run, pages in zip(plan.rings, batch.decode.pages_SN.tolist(), strict=True):
                own = run.sequence.holding.pages
                assert pages[: len(own)] == own[: len(pages)]
                looked += 1
        scheduler.commit(plan, [[7] if run.chooses else [] for run in plan.runs], {})
    assert looked >= 30


def test_padding_comes_last_and_is_nobodys() -> None:
    exact, filled = (next(decode_steps(torch.device("cpu"), padded=padded)) for padded in (False, True))
    one, other = exact.decode, filled.decode
    assert one is not None
    assert other is not None
    assert (exact.num_tokens, filled.num_tokens, len(one.slots_S), len(other.slots_S)) == (3, 4, 3, 4)
    for before, after, filler in (
        (exact.token_ids_T, filled.token_ids_T, 0), (exact.positions_T, filled.positions_T, 0),
        (exact.kv_rows_T, filled.kv_rows_T, -1), (one.starts_S1, other.starts_S1, 3),
        (one.lengths_S, other.lengths_S, 0), (one.slots_S, other.slots_S, -1),
    ):  # fmt: skip
        assert after.tolist() == [*before.tolist(), filler]
    assert one.slots_T is None
    assert other.slots_T is not None
    assert other.slots_T.tolist() == other.slots_S.tolist()
    assert torch.equal(other.pages_SN[:3], one.pages_SN)


def test_steps_of_one_bucket_lie_at_the_same_addresses() -> None:
    """Five to eight sequences."""
    places = set()
    for count in (5, 6, 7, 8):
        prompts = [13 + index % 4 for index in range(count)]
        first = inputs(next(decode_steps(torch.device("meta"), prompts, WIDE, padded=True)))
        places.add(tuple((x.storage_offset(), x.shape, x.stride()) for x in first))
    assert len(places) == 1
    (only,) = places
    assert [shape[0] for _, shape, _ in only] == [8, 8, 8, 8, 9, 8, 8, 8, 8]


def test_drafts_are_laid_out_for_buckets_too() -> None:
    """Of five sequences two draft one token less: a pass of eight rows, all somebody's but three, then one of four."""
    config = WIDE.model_copy(update={"max_draft_tokens": 2})
    scheduler, builder = Scheduler(config), BatchBuilder(config, torch.device("cpu"), padded=True)
    for index in range(5):
        limit = 1 if index in (1, 3) else 2
        request = Request(str(index), (1, 2, 3 + index), 14, Sampling(temperature=0.0), max_draft_tokens=limit)
        scheduler.submit(request, None)
    plan = scheduler.plan()
    assert plan is not None
    builder.grow(plan.growths)
    scheduler.commit(plan, [[7]] * 5)
    plan = scheduler.plan()
    assert plan is not None
    assert plan.counts == (5, 3, 13)
    builder.grow(plan.growths)
    first = builder.build_draft(plan, 0, Drafts())
    _, second = builder._draft_passes
    for batch, rows, padding in ((first, 5, 3), (second, 3, 1)):
        assert batch.decode is not None
        assert batch.num_tokens == len(batch.decode.slots_S) == rows + padding
        assert batch.decode.starts_S1.tolist() == [*range(rows + 1), *[rows] * padding]
        assert batch.kv_rows_T[rows:].tolist() == [-1] * padding
        assert (batch.kv_rows_T[:rows] >= 0).all()
    assert first.decode is not None
    assert first.decode.slots_S[5:].tolist() == [-1] * 3
    full = builder.build(plan, Drafts())
    assert full.decode is not None
    assert (full.num_tokens, len(full.decode.slots_S)) == (16, 8)
    assert full.kv_rows_T[13:].tolist() == [-1] * 3


def test_a_first_draft_alone_is_that_of_all_passes() -> None:
    """With the pages that the last one reaches."""
    config = WIDE.model_copy(update={"max_draft_tokens": 3})
    scheduler = Scheduler(config)
    alone, together = (BatchBuilder(config, torch.device("cpu")) for _ in range(2))
    for index in range(5):
        scheduler.submit(Request(str(index), (1, 2, 3 + index), 14, Sampling(temperature=0.0)), None)
    for chosen in ([[7]] * 5, [[7, 8]] * 5, [[7]] * 5):
        plan = scheduler.plan()
        assert plan is not None
        for builder in (alone, together):
            builder.grow(plan.growths)
        if plan.drafting:
            own, wanted = alone.build_first_draft(plan), together.build_draft(plan, 0, Drafts())
            for actual, expected in zip(inputs(own), inputs(wanted), strict=True):
                assert torch.equal(actual, expected)
        scheduler.commit(plan, chosen)
    assert plan.drafting


@pytest.mark.parametrize(
    ("count", "most", "size"), [(1, 9, 1), (3, 9, 4), (4, 9, 4), (5, 9, 8), (9, 9, 9), (9, 99, 16), (1025, 5000, 1025)]
)
def test_the_next_size_is_taken(count: int, most: int, size: int) -> None:
    assert bucket(count, most) == size
    assert all(2 * before >= after for before, after in pairwise(SIZES))
