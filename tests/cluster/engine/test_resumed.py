"""An answer that another worker has begun: whatever it asks for, what follows is what would have followed there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from divisi.cluster.engine.scheduler import Scheduler, SchedulerConfig
from divisi.cluster.errors import RequestRejected
from divisi.cluster.request import Request, Sampling, TokenEvent
from divisi.cluster.triggers import Span
from divisi.model.random_checkpoint import write_random_checkpoint
from tests.cluster.engine.test_drafting import CONFIG, VOCAB, Worker
from tests.support import tiny_grammar
from tests.support.ruled_engine import answer, make, request, serve
from tests.support.tiny_grammar import EOS

ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"sampling": {"temperature": 0.0}},
    "sampled": {},
    "penalties": {"sampling": {"repetition_penalty": 1.5, "frequency_penalty": 1.0, "presence_penalty": 0.7}},
    "bad words": {"sampling": {"bad_words": tuple((a, b) for a in range(0, 61, 2) for b in range(0, 61, 3))}},
    "min_tokens": {"stop_ids": frozenset(range(40)), "min_tokens": 12},
    "stops": {"stop_ids": frozenset({3, 17, 44})},
    "stops in spans": {
        "content_stop_ids": frozenset(range(0, 61, 5)), "spans": (Span(7, 8, opened=True), Span(9, 10), Span(11, 12)),
    },
    "logprobs": {"logprobs": 2, "prompt_logprobs": 1},
    "grammar": {"grammar": tiny_grammar.regex("[ab]{4,9}(c[0-9]+){1,3}")},
    "grammar that counts": {"grammar": 'start: thought "end"\nthought[max_tokens=5]: /[a-z]*/'},
}  # fmt: skip


Told = list[tuple[int, int, object]]


def told(events: list[TokenEvent]) -> tuple[Told, tuple[object, ...]]:
    """What an answer's events tell: its tokens with their places and log-probabilities, and its end."""
    tokens: Told = []
    for event in events:
        logprobs = event.logprobs or (None,) * len(event.token_ids)
        places = range(event.index, event.index + len(event.token_ids))
        tokens += zip(places, event.token_ids, logprobs, strict=True)
    return tokens, (events[-1].finish_reason, events[-1].stop_id, events[-1].error)


@pytest.mark.parametrize("asked", ASKED, ids=lambda name: name.replace(" ", "-"))
def test_it_goes_on_from_its_tokens(asked: str) -> None:
    source = tiny_grammar.grammars()
    whole = request(asked, **ASKED[asked])
    events = serve(make(source), [whole])[asked]
    tokens = answer(events)
    assert len(tokens) > 3
    for count in (1, 2, len(tokens) // 2, len(tokens) - 1):
        begun = replace(whole, answered=tuple(tokens[:count]), prompt_logprobs=None)
        engine = make(source)
        found, end = told(serve(engine, [begun, request("beside")])[asked])
        expected, expected_end = told(events)
        assert (found, end) == (expected[count:], expected_end), f"after {count} tokens"
        assert engine.stats().free_pages == engine.stats().total_pages


def test_a_full_answer_ends_without_a_step() -> None:
    engine = make(None)
    engine.submit(request("a", max_tokens=4, answered=(1, 2, 3, 4)))
    assert engine.plan() is None
    (end,) = engine.take_events()
    assert (end.finish_reason, end.token_ids, end.index) == ("length", (), 4)


def test_its_tokens_are_looked_at() -> None:
    with pytest.raises(RequestRejected, match="answered has token ids outside"):
        make(None).submit(request("a", answered=(1, 999)))


def test_an_older_answer_goes_before_those_that_wait_and_after_those_that_run() -> None:
    sizes = {"vocab_size": 61, "max_model_len": 64, "num_pages": 32, "page_size": 4, "num_slots": 8}
    scheduler = Scheduler(SchedulerConfig(**sizes, max_seqs=1, max_step_tokens=16))
    sequences = {}
    for name, arrived in (("runs", 10.0), ("waits", 11.0), ("old", 5.0), ("older", 4.0), ("new", 12.0)):
        asked = Request(name, (1, 2, 3), 3, Sampling(), arrived=arrived, answered=(4,) if "old" in name else ())
        sequences[name] = scheduler.submit(asked)
        if name == "runs":
            plan = scheduler.plan()
            assert plan is not None
            scheduler.commit(plan, [[5]])
    assert [sequence.request.request_id for sequence in scheduler.running] == ["runs"]
    assert [sequence.request.request_id for sequence in scheduler.waiting] == ["older", "old", "waits", "new"]
    assert sequences["old"].num_generated == 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resumed")
    write_random_checkpoint(path, CONFIG, seed=4, tokenizer=False, mtp=True)
    return path


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_real_model_goes_on_with_the_same_tokens(checkpoint: Path, drafts: int) -> None:
    prompts = [tuple((7 * number + 3 * place) % VOCAB for place in range(9 + 20 * number)) for number in range(4)]
    asked = [
        Request(f"r{number}", prompt, 40, Sampling(0.8 * (number % 2), seed=number), stop_ids=frozenset({EOS}))
        for number, prompt in enumerate(prompts)
    ]
    whole = Worker(checkpoint, drafts).serve(*asked)
    for cut in (1, 13, 39):
        begun = [
            replace(each, answered=tuple(answer(whole[each.request_id])[:cut]), request_id=f"{each.request_id}#1")
            for each in asked
        ]
        found = Worker(checkpoint, drafts).serve(*begun)
        for each in asked:
            tokens = answer(whole[each.request_id])
            assert answer(found[f"{each.request_id}#1"]) == tokens[cut:], f"{each.request_id} after {cut} tokens"
