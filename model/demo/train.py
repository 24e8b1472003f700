"""The training loop. A stage is so many steps from the weights of the stage before, or from none."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor, multiprocessing
from torch.nn import functional as F
from tqdm import tqdm

from divisi.model.demo.averaging import Average
from divisi.model.demo.batches import Batch, Batches, Taste, Writer
from divisi.model.demo.export import write_checkpoint
from divisi.model.demo.network import Network, Pass
from divisi.model.demo.workers import Shared, Worker, flat_buffer

_SAVE_EVERY = 100
_BALANCE = 0.1
_MTP = 0.3


TASTE = Taste("train", familiar=0.6, pieces=True)
"""What a stage trains on unless it says otherwise."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the curriculum."""

    steps: int
    widths: Mapping[int, float]
    """Widths of batches, see `Batches`, and how often they come."""
    warmup: int
    decay_from: int
    """Step from which the rate falls linearly."""
    tokens: int = 2048
    """Of a batch, about."""
    batches: int = 1
    """Of a step, each worker's; every one may have another width."""
    mtp_depth: int = 0
    """Passes of the MTP layer; 0 trains none."""
    last: float = 0.0
    """Share of the rate that is left at the end."""
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    taste: Taste = TASTE
    drafts_only: bool = False
    """Train the MTP layer against the rest as it is."""

    def factor(self, step: int) -> float:
        """The rate at a step, as a share of the full one."""
        up = min(1.0, (step + 1) / max(1, self.warmup))
        left = min(1.0, (self.steps - step) / max(1, self.steps - self.decay_from))
        return min(up, self.last + (1.0 - self.last) * left)


@dataclass(frozen=True, slots=True)
class Job:
    """What every worker needs to know."""

    stage: Stage
    seed: int
    folder: Path
    """Checkpoint folder: tokenizer and template are read there, weights written."""
    workers: int


@dataclass(frozen=True, slots=True)
class Loss:
    """A batch's losses; `said` is of the assistant's tokens."""

    total: Tensor
    said: float
    right: float
    """Share of the assistant's tokens that were the likeliest."""
    mtp: float
    balance: float


def loss_of(network: Network, batch: Batch, mtp_depth: int) -> Loss:
    """Next tokens, drafts, and the balance of the routers."""
    context = network.context(batch.real)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = network.hidden(batch.ids, context)
        logits = network.head(hidden[:, :-1]).flatten(0, 1).float()
    targets, weights = batch.ids[:, 1:].flatten(), batch.weights[:, 1:].flatten()
    losses = F.cross_entropy(logits, targets, reduction="none")
    total = (losses * weights).sum() / weights.sum()
    said = weights == 1.0
    right = float((logits.detach().argmax(-1) == targets)[said].float().mean())
    mtp = total.new_zeros(())
    if mtp_depth:
        mtp = _mtp_loss(network, batch, hidden, logits.detach().view(*hidden[:, :-1].shape[:2], -1), context, mtp_depth)
    balance = context.load.balance_loss()
    whole = total + _MTP * mtp + _BALANCE * balance
    return Loss(whole, float(losses.detach()[said].mean()), right, float(mtp.detach()), float(balance.detach()))


def _mtp_loss(network: Network, batch: Batch, hidden: Tensor, logits: Tensor, context: Pass, depth: int) -> Tensor:
    """Cross entropy of the drafts against what the main model would say in their place."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = network.drafts(batch.ids, hidden, context, depth)
    count = outs[0].shape[1] - 1
    parts = []
    for ahead, out in enumerate(outs, start=1):
        at = slice(ahead, ahead + count)
        target = logits[:, at].softmax(-1).flatten(0, 1)
        weights = batch.weights[:, ahead + 1 : ahead + 1 + count]
        drafted = network.head(out[:, :count]).flatten(0, 1).float()
        parts.append((F.cross_entropy(drafted, target, reduction="none") * weights.flatten()).sum() / weights.sum())
    return torch.stack(parts).mean()


def train(network: Network, job: Job) -> None:
    """Train in `job.workers` processes, one thread each; the network's parameters end up trained."""
    network.share_memory()
    processes = multiprocessing.get_context("spawn")
    shared = Shared(network, [flat_buffer(network) for _ in range(job.workers)], processes.Barrier(job.workers))
    others = [processes.Process(target=_work, args=(shared, rank, job), daemon=True) for rank in range(1, job.workers)]
    for process in others:
        process.start()
    try:
        _work(shared, 0, job)
    finally:
        shared.barrier.abort()
        for process in others:
            process.join(30)


def _work(shared: Shared, rank: int, job: Job) -> None:
    if rank > 0:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _train(shared, rank, job)
    except BaseException:
        shared.barrier.abort()  # the others wait there
        raise


def _end_with_parent() -> None:
    """A killed parent cannot tell its workers, which would wait for it at the barrier."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train(shared: Shared, rank: int, job: Job) -> None:
    torch.set_num_threads(1)
    network = shared.network
    assert isinstance(network, Network)
    stage, draw = job.stage, Random(job.seed)
    batches = Batches(Writer(job.folder), f"{job.seed}/{rank}", stage.taste)
    worker = Worker(shared, rank, stage.muon_rate, stage.adam_rate, "mtp." if stage.drafts_only else "")
    steps = tqdm(range(stage.steps), unit="step", disable=rank > 0, mininterval=10.0)
    average = Average(network) if rank == 0 else None
    tokens, began = 0, time.monotonic()
    for step in steps:
        # The same for all workers, so that none waits for another's longer rows.
        widths = draw.choices(list(stage.widths), list(stage.widths.values()), k=stage.batches)
        worker.clear()
        for width in widths:
            batch = batches.take(width, stage.tokens)
            loss = loss_of(network, batch, stage.mtp_depth)
            (loss.total / stage.batches).backward()
            tokens += job.workers * int(batch.real.sum())
        norm = worker.update(stage.factor(step))
        if average is not None:
            average.update()
            speed = tokens / (time.monotonic() - began)
            note = f"loss {loss.said:.3f} right {loss.right:.3f} mtp {loss.mtp:.3f} load {loss.balance:.2f} {norm:.1f}"
            steps.set_postfix_str(f"{note} {tokens / 1e6:.2f} M tokens {speed:.0f}/s", refresh=False)
            if step % 10 == 0:
                steps.write(f"step {step} {note} tokens {tokens} {speed:.0f}/s")
            if (step + 1) % _SAVE_EVERY == 0 or step + 1 == stage.steps:
                write_checkpoint(average.weights, job.folder)
