"""A local engine over a checkpoint folder, small enough to be made anew in every test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from divisi.cluster.assembly import assemble_engine, load_grammars, load_runner
from divisi.cluster.dispatch.local import LocalEnd
from divisi.cluster.engine.engine import Engine
from divisi.cluster.engine.scheduler import SchedulerConfig
from divisi.cluster.request import Request, Sampling, TokenEvent
from divisi.kernels.select import select_kernels
from divisi.model.checkpoint import Checkpoint
from divisi.model.config import ModelConfig
from divisi.model.dispatcher import Dispatcher
from divisi.model.experts import ExpertBank
from divisi.model.placement import whole_share

CPU = torch.device("cpu")


@dataclass
class LocalEngine:
    engine: Engine
    dispatcher: Dispatcher

    def run(self, requests: Sequence[Request]) -> dict[str, list[TokenEvent]]:
        """Serve requests, all submitted at once, to their ends."""
        events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
        for request in requests:
            self.engine.submit(request)
        while (plan := self.engine.plan()) is not None:
            for event in self.engine.run(plan, self.dispatcher):
                events[event.request_id].append(event)
        return events

    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        requests = [
            Request(str(i), tuple(prompt), count, Sampling(temperature=0.0)) for i, prompt in enumerate(prompts)
        ]
        events = self.run(requests)
        return [[token for event in events[r.request_id] for token in event.token_ids] for r in requests]


def local_engine(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    implementation: str = "auto",
    num_pages: int = 256,
    page_size: int = 8,
    max_seqs: int = 16,
    deterministic: bool = False,
    max_step_tokens: int = 512,
) -> LocalEngine:
    config, checkpoint = ModelConfig.load(path), Checkpoint.open(path)
    kernels = select_kernels(CPU, implementation, deterministic=deterministic)
    limits = SchedulerConfig(
        vocab_size=config.vocab_size,
        max_model_len=config.max_position_embeddings,
        num_pages=num_pages,
        page_size=page_size,
        num_slots=2 * max_seqs,
        max_seqs=max_seqs,
        max_step_tokens=max_step_tokens,
    )
    runner = load_runner(checkpoint, config, limits, kernels, dtype, CPU)
    engine = assemble_engine(limits, runner, load_grammars(path, config), CPU)
    bank = ExpertBank.load(checkpoint, config, whole_share(config), kernels, dtype, CPU)
    return LocalEngine(engine, LocalEnd(bank))
