"""Drafts on a real model: whatever they are, tokens, log-probabilities and memory are those of a run without."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor

from divisi.cluster.assembly import build_engine, served_config
from divisi.cluster.dispatch.local import LocalEnd
from divisi.cluster.engine.scheduler import Scheduler
from divisi.cluster.engine.step import clock
from divisi.cluster.engine.step.drafts import Drafts
from divisi.cluster.engine.step.plan import Run, StepPlan
from divisi.cluster.request import Request, Sampling, TokenEvent
from divisi.cluster.seats import GangShape
from divisi.cluster.telemetry.rows import stat_rows
from divisi.cluster.triggers import Span
from divisi.kernels.select import select_kernels
from divisi.model.batch import StepBatch
from divisi.model.dispatcher import Dispatcher
from divisi.model.mtp import Drafted
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from divisi.model.runner import ModelRunner
from tests.support.thread_gang import small_spec

VOCAB = 211
CONFIG = SMALL_CONFIG | {"vocab_size": VOCAB, "num_hidden_layers": 4, "full_attention_interval": 2}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drafting")
    write_random_checkpoint(path, CONFIG, seed=4, tokenizer=False, mtp=True)
    return path


class Worker:
    """One engine and its experts."""

    def __init__(self, path: Path, drafts: int, **changes: Any) -> None:
        shape = GangShape(1, 0)
        self.spec = small_spec(path, shape, max_draft_tokens=drafts, adaptive_drafts=False, **changes)
        # The layer is loaded where nothing is drafted, too, so that its memory can be compared.
        config = served_config(replace(self.spec, max_draft_tokens=max(drafts, 1)))
        self.engine, experts = build_engine(self.spec, config)
        assert experts is not None
        self.end = LocalEnd(experts)
        assert isinstance(self.engine._runner, ModelRunner)
        self.runner = self.engine._runner
        self.events: dict[str, list[TokenEvent]] = {}

    @property
    def scheduler(self) -> Scheduler:
        return self.engine._scheduler

    def step(self) -> bool:
        plan = self.engine.plan()
        if plan is None:
            return False
        for event in self.engine.run(plan, self.end):
            self.events.setdefault(event.request_id, []).append(event)
        return True

    def serve(self, *requests: Request) -> dict[str, list[TokenEvent]]:
        for request in requests:
            self.engine.submit(request)
        while self.step():
            pass
        return self.events

    def memory(self, name: str) -> list[Tensor]:
        """All that a sequence's slot and pages hold of its committed tokens: states, h, keys and values."""
        sequence = next(each for each in self.scheduler.running if each.request.request_id == name)
        store, slot, length = self.runner.store, sequence.holding.slot, sequence.length
        store.flush(select_kernels(CPU), [(slot, length)])
        found = [state.state_SHKV[slot] for state in store.delta.values()]
        for state in store.delta.values():
            found += [state.conv_SRC[slot, position % state.ring] for position in range(length - 3, length)]
        found.append(store.hidden_SND[slot, (length - 1) % store.hidden_SND.shape[1]])
        size = store.page_size
        for layer, pool in store.kv.items():
            first = 1 if layer == max(store.kv) else 0  # the MTP layer has no entry there
            rows = [sequence.holding.pages[at // size] * size + at % size for at in range(first, length)]
            found += [pool.key_PJD[rows], pool.value_PJD[rows]]
        return found


@pytest.mark.parametrize("one_by_one", [False, True])
def test_laying_out_a_step_is_of_its_first_draft(
    checkpoint: Path, one_by_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes as long for one as for many: counted with them, it would make each further one look dear."""
    worker = Worker(checkpoint, 3)
    if one_by_one:
        monkeypatch.setattr(worker.runner, "drafts_at_once", lambda *_: False)
    waited, ring_rows = [0.0], worker.engine._builder._ring_rows

    def slowly(plan: StepPlan) -> tuple[list[int], list[int]]:
        if worker.engine._builder._rows[0] is not plan and plan.drafting:
            waited[0] += 1000.0
        return ring_rows(plan)

    monkeypatch.setattr(worker.engine._builder, "_ring_rows", slowly)
    monkeypatch.setattr(clock, "perf_counter", lambda: perf_counter() + waited[0])
    worker.engine.submit(Request("0", (1, 2, 3), 12, Sampling(temperature=0.0)))
    while worker.step():
        first, further = worker.engine.draft_seconds[:1], worker.engine.draft_seconds[1:]
        assert sum(further) < 500.0 * (len(first) or 1)
        assert all(seconds > 500.0 for seconds in first)
    assert waited[0] >= 3000.0, "no drafts"


class ScriptedRunner:
    """Drafts the token that the answer has, with a given probability, and otherwise another one."""

    def __init__(self, worker: Worker, answers: dict[int, list[int]], right: float, seed: int) -> None:
        """`answers` by the first token of the prompt."""
        self._runner, self._worker, self._answers, self._right = worker.runner, worker, answers, right
        self._random = random.Random(seed)
        self.store, self.forward, self.prepare = worker.runner.store, worker.runner.forward, worker.runner.prepare
        self.draw = worker.runner.draw

    def drafts_at_once(self, *_: object) -> bool:
        """One by one."""
        return False

    def draft(self, batch: StepBatch, dispatcher: Dispatcher, hidden_SD: Tensor | None) -> Drafted:
        drafted = self._runner.draft(batch, dispatcher, hidden_SD)
        logits_SV = torch.full_like(drafted.logits_SV, -1e4)
        slots = batch.decode.slots_S.tolist() if batch.decode is not None else []
        by_slot = {sequence.holding.slot: sequence for sequence in self._worker.scheduler.running}
        for row, (slot, position) in enumerate(zip(slots, batch.positions_T.tolist(), strict=True)):
            prompt = by_slot[slot].request.prompt
            token = self._answers[prompt[0]][position + 1 - len(prompt)]
            if self._random.random() >= self._right:
                token = (token + self._random.randrange(1, VOCAB)) % VOCAB
            logits_SV[row, token] = 1e4
        return drafted._replace(logits_SV=logits_SV)


def script(worker: Worker, answers: dict[int, list[int]], right: float, seed: int = 0) -> None:
    worker.engine._runner = ScriptedRunner(worker, answers, right, seed)  # type: ignore[assignment]


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def prompts(count: int, max_tokens: int, **more: Any) -> list[Request]:
    rng = random.Random(count)
    return [
        Request(
            str(number),
            (number, *(rng.randrange(VOCAB) for _ in range(9 + 5 * number))),
            max_tokens,
            Sampling(temperature=float(number % 2), seed=number),
            **more,
        )
        for number in range(count)
    ]


def every_kind(quick: set[tuple[str, bool, int]]) -> list[Any]:
    kinds = [(dtype, det, k) for dtype in ("float32", "bfloat16") for det in (False, True) for k in (1, 2, 3, 5)]
    return [pytest.param(*kind, marks=() if kind in quick else pytest.mark.verify) for kind in kinds]


def test_nobody_asks_what_the_drafts_are_before_all_passes_have_run(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU that would wait for it between passes."""
    worker, committing, asked = Worker(checkpoint, 3), [True], []
    told = Drafts.of

    def of(drafts: Drafts, run: Run) -> list[int]:
        asked.append(committing[0])
        return told(drafts, run)

    monkeypatch.setattr(Drafts, "of", of)
    for request in prompts(3, 12):
        worker.engine.submit(request)
    while (plan := worker.engine.plan()) is not None:
        committing[0] = False
        for index in range(len(plan.counts)):
            worker.engine.run_pass(plan, index, worker.end)
        committing[0] = True
        worker.engine.commit(plan)
    assert asked
    assert all(asked)


@pytest.mark.parametrize(
    ("dtype", "deterministic", "drafts"), every_kind({("float32", False, 5), ("bfloat16", True, 3)})
)
def test_memory_is_bit_for_bit_that_of_a_run_without(
    checkpoint: Path, dtype: str, deterministic: bool, drafts: int
) -> None:
    """States, h, KV and the MTP layer's, at every length at which a sequence stands after a step."""
    fields = {"dtype": dtype, "deterministic": deterministic}
    requests = prompts(3, 40)
    plain = Worker(checkpoint, 0, **fields).serve(*requests)
    answers = {request.prompt[0]: tokens_of(plain[request.request_id]) for request in requests}
    for request in requests:
        without, drafting = Worker(checkpoint, 0, **fields), Worker(checkpoint, drafts, **fields)
        script(drafting, answers, 0.7, seed=request.prompt[0])
        for worker in (without, drafting):
            worker.engine.submit(request)
        (sequence,), compared = drafting.scheduler.waiting, 0
        while drafting.step() and drafting.scheduler.running:
            (other,) = without.scheduler.waiting or without.scheduler.running
            while other.length < sequence.length:
                assert without.step()
            assert other.tokens == sequence.tokens
            for expected, found in zip(*(w.memory(request.request_id) for w in (without, drafting)), strict=True):
                assert torch.equal(expected, found)
            compared += 1
        assert compared > 5


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.verify)])
def test_where_no_draft_stands_nothing_drifts(checkpoint: Path, dtype: str, full_tier: bool) -> None:
    """Thousands of rejected rows have been through rings, pages and h."""
    length = 2000 if full_tier else 60
    sizes = {"max_model_len": 2 * length, "kv_memory": 2**23, "dtype": dtype}
    (request,) = prompts(1, length)
    plain = Worker(checkpoint, 0, **sizes).serve(request)
    without, drafting = Worker(checkpoint, 0, **sizes), Worker(checkpoint, 5, **sizes)
    script(drafting, {request.prompt[0]: tokens_of(plain[request.request_id])}, 0.0)
    for worker in (without, drafting):
        worker.engine.submit(request)
    for count in range(length - 1):
        assert without.step()
        assert drafting.step()
        if count % 250 == 20 or count == length - 2:
            pairs = zip(*(worker.memory(request.request_id) for worker in (without, drafting)), strict=True)
            assert all(torch.equal(expected, found) for expected, found in pairs)
    assert sum(drafting.scheduler.drafts.accepted.values()) == 0
    assert sum(drafting.scheduler.drafts.drafted.values()) > 4 * length


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "right", [0.0, 0.5, pytest.param(0.9, marks=pytest.mark.verify), pytest.param(1.0, marks=pytest.mark.verify)]
)
def test_every_number_of_drafts_can_stand(checkpoint: Path, right: float, full_tier: bool) -> None:
    """A scripted drafter, ragged limits side by side: the tokens of a run without, and counts that add up."""
    length, drafts, stood = 2000 if full_tier else 100, 5, Counter[int]()
    requests = prompts(8 if full_tier else 4, length)
    sizes = {"max_model_len": 2 * length, "kv_memory": 2**25, "max_step_tokens": 60}
    plain = Worker(checkpoint, 0, **sizes).serve(*requests)
    answers = {request.prompt[0]: tokens_of(plain[request.request_id]) for request in requests}
    worker = Worker(checkpoint, drafts, **sizes)
    script(worker, answers, right)
    commit_ring = worker.scheduler._commit_ring

    def counting(run: Run, num_chosen: int) -> None:
        stood[num_chosen - 1] += run.num_drafts == drafts
        commit_ring(run, num_chosen)

    worker.scheduler._commit_ring = counting  # type: ignore[method-assign]
    limits = [None, 0, 1, 3, *[None] * (len(requests) - 4)]
    limited = [replace(each, max_draft_tokens=limit) for each, limit in zip(requests, limits, strict=True)]
    found = worker.serve(*limited)
    for request in limited:
        events = found[request.request_id]
        assert tokens_of(events) == answers[request.prompt[0]]
        drafted, accepted = events[-1].drafted, events[-1].accepted
        assert (drafted == 0) == (request.max_draft_tokens == 0)
        assert accepted <= drafted
        if right == 1.0 and request.max_draft_tokens is None:
            assert accepted == drafted
    if right == 0.0:
        assert set(stood) == {0}
    elif right < 1.0:
        assert set(stood) == set(range(drafts + 1))
    if full_tier and 0.0 < right < 1.0:
        assert min(stood.values()) >= 100, stood


