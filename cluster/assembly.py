"""Puts the parts of a rank together, from a spec and a checkpoint. Knows neither Ray nor threads."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import torch

from divisi.cluster.dispatch import planner
from divisi.cluster.dispatch.all_to_all import AllToAll
from divisi.cluster.dispatch.broadcast import Broadcast
from divisi.cluster.dispatch.colocated import Colocated
from divisi.cluster.dispatch.costs import layer_of
from divisi.cluster.dispatch.local import Local, LocalEnd
from divisi.cluster.dispatch.meter import MeteredExperts
from divisi.cluster.dispatch.micro_batches import MicroBatches
from divisi.cluster.dispatch.protocol import AllExperts, DispatchMode, HeldExperts, ShardedMode
from divisi.cluster.dispatch.wire import Transport, WireFormat
from divisi.cluster.door import Credentials
from divisi.cluster.drafting import FixedDepth, MostTokensPerSecond
from divisi.cluster.engine.engine import Engine
from divisi.cluster.engine.grammar import Grammars
from divisi.cluster.engine.memory.budget import MemoryBudget
from divisi.cluster.engine.scheduler import Scheduler, SchedulerConfig
from divisi.cluster.engine.step.plan import ALWAYS, NEVER, Cuts
from divisi.cluster.engine.times import times_file
from divisi.cluster.engine.times.calibration import Agreeing, Calibration, Remembered
from divisi.cluster.gang.loops.inbox import EpochInbox
from divisi.cluster.gang.loops.observer import ShardObserver
from divisi.cluster.gang.loops.reports import EpochReports
from divisi.cluster.gang.loops.shard_loop import ShardLoop
from divisi.cluster.gang.loops.threads import CoreShare
from divisi.cluster.gang.loops.worker_loop import WorkerNetwork
from divisi.cluster.passes import PassLayers
from divisi.cluster.spec import GangSpec
from divisi.cluster.step_times.times import StepTimes
from divisi.kernels.choice import KernelChoice
from divisi.kernels.select import Kernels, select_kernels
from divisi.model.checkpoint import Checkpoint
from divisi.model.config import ModelConfig
from divisi.model.experts import ExpertBank
from divisi.model.placement import Layout, share_of, whole_share
from divisi.model.runner import ModelRunner
from divisi.model.sampling.sampler import Sampler
from divisi.model.state import StateStore
from divisi.model.stopwatch import Stopwatch
from divisi.model.text.grammar.tokens import GrammarVocabulary
from divisi.model.warm_up import Nowhere, StepSizes, warm_up, warm_up_experts
from divisi.model.weights import Progress, load_weights


def served_config(spec: GangSpec) -> ModelConfig:
    """The model of a gang, with its MTP layer where the gang drafts. Raises ConfigError."""
    return ModelConfig.load(spec.model_dir).with_mtp(spec.max_draft_tokens > 0)


def max_rows(spec: GangSpec, config: ModelConfig) -> int:
    """Most rows that a decoding sequence has in a step."""
    return 1 + (spec.max_draft_tokens if config.mtp_layers else 0)


def torch_dtype(spec: GangSpec) -> torch.dtype:
    """What the weights and the KV are in."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype


def compute_dtype(spec: GangSpec) -> torch.dtype:
    """What the experts take their input in: as the runner has it, activations are fp32 on a CPU."""
    return torch_dtype(spec) if spec.device == "cuda" else torch.float32


def num_leaves(spec: GangSpec, config: ModelConfig) -> int:
    """Virtual shards of a gang."""
    return min(spec.virtual_shards, config.num_experts)


def transport(spec: GangSpec, config: ModelConfig) -> Transport:
    """How rows travel between the ranks of a gang."""
    return Transport(
        WireFormat(
            config.hidden_size,
            config.num_experts_per_tok,
            compute_dtype(spec),
            leaves=num_leaves(spec, config),
        ),
        max_pass_rows=spec.max_worker_step_tokens,
        deadline_s=spec.step_deadline_s,
        device=torch.device(spec.device),
        compute_dtype=compute_dtype(spec),
    )


def dispatch_mode(spec: GangSpec, config: ModelConfig, experts: AllExperts | None) -> DispatchMode:
    """How an attention worker's rows reach the experts; `experts` are those that it holds itself."""
    shape = spec.shape
    if not shape.expert_shards or shape.size == 1:
        assert experts is not None, "a worker without peers holds all experts"
        return Local(experts)
    if shape.colocated:
        assert experts is not None, "a colocated rank holds a shard"
        return Colocated(transport(spec, config), experts)
    return sharded_mode(spec, config)


def sharded_mode(spec: GangSpec, config: ModelConfig) -> ShardedMode:
    """How rows reach experts on ranks of their own: as told, or by the planner for a step of full batches."""
    way = transport(spec, config)
    mode: ShardedMode = AllToAll(way) if _planned_mode(spec, config) == "all_to_all" else Broadcast(way)
    return mode if spec.device == "cuda" or spec.micro_batches == "never" else MicroBatches(mode)


