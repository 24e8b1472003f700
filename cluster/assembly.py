"""Puts the parts of a rank together, from a spec and a checkpoint. Knows neither Ray nor threads."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

import torch

from divisi.cluster.dispatch.wire import WireFormat
from divisi.cluster.engine import Engine
from divisi.cluster.gang.inbox import EpochInbox
from divisi.cluster.gang.reports import EpochReports
from divisi.cluster.gang.shard_loop import ShardLoop
from divisi.cluster.gang.worker_loop import WorkerNetwork
from divisi.cluster.grammar import Grammars
from divisi.cluster.memory_plan import MemoryPlan
from divisi.cluster.scheduler import Scheduler, SchedulerConfig
from divisi.cluster.spec import GangSpec
from divisi.kernels.select import Kernels, select_kernels
from divisi.model.checkpoint import Checkpoint
from divisi.model.config import ModelConfig
from divisi.model.experts import ExpertBank
from divisi.model.runner import ModelRunner
from divisi.model.sampling import Sampler
from divisi.model.state import StateStore
from divisi.model.stopwatch import Stopwatch
from divisi.model.text.grammar_tokens import GrammarVocabulary
from divisi.model.weights import Progress, load_weights


def torch_dtype(spec: GangSpec) -> torch.dtype:
    """What the weights, the KV and the wire are in."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype


def compute_dtype(spec: GangSpec) -> torch.dtype:
    """What the experts take their input in: as the runner has it, activations are fp32 on a CPU."""
    return torch_dtype(spec) if spec.device == "cuda" else torch.float32


def wire_format(spec: GangSpec, config: ModelConfig) -> WireFormat:
    """How tokens travel between the ranks of a gang."""
    return WireFormat(config.hidden_size, config.num_experts_per_tok, torch_dtype(spec))


def worker_network(spec: GangSpec, config: ModelConfig, listener: socket.socket) -> WorkerNetwork:
    """How an attention worker reaches its gang."""
    return WorkerNetwork(
        listener,
        wire_format(spec, config),
        torch.device(spec.device),
        spec.worker_step_tokens,
        spec.step_deadline_s,
        compute_dtype(spec),
        config.moe_layers,
        spec.threads,
    )


def load_shard(
    spec: GangSpec, config: ModelConfig, checkpoint: Checkpoint, index: int, progress: Progress | None = None
) -> ExpertBank:
    """The experts of one shard. Raises CheckpointError."""
    device = torch.device(spec.device)
    expert_ids = config.shard_experts(spec.shape.expert_shards)[index]
    return ExpertBank.load(checkpoint, config, expert_ids, select_kernels(device), torch_dtype(spec), device, progress)


def shard_loop(
    spec: GangSpec, config: ModelConfig, experts: ExpertBank, inbox: EpochInbox, reports: EpochReports
) -> ShardLoop:
    """The loop that serves a shard's experts."""
    device = torch.device(spec.device)
    return ShardLoop(
        experts,
        config.moe_layers,
        inbox,
        reports,
        wire_format(spec, config),
        compute_dtype=compute_dtype(spec),
        device=device,
        max_tokens=spec.worker_step_tokens,
        step_deadline_s=spec.step_deadline_s,
        threads=spec.threads,
    )


def build_engine(
    spec: GangSpec,
    config: ModelConfig,
    index: int = 0,
    progress: Progress | None = None,
    wake: Callable[[], None] = lambda: None,
) -> tuple[Engine, ExpertBank | None]:
    """The engine of `attention:index`, and the experts that it holds itself: all, a shard of a colocated gang, or none.

    `progress` is called with the bytes read so far; `wake` is the engine's. Raises CheckpointError.
    """
    device, dtype = torch.device(spec.device), torch_dtype(spec)
    kernels = select_kernels(device)
    memory = MemoryPlan.of(
        config,
        kv_memory=spec.kv_memory,
        page_size=spec.page_size,
        max_seqs=spec.max_seqs,
        max_model_len=spec.max_model_len,
        dtype=dtype,
    )
    limits = SchedulerConfig(
        vocab_size=config.vocab_size,
        max_model_len=spec.max_model_len,
        num_pages=memory.num_pages,
        page_size=spec.page_size,
        num_slots=memory.num_slots,
        max_seqs=spec.max_seqs,
        max_step_tokens=spec.worker_step_tokens,
    )
    experts = None
    with contextlib.closing(Checkpoint.open(spec.model_dir)) as checkpoint:
        engine = assemble_engine(checkpoint, config, limits, kernels, dtype, device, progress, wake)
        if spec.shape.colocated:
            experts = load_shard(spec, config, checkpoint, index, progress)
        elif not spec.shape.expert_shards:
            all_ids = range(config.num_experts)
            experts = ExpertBank.load(checkpoint, config, all_ids, kernels, dtype, device, progress)
    return engine, experts


def assemble_engine(
    checkpoint: Checkpoint,
    config: ModelConfig,
    limits: SchedulerConfig,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    wake: Callable[[], None] = lambda: None,
) -> Engine:
    """An engine with the attention side's weights and memory for `limits`. Raises CheckpointError."""
    stopwatch = Stopwatch()
    model_dir = checkpoint.model_dir  # what the lambda keeps for good is not to be the open checkpoint
    grammars = Grammars(
        lambda: GrammarVocabulary.load(model_dir, config.vocab_size),
        config.vocab_size,
        threads=torch.get_num_threads(),
    )
    grammars.prepare()
    weights = load_weights(checkpoint, config, dtype, device, progress)
    store = StateStore(
        config,
        num_pages=limits.num_pages,
        page_size=limits.page_size,
        num_slots=limits.num_slots,
        dtype=dtype,
        device=device,
    )
    runner = ModelRunner(config, weights, store, kernels, stopwatch)
    return Engine(
        runner, Sampler(), Scheduler(limits), device=device, stopwatch=stopwatch, grammars=grammars, wake=wake
    )