RULES: dict[str, Callable[[int], dict[str, Any]]] = {
    "plain": lambda seed: {},
    "filters": lambda seed: {"sampling": {"top_k": 20, "top_p": 0.9, "min_p": 0.01}},
    "penalties": lambda seed: {
        "sampling": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}
    },
    "bad words": lambda seed: {"sampling": {"bad_words": ((seed,), (seed + 1, 7), (3, 5, 8))}},
    "bias": lambda seed: {"sampling": {"logit_bias": ((seed, 3.0), (seed + 9, -5.0))}},
    "allowed": lambda seed: {"sampling": {"allowed_token_ids": tuple(range(seed, 60)), "frequency_penalty": 0.8}},
    "stops": lambda seed: {"stop_ids": frozenset(range(seed, 90)), "min_tokens": 12},
    "logprobs": lambda seed: {"logprobs": 3, "prompt_logprobs": 1},
}


@pytest.mark.timeout(1800)
def test_every_field_of_sampling_in_one_batch(checkpoint: Path, full_tier: bool) -> None:
    """The drafter is right often enough to matter; each request has its own limit."""
    rng, requests = random.Random(2), []
    for number in range(len(RULES) * (20 if full_tier else 3)):
        name = [*RULES][number % len(RULES)]
        fields = RULES[name](number % 17)
        temperature = float(number // len(RULES) % 2)
        sampling = Sampling(temperature=temperature, seed=number, **fields.pop("sampling", {}))
        prompt = (number % VOCAB, *(rng.randrange(VOCAB) for _ in range(rng.randrange(12))))
        requests.append(Request(str(number), prompt, 24, sampling, **fields))
    plain = Worker(checkpoint, 0).serve(*requests)
    worker = Worker(checkpoint, 4, max_step_tokens=40)
    answers = {request.prompt[0]: [*tokens_of(plain[request.request_id]), *[0] * 24] for request in requests}
    script(worker, answers, 0.8)
    limits = [None, 0, 1, 2, None]
    found = worker.serve(*(replace(r, max_draft_tokens=limits[i % 5]) for i, r in enumerate(requests)))
    assert sum(events[-1].accepted for events in found.values()) > 5 * len(requests)
    for request in requests:
        expected, got = plain[request.request_id], found[request.request_id]
        assert tokens_of(got) == tokens_of(expected)
        assert (got[-1].finish_reason, got[-1].stop_id) == (expected[-1].finish_reason, expected[-1].stop_id)
        told, wanted = ([entry for e in events for entry in e.logprobs or ()] for events in (got, expected))
        assert [entry.token_id for entry in told] == [entry.token_id for entry in wanted]
        assert [entry.logprob for entry in told] == pytest.approx([entry.logprob for entry in wanted], abs=1e-4)
        for event in got:
            assert event.logprobs is None or len(event.logprobs) == len(event.token_ids)


def test_an_engine_that_is_never_allowed_to_draft_has_no_draft_rows(checkpoint: Path) -> None:
    worker = Worker(checkpoint, 3)
    worker.engine.submit(replace(prompts(1, 20)[0], max_draft_tokens=0))
    while (plan := worker.engine.plan()) is not None:
        assert len(plan.counts) == 1
        worker.engine.run(plan, worker.end)


def test_a_request_that_may_not_draft_has_no_draft_row_beside_others_that_do(checkpoint: Path) -> None:
    worker = Worker(checkpoint, 3)
    first, second = prompts(2, 20)
    worker.engine.submit(replace(first, max_draft_tokens=0))
    worker.engine.submit(second)
    drafted = 0
    while (plan := worker.engine.plan()) is not None:
        drafts = {run.sequence.request.request_id: run.num_drafts for run in plan.rings}
        assert drafts.get(first.request_id, 0) == 0
        drafted += drafts.get(second.request_id, 0)
        worker.engine.run(plan, worker.end)
    assert drafted > 20


def test_counts_by_place_are_those_of_the_answers(checkpoint: Path) -> None:
    """What events, the engine's statistics and their rows in /metrics say is one count."""
    worker = Worker(checkpoint, 3)
    requests = prompts(2, 40)
    plain = Worker(checkpoint, 0).serve(*requests)
    script(worker, {request.prompt[0]: tokens_of(plain[request.request_id]) for request in requests}, 0.7)
    # The second stands in a call, inside of which one token is drafted at most.
    inside = Span(VOCAB, VOCAB, opened=True, max_draft_tokens=1)
    found = worker.serve(requests[0], replace(requests[1], spans=(inside,)))
    ends = [found[request.request_id][-1] for request in requests]
    stats = worker.engine.stats()
    assert set(stats.drafted_tokens) == {"chat 1", "chat 2", "chat 3", "tools 1"}
    for part, end in zip(("chat", "tools"), ends, strict=True):
        drafted, accepted = (
            sum(count for key, count in counts.items() if key.startswith(part))
            for counts in (stats.drafted_tokens, stats.accepted_tokens)
        )
        assert (drafted, accepted) == (end.drafted, end.accepted)
        assert 0 < accepted < drafted
    rows = stat_rows({"attention:0": asdict(stats)})
    told = {row.labels: row.value for row in rows if row.name == "accepted_tokens"}
    assert told[("slice", "tools"), ("position", "1"), ("worker", "0")] == ends[1].accepted