def _planned_mode(spec: GangSpec, config: ModelConfig) -> planner.Mode:
    if spec.dispatch != "auto":
        return spec.dispatch
    return "broadcast" if spec.device == "cuda" else planner.plan_mode(_full_load(spec, config), planner.MEMORY)


def _full_load(spec: GangSpec, config: ModelConfig) -> planner.Load:
    """A layer of full batches."""
    wire, shards = transport(spec, config).wire, spec.shape.expert_shards
    return planner.Load(
        spec.shape.attention_workers,
        shards,
        spec.max_seqs,
        request_bytes=wire.request_bytes(1),
        reply_bytes=wire.reply_bytes(1, 1),
        hit=planner.hit_rate(wire.experts_per_token, wire.leaves, shards),
    )


def cuts(spec: GangSpec, config: ModelConfig, most: int) -> Cuts:
    """Which steps of a worker are cut in two, as told or by the planner; of more than `most` rows it could change
    tokens.
    """
    shape = spec.shape
    if spec.device == "cuda" or spec.micro_batches == "never" or shape.colocated or not shape.expert_shards:
        return NEVER
    if spec.micro_batches == "always":
        return ALWAYS
    layer = layer_of(config, shape.expert_shards, spec.virtual_shards)
    most = min(most, spec.max_seqs * max_rows(spec, config))
    mode, load = _planned_mode(spec, config), _full_load(spec, config)
    return Cuts(planner.cut_rows(layer, mode, load, planner.MEMORY, planner.ZEN, most))


def pass_layers(config: ModelConfig) -> PassLayers:
    """The layers whose experts a pass of each kind needs."""
    return PassLayers(full=config.moe_layers, draft=config.draft_moe_layers)


def even_layout(spec: GangSpec, config: ModelConfig) -> Layout:
    """Who serves what where nothing else is wanted."""
    return Layout.even(num_leaves(spec, config), spec.shape.expert_shards)


def metered(spec: GangSpec, config: ModelConfig, bank: ExpertBank) -> MeteredExperts:
    """The experts of a rank with a meter."""
    layers = (*config.moe_layers, *config.draft_moe_layers)
    return MeteredExperts(bank, layers, config.num_experts, torch.device(spec.device))


def memory_units(spec: GangSpec, config: ModelConfig) -> tuple[int, int]:
    """Bytes of a KV page and of a state slot."""
    per_page = StateStore.bytes_per_page(config, spec.page_size, torch_dtype(spec))
    return per_page, StateStore.bytes_per_slot(config, max_rows(spec, config))


def worker_network(
    spec: GangSpec, config: ModelConfig, listener: socket.socket, credentials: Credentials
) -> WorkerNetwork:
    """How an attention worker reaches its gang."""
    device = torch.device(spec.device)
    cores = CoreShare(spec.threads, spec.core_plan)
    layers = pass_layers(config)
    return WorkerNetwork(listener, device, spec.step_deadline_s, layers, cores, spec.step_share, credentials)


def load_shard(
    spec: GangSpec,
    config: ModelConfig,
    checkpoint: Checkpoint,
    leaves: Collection[int],
    progress: Progress | None = None,
) -> ExpertBank:
    """The experts of some virtual shards. Raises CheckpointError."""
    device = torch.device(spec.device)
    share = share_of(config.num_experts, num_leaves(spec, config), leaves)
    kernels = select_kernels(device, spec.kernels, deterministic=spec.deterministic)
    bank = ExpertBank.load(checkpoint, config, share, kernels, torch_dtype(spec), device, progress)
    if _compiles(spec):
        rows, chosen = spec.max_worker_step_tokens, config.num_experts_per_tok
        for layer in (*config.moe_layers, *config.draft_moe_layers)[:1]:  # layers are alike
            warm_up_experts(bank, layer, config.hidden_size, chosen, rows, compute_dtype(spec))
    return bank


