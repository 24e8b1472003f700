"""Where a step's inputs lie on a device that is not the host's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from divisi.cluster.engine.scheduler import Scheduler, SchedulerConfig
from divisi.cluster.engine.step.batch import BatchBuilder
from divisi.cluster.engine.step.drafts import Drafts
from divisi.cluster.request import Request, Sampling
from divisi.model.batch import StepBatch

CONFIG = SchedulerConfig(
    vocab_size=100, max_model_len=256, num_pages=64, page_size=4, num_slots=16, max_seqs=4, max_step_tokens=64
)


def decode_steps(device: torch.device) -> Iterator[StepBatch]:
    """Three sequences, until they are done."""
    scheduler, builder = Scheduler(CONFIG), BatchBuilder(CONFIG, device)
    for name, length in (("a", 5), ("b", 9), ("c", 17)):
        scheduler.submit(Request(name, tuple(range(1, length + 1)), 14, Sampling(temperature=0.0)), None)
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
    arrays = [decode.starts_S1, decode.lengths_S, decode.slots_S, decode.pages_SN]
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


def test_on_the_hosts_device_page_tables_are_as_wide_as_needed() -> None:
    widths = [inputs(batch)[-1].shape[1] for batch in decode_steps(torch.device("cpu"))]
    assert sorted(set(widths)) == [5, 6, 7, 8]
    assert next(decode_steps(torch.device("cpu"))).positions_T.tolist() == [5, 9, 17]
