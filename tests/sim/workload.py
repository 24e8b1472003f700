"""What happens to a scheduler in one trace: sizes, arrivals, cancellations, aborts; all from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from divisi.cluster.engine.scheduler import SchedulerConfig
from divisi.cluster.request import Request, Sampling
from divisi.cluster.triggers import Span
from tests.sim.hash_model import VOCAB, expected_answer


@dataclass(frozen=True)
class Workload:
    """One trace's input. Times are in virtual seconds."""

    config: SchedulerConfig
    arrivals: tuple[tuple[float, Request], ...]
    cancellations: tuple[tuple[float, str], ...]
    """Some come before the request, after its end, twice, or name nobody."""
    abort_rate: float
    """Probability that an attempt at a step aborts."""


def make_workload(rng: random.Random) -> Workload:
    """A tight memory most of the time, and traffic from a trickle to a burst."""
    config = _config(rng)
    gap = rng.choice([0.0, 0.5, 3.0, 10.0])
    now = 0.0
    arrivals: list[tuple[float, Request]] = []
    cancellations: list[tuple[float, str]] = []
    cancel_rate = rng.choice([0.0, 0.1, 0.4])
    begun_rate = rng.choice([0.0, 0.2, 0.5])
    for number in range(rng.choice([rng.randint(1, 12), rng.randint(1, 40)])):
        now += rng.expovariate(1 / gap) if gap else 0.0
        request = replace(_request(rng, config, str(number)), arrived=now)
        if rng.random() < begun_rate:
            request = _begun(rng, config, request)
        arrivals.append((now, request))
        while rng.random() < cancel_rate:
            cancellations.append((now - 2 + rng.expovariate(1 / 15), str(number)))
    if rng.random() < 0.1:
        cancellations.append((rng.uniform(0, now + 10), "nobody"))
    return Workload(config, tuple(arrivals), tuple(cancellations), rng.choice([0.0, 0.1, 0.3]))


def _begun(rng: random.Random, config: SchedulerConfig, request: Request) -> Request:
    """A request that is older than it seems, and that another worker has begun to answer."""
    answer, *_ = expected_answer(request, config.max_model_len)
    room = min(request.max_tokens, config.max_model_len - len(request.prompt))
    done = rng.randint(0, max(min(len(answer), room - 1), 0))
    told = request.prompt_logprobs if not done else None
    return replace(
        request, arrived=request.arrived - rng.expovariate(1 / 20), answered=tuple(answer[:done]), prompt_logprobs=told
    )


def _config(rng: random.Random) -> SchedulerConfig:
    pick = rng.randint
    page_size, max_len, max_seqs = rng.choice([1, 2, 4, 16]), pick(8, 60), pick(1, 8)
    enough = -(-max_len // page_size)
    return SchedulerConfig(
        vocab_size=VOCAB,
        max_model_len=max_len,
        num_pages=pick(max(1, enough // 2), 2 * enough),
        page_size=page_size,
        num_slots=pick(2, max_seqs + 3),
        max_seqs=max_seqs,
        max_step_tokens=pick(max_seqs, max_seqs + 24),
        max_prompt_logit_rows=pick(1, 8),
    )


def _request(rng: random.Random, config: SchedulerConfig, name: str) -> Request:
    pick = rng.randint
    opened = pick(0, 40)
    length = pick(1, rng.choice([config.max_model_len, 4, 4]))
    prompt = tuple(pick(0, VOCAB - 1) for _ in range(length))
    flaw = rng.random()
    if flaw < 0.01:
        prompt = ()
    elif flaw < 0.02:
        prompt = (*prompt, rng.choice([-1, VOCAB]))
    elif flaw < 0.05:
        name = str(pick(0, int(name)))  # perhaps one that is being served
    return Request(
        request_id=name,
        prompt=prompt,
        max_tokens=rng.choice([0, 1, -1 if flaw > 0.99 else 2, *[pick(1, config.max_model_len) for _ in range(5)]]),
        sampling=Sampling(seed=rng.getrandbits(64)),
        stop_ids=frozenset(pick(0, VOCAB - 1) for _ in range(rng.choice([0, 0, 1, 3]))),
        prompt_logprobs=rng.choice([None, None, 1]),
        min_tokens=rng.choice([0, 0, pick(0, 12)]),
        grammar=rng.choice([None, None, None, str(pick(0, 12))]),
        content_stop_ids=frozenset(pick(0, VOCAB - 1) for _ in range(rng.choice([0, 0, 8]))),
        spans=tuple(Span(begin, pick(0, VOCAB - 1), opened=begin == opened) for begin in range(pick(0, 20))),
    )
