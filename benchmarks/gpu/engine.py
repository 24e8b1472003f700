"""``python -m divisi.benchmarks.gpu.engine``: the engine on a GPU, in this process: its tokens first, then its steps.

Unlike the rest of this package it needs what `cluster` needs beside torch. Weights of the timed model are random, and
every draft stands: what is timed is what a step of so many rows takes, not how well a model drafts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch
import triton
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from divisi.benchmarks.gpu.shapes import PUBLISHED
from divisi.cluster.assembly import build_engine, load_runner, served_config
from divisi.cluster.dispatch.local import LocalEnd
from divisi.cluster.engine.engine import Engine
from divisi.cluster.engine.scheduler import Scheduler, SchedulerConfig
from divisi.cluster.engine.times.calibration import Agreeing
from divisi.cluster.request import Request, Sampling
from divisi.cluster.seats import GangShape
from divisi.cluster.spec import GangSpec
from divisi.kernels.select import select_kernels
from divisi.model.checkpoint import Checkpoint
from divisi.model.config import ModelConfig
from divisi.model.experts import ExpertBank
from divisi.model.placement import whole_share
from divisi.model.random_checkpoint import write_random_checkpoint
from divisi.model.warm_up import StepSizes, warm_up

_LAYERS = 8
"""Six of Gated DeltaNet and two of attention; and that of MTP."""
_BATCHES, _DRAFTS = (1, 8, 64), (0, 1, 3)
_PROMPT, _WARM, _TIMED, _PROFILED = 64, 6, 24, 4
_ANSWER, _PROMPTS = 24, (3, 70, 18, 131, 1, 40, 9, 64)


def main() -> int:
    """Return the number of failures."""
    argparse.ArgumentParser(prog="python -m divisi.benchmarks.gpu.engine", description=__doc__).parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    failures = check_tokens()
    print(time_steps(device), flush=True)
    print(f"{len(failures)} failures", *failures, sep="\n", flush=True)
    return len(failures)


def check_tokens() -> list[str]:
    """A random checkpoint in fp32: the tokens of the CPU's references, with drafts and without."""
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder), mtp=True)
        expected = _answers(_spec(folder, "cpu", "reference", 0))
        for most in (0, 3):
            found = _answers(_spec(folder, "cuda", "triton", most))
            same = sum(found[name] == tokens for name, tokens in expected.items())
            print(f"engine, fp32, {most} drafts: {same} of {len(expected)} answers are the references'", flush=True)
            if same < len(expected):
                failures.append(f"engine, {most} drafts: {len(expected) - same} answers differ from the references'")
    return failures


def _spec(folder: str, device: Literal["cpu", "cuda"], kernels: str, most: int) -> GangSpec:
    return GangSpec(
        "gpu", folder, "float32", device, None, kernels, False, GangShape(1, 0), max_model_len=512, kv_memory=2**26,
        page_size=16, max_seqs=8, max_step_tokens=512, step_deadline_s=60.0, max_draft_tokens=most,
        adaptive_drafts=False,
    )  # fmt: skip


def _answers(spec: GangSpec) -> Mapping[str, list[int]]:
    """Greedy ones, and ones with noise and filters."""
    config = served_config(spec)
    engine, experts = build_engine(spec, config)
    assert experts is not None, "a gang of one rank holds all experts"
    generator, answers = torch.Generator().manual_seed(3), {}
    drawn = (Sampling(0.0), Sampling(0.8), Sampling(1.0, top_k=20), Sampling(0.7, repetition_penalty=1.2))
    for number, length in enumerate(_PROMPTS):
        prompt = tuple(torch.randint(config.vocab_size, (length,), generator=generator).tolist())
        engine.submit(Request(str(number), prompt, _ANSWER, drawn[number % len(drawn)]))
        answers[str(number)] = list[int]()
    while (plan := engine.plan()) is not None:
        for event in engine.run(plan, LocalEnd(experts)):
            answers[event.request_id] += event.token_ids
    return answers


