"""The engines that are timed, behind one interface: seconds for a prefill, seconds for decode steps."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from transformers import Qwen3NextForCausalLM, StaticCache

from divisi.cluster.assembly import build_engine, served_config
from divisi.cluster.dispatch.local import LocalEnd
from divisi.cluster.dispatch.protocol import AllExperts
from divisi.cluster.engine.engine import Engine
from divisi.cluster.engine.step.plan import StepPlan
from divisi.cluster.request import Request, Sampling, TokenEvent
from divisi.cluster.seats import GangShape
from divisi.cluster.spec import GangSpec
from divisi.model.dispatcher import Dispatcher

CONTEXT = 16
"""Tokens before the first timed decode step."""


class Contender(Protocol):
    """Something that can be timed."""

    name: str

    def prefill(self, tokens: int) -> float | None:
        """Seconds to take in one prompt and choose its first token; None where it would be another contender's."""
        ...

    def decode(self, batch: int, steps: int) -> float:
        """Seconds for ``steps`` decode steps of ``batch`` sequences."""
        ...


def prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    """The same random prompts for every contender."""
    rng = random.Random(count * 100_000 + length)
    return [[rng.randrange(10, vocabulary) for _ in range(length)] for _ in range(count)]


class DivisiEngine:
    """The whole engine: scheduler, step, sampling, commit. Only HTTP and Ray are missing."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        dispatcher: Dispatcher,
        vocabulary: int,
        announce: Callable[[StepPlan], None] = lambda plan: None,
    ) -> None:
        """`announce` is told of each step before it runs."""
        self.name = name
        self._engine, self._dispatcher, self._vocabulary, self._announce = engine, dispatcher, vocabulary, announce

    @classmethod
    def local(
        cls,
        model_dir: Path,
        dtype: Literal["bfloat16", "float32"],
        end: Callable[[AllExperts], Dispatcher] = LocalEnd,
    ) -> DivisiEngine:
        """Everything in this process, with torch's number of threads."""
        spec = gang_spec(model_dir, GangShape(1, 0), dtype, torch.get_num_threads())
        config = served_config(spec)
        engine, experts = build_engine(spec, config)
        assert experts is not None, "a gang without shards has its own experts"
        return cls("divisi local", engine, end(experts), config.vocab_size)

    def prefill(self, tokens: int) -> float:
        """See Contender."""
        start = time.perf_counter()
        self.generate(prompts(1, tokens, self._vocabulary), 1)
        return time.perf_counter() - start

    def decode(self, batch: int, steps: int, begun: Callable[[], None] = lambda: None) -> float:
        """See Contender. `begun` is called once the batch is full, before the steps that are timed."""
        self._submit(prompts(batch, CONTEXT, self._vocabulary), steps + 1 + batch)
        answering: set[str] = set()
        while len(answering) < batch:  # a step may not take in all prompts, for want of slots
            answering |= set(self._step())
        begun()
        start = time.perf_counter()
        for _ in range(steps):
            told = self._step()
        elapsed = time.perf_counter() - start
        assert len(told) == batch, f"the last of the timed steps had {len(told)} sequences"
        for request_id in answering:
            self._engine.cancel(request_id)
        self.generate([], 0)
        return elapsed

    def generate(self, sequences: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """Greedy answers, for the check before any timing; whatever else there is ends before."""
        self._submit(sequences, count)
        answers: list[list[int]] = [[] for _ in sequences]
        while (plan := self._engine.plan()) is not None:
            for event in self._run(plan):
                answers[int(event.request_id)] += event.token_ids
        return answers

    def _submit(self, sequences: Sequence[Sequence[int]], count: int) -> None:
        for index, prompt in enumerate(sequences):
            self._engine.submit(Request(str(index), tuple(prompt), count, Sampling(temperature=0.0)))

    def _step(self) -> list[str]:
        """Whose tokens it was."""
        plan = self._engine.plan()
        assert plan is not None, "the engine ran out of work"
        return [event.request_id for event in self._run(plan) if event.token_ids]

    def _run(self, plan: StepPlan) -> list[TokenEvent]:
        self._announce(plan)
        return self._engine.run(plan, self._dispatcher)


def gang_spec(model_dir: Path, shape: GangShape, dtype: Literal["bfloat16", "float32"], threads: int) -> GangSpec:
    """Room for the largest cell of the table."""
    return GangSpec(
        name="benchmark",
        model_dir=str(model_dir),
        dtype=dtype,
        device="cpu",
        threads=threads,
        kernels="auto",
        deterministic=False,
        shape=shape,
        max_model_len=8192,
        kv_memory=2**28,
        page_size=16,
        max_seqs=32,
        max_step_tokens=4096,
        step_deadline_s=60.0,
    )


class Transformers:
    """transformers' model with its own cache, in one of its ways to run experts."""

    def __init__(self, model: Qwen3NextForCausalLM, experts: str) -> None:
        self.name = f"transformers {experts}"
        self._model, self._experts = model, experts

    @torch.inference_mode()
    def prefill(self, tokens: int) -> float:
        """See Contender."""
        self._choose()
        ids = torch.tensor(prompts(1, tokens, self._model.config.vocab_size))
        start = time.perf_counter()
        self._model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
        return time.perf_counter() - start

    @torch.inference_mode()
    def decode(self, batch: int, steps: int) -> float:
        """See Contender."""
        self._choose()
        ids = torch.tensor(prompts(batch, CONTEXT, self._model.config.vocab_size))
        out = self._model(ids, use_cache=True, logits_to_keep=1)
        tokens = out.logits[:, -1].argmax(-1, keepdim=True)
        start = time.perf_counter()
        for _ in range(steps):
            out = self._model(tokens, past_key_values=out.past_key_values, use_cache=True)
            tokens = out.logits[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - start

    def _choose(self) -> None:
        self._model.set_experts_implementation(self._experts)


class CompiledTransformers:
    """transformers with a static cache and its decode step compiled by inductor; prefill is the eager one's."""

    def __init__(self, model: Qwen3NextForCausalLM, experts: str) -> None:
        self.name = f"transformers {experts}, static cache, compiled"
        self._model, self._experts = model, experts
        self._step: Any = torch.compile(model.forward, dynamic=False)

    def prefill(self, tokens: int) -> None:
        """See Contender."""
        return None

    @torch.inference_mode()
    def decode(self, batch: int, steps: int) -> float:
        """See Contender."""
        self._model.set_experts_implementation(self._experts)
        ids = torch.tensor(prompts(batch, CONTEXT, self._model.config.vocab_size))
        cache = StaticCache(config=self._model.config, max_cache_len=128)
        out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens = self._advance(out.logits[:, -1].argmax(-1, keepdim=True), cache, 2)  # compiles, the first time
        start = time.perf_counter()
        self._advance(tokens, cache, steps)
        return time.perf_counter() - start

    def _advance(self, tokens: torch.Tensor, cache: StaticCache, steps: int) -> torch.Tensor:
        for _ in range(steps):
            out = self._step(tokens, past_key_values=cache, use_cache=True)
            tokens = out.logits[:, -1].argmax(-1, keepdim=True)
        return tokens