def shard_loop(
    spec: GangSpec,
    config: ModelConfig,
    mode: ShardedMode,
    experts: HeldExperts,
    credentials: Credentials,
    inbox: EpochInbox,
    reports: EpochReports,
    observer: ShardObserver | None = None,
) -> ShardLoop:
    """The loop that serves a shard's experts."""
    device = torch.device(spec.device)
    cores = CoreShare(spec.threads, spec.core_plan)
    return ShardLoop(experts, mode, pass_layers(config), device, cores, credentials, inbox, reports, observer)


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
    kernels = select_kernels(device, spec.kernels, deterministic=spec.deterministic)
    memory = MemoryBudget.of(
        config,
        kv_memory=spec.kv_memory,
        page_size=spec.page_size,
        max_seqs=spec.max_seqs,
        max_model_len=spec.max_model_len,
        dtype=dtype,
        max_rows=max_rows(spec, config),
    )
    limits = SchedulerConfig(
        vocab_size=config.vocab_size,
        max_model_len=spec.max_model_len,
        num_pages=memory.num_pages,
        page_size=spec.page_size,
        num_slots=memory.num_slots,
        max_seqs=spec.max_seqs,
        max_step_tokens=spec.max_worker_step_tokens,
        max_draft_tokens=max_rows(spec, config) - 1,
    )
    experts = None
    grammars = load_grammars(spec.model_dir, config)
    with contextlib.closing(Checkpoint.open(spec.model_dir)) as checkpoint:
        if spec.shape.colocated:
            experts = load_shard(spec, config, checkpoint, even_layout(spec, config).served[index], progress)
        elif not spec.shape.expert_shards:
            share = whole_share(config, spec.virtual_shards)
            experts = ExpertBank.load(checkpoint, config, share, kernels, dtype, device, progress)
        runner = load_runner(checkpoint, config, limits, kernels, dtype, device, progress)
    padded = kernels.takes_padding and not spec.shape.expert_shards  # a gang counts the rows that travel
    _compile(spec, runner, experts, _step_sizes(limits, padded))
    cut, times = cuts(spec, config, runner.most_equal_rows), StepTimes()
    if not limits.max_draft_tokens or not spec.adaptive_drafts:
        return assemble_engine(limits, runner, grammars, device, wake, cut, padded), experts
    file = partial(_times_file, spec, max_rows(spec, config))
    engine = Engine(
        runner,
        Sampler(kernels.choose_tokens),
        Scheduler(limits, MostTokensPerSecond(times), cut),
        device=device,
        stopwatch=runner.stopwatch,
        grammars=grammars,
        times=times,
        rehearsal=Remembered(_calibration(limits, runner, device, times, cut, padded), file, times),
        wake=wake,
        padded=padded,
    )
    return engine, experts


def _compile(spec: GangSpec, runner: ModelRunner, experts: ExpertBank | None, sizes: StepSizes) -> None:
    if _compiles(spec):
        end = Nowhere() if experts is None or spec.shape.expert_shards else LocalEnd(experts)
        warm_up(runner, end, sizes, torch.device(spec.device))


def _compiles(spec: GangSpec) -> bool:
    """Whether kernels are compiled at their first launch."""
    return spec.device == "cuda" and KernelChoice.parse(spec.kernels).general != "reference"


def _step_sizes(limits: SchedulerConfig, padded: bool) -> StepSizes:
    rows, pages = 1 + limits.max_draft_tokens, limits.max_pages_per_sequence
    return StepSizes(limits.max_seqs, rows, pages, limits.max_step_tokens, padded)


def _times_file(spec: GangSpec, rows: int) -> times_file.TimesFile:
    return times_file.TimesFile(times_file.cache_folder(), times_file.circumstances(spec, rows))


def _calibration(
    limits: SchedulerConfig, runner: ModelRunner, device: torch.device, times: StepTimes, cut: Cuts, padded: bool
) -> Calibration:
    """Over the model and memory of `runner`, with an engine and a stopwatch of its own."""
    apart, drafting = runner.timed_apart(), FixedDepth()
    engine = Engine(
        apart,
        Agreeing(apart.kernels.choose_tokens, limits.vocab_size),
        Scheduler(limits, drafting, cut),
        device=device,
        stopwatch=apart.stopwatch,
        padded=padded,
    )
    return Calibration(engine, drafting, limits, times)


def load_runner(
    checkpoint: Checkpoint,
    config: ModelConfig,
    limits: SchedulerConfig,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> ModelRunner:
    """The attention side's weights with memory for `limits`. Raises CheckpointError."""
    weights = load_weights(checkpoint, config, kernels, dtype, device, progress)
    store = StateStore(
        config,
        num_pages=limits.num_pages,
        page_size=limits.page_size,
        num_slots=limits.num_slots,
        max_rows=1 + limits.max_draft_tokens,
        dtype=dtype,
        device=device,
    )
    return ModelRunner(config, weights, store, kernels, Stopwatch())


def load_grammars(model_dir: str | Path, config: ModelConfig) -> Grammars:
    """Begins to read the tokenizer, in another thread."""
    grammars = Grammars(
        lambda: GrammarVocabulary.load(model_dir, config.vocab_size),
        config.vocab_size,
        threads=torch.get_num_threads(),
    )
    grammars.prepare()
    return grammars


def assemble_engine(
    limits: SchedulerConfig,
    runner: ModelRunner,
    grammars: Grammars,
    device: torch.device,
    wake: Callable[[], None] = lambda: None,
    cut: Cuts = NEVER,
    padded: bool = False,
) -> Engine:
    """An engine over a runner whose drafts go as far as they may."""
    return Engine(
        runner,
        Sampler(runner.kernels.choose_tokens),
        Scheduler(limits, cuts=cut),
        device=device,
        stopwatch=runner.stopwatch,
        grammars=grammars,
        wake=wake,
        padded=padded,
    )