@dataclass
class _Drawn:
    """Stands for a checkpoint: random weights, made on the device."""

    device: torch.device
    bytes_read: int = field(default=0, init=False)

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device).normal_(0.0, shape[-1] ** -0.5)

    def read_experts(
        self, layer: int, ids: Sequence[int], config: ModelConfig, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        width, inner = config.hidden_size, config.moe_intermediate_size
        shapes = (len(ids), 2 * inner, width), (len(ids), width, inner)
        gate_up_EFD, down_EDI = (self.read("", shape, dtype) for shape in shapes)
        return gate_up_EFD, down_EDI


def time_steps(device: torch.device) -> str:
    """Decode steps of layers of the published shape, by sequences and drafts."""
    config = ModelConfig.from_hf(PUBLISHED | {"num_hidden_layers": _LAYERS}, 1)
    kernels, dtype = select_kernels(device, "triton"), torch.bfloat16
    checkpoint = cast(Checkpoint, _Drawn(device))
    limits = SchedulerConfig(
        vocab_size=config.vocab_size, max_model_len=4096, num_pages=64 * 256, page_size=16, num_slots=160, max_seqs=64,
        max_step_tokens=8192, max_draft_tokens=max(_DRAFTS),
    )  # fmt: skip
    experts = ExpertBank.load(checkpoint, config, whole_share(config), kernels, dtype, device)
    runner = load_runner(checkpoint, config, limits, kernels, dtype, device)
    start, compiled = time.perf_counter(), _compiled()
    pages, tokens = limits.max_pages_per_sequence, limits.max_step_tokens
    warm_up(runner, LocalEnd(experts), StepSizes(limits.max_seqs, 1 + max(_DRAFTS), pages, tokens, padded=True), device)
    torch.cuda.synchronize()
    print(f"warm-up: {time.perf_counter() - start:.1f} s, {len(compiled)} kernels", flush=True)
    compiled.clear()
    runs = [(sequences, drafts) for sequences in _BATCHES for drafts in _DRAFTS]

    def started(sequences: int, drafts: int) -> Callable[[], float]:
        sampler = Agreeing(kernels.choose_tokens, limits.vocab_size)
        engine = Engine(runner, sampler, Scheduler(limits), device=device, stopwatch=runner.stopwatch, padded=True)
        return _decoding(engine, LocalEnd(experts), config.vocab_size, sequences, drafts)

    took = {}
    for run in runs:
        step = started(*run)
        took[run] = statistics.median(step() for _ in range(_TIMED))
    print(f"kernels compiled since: {compiled}", flush=True)
    lines = [
        f"{_LAYERS} layers and that of MTP, bf16, all drafts stand; a step's time, how long the device computes in it, "
        "its launches, copies among them, and tokens per second of all sequences.",
        "",
        "| sequences | drafts | ms a step | of that on the device | launches | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for sequences, drafts in runs:  # afterwards: once it has run, the profiler slows down each launch
        busy, launches = _profiled(started(sequences, drafts))
        seconds = took[sequences, drafts]
        rate = sequences * (1 + drafts) / seconds
        lines.append(f"| {sequences} | {drafts} | {1e3 * seconds:.2f} | {1e3 * busy:.2f} | {launches} | {rate:,.0f} |")
    return "\n".join(lines)


def _compiled() -> list[str]:
    """The names of kernels that are compiled, or read from a cache, from now on."""
    names: list[str] = []

    def note(*, repr: str, **_: object) -> None:
        names.append(repr.split("[")[0])

    triton.knobs.runtime.jit_post_compile_hook = note
    return names


def _decoding(engine: Engine, end: LocalEnd, vocab: int, sequences: int, drafts: int) -> Callable[[], float]:
    """A step of sequences that decode, in seconds."""
    for number in range(sequences):
        prompt = tuple((number + 7 * i) % vocab for i in range(_PROMPT))
        sampling = Sampling(temperature=0.0, seed=number)
        engine.submit(Request(str(number), prompt, 1024, sampling, max_draft_tokens=drafts))

    def step() -> float:
        start = time.perf_counter()
        plan = engine.plan()
        assert plan is not None, "answers are longer than this"
        engine.run(plan, end)
        return time.perf_counter() - start

    for _ in range(_WARM):
        step()
    return step


def _profiled(step: Callable[[], float]) -> tuple[float, int]:
    """Seconds of the device in a step, and launches."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(_PROFILED):
            step()
        torch.cuda.synchronize()
    kernels = [event for event in seen.events() or () if event.device_type.name != "CPU"]
    busy = 1e-6 * sum(event.time_range.elapsed_us() for event in kernels) / _PROFILED
    return busy, round(len(kernels) / _PROFILED)


if __name__ == "__main__":
    sys.exit(main())
