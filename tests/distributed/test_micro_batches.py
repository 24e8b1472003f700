"""Gangs whose decoding steps are cut in two give the tokens of one process, whatever aborts on the way."""

from __future__ import annotations

import pytest

from divisi.cluster.dispatch.broadcast import ShardBatch
from divisi.cluster.dispatch.micro_batches import MicroBatches
from divisi.cluster.dispatch.protocol import Experts, Peers, ShardEnd
from divisi.cluster.errors import StepAborted
from divisi.cluster.passes import Pass
from divisi.cluster.request import Request, Sampling
from divisi.cluster.seats import GangShape
from divisi.model.demo import checkpoint_dir
from tests.support.thread_gang import small_spec, thread_gang

SHAPES = [GangShape(1, 1), GangShape(2, 2), pytest.param(GangShape(2, 3), marks=pytest.mark.verify)]
Answers = dict[str, list[int]]


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return [
        Request(f"r{i}", tuple(range(20 + 7 * i, 60 + 9 * i)), 24, Sampling(temperature=float(i % 2), seed=i))
        for i in range(7)
    ]


def answers(requests: list[Request], shape: GangShape, **changes: object) -> Answers:
    with thread_gang(small_spec(checkpoint_dir(), shape, max_draft_tokens=2, adaptive_drafts=False, **changes)) as gang:
        for number, request in enumerate(requests):
            gang[number % len(gang)].submit(request)
        return {r.request_id: gang[n % len(gang)].finish(r.request_id) for n, r in enumerate(requests)}


@pytest.fixture(scope="module")
def local(requests: list[Request]) -> Answers:
    return answers(requests, GangShape(1, 0))


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    """The passes of which a shard has served both halves."""
    seen: list[Pass] = []
    shard_end = MicroBatches.shard_end

    def watched(self: MicroBatches, peers: Peers, experts: Experts) -> ShardEnd:
        end = shard_end(self, peers, experts)
        begin = end.begin

        def note(step_pass: Pass) -> None:
            if step_pass.second:
                seen.append(step_pass)
            begin(step_pass)

        end.begin = note  # type: ignore[method-assign]
        return end

    monkeypatch.setattr(MicroBatches, "shard_end", watched)
    return seen


@pytest.mark.parametrize("dispatch", ["broadcast", "all_to_all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_are_those_of_one_process(
    requests: list[Request], local: Answers, cut: list[Pass], shape: GangShape, dispatch: str
) -> None:
    assert answers(requests, shape, dispatch=dispatch, micro_batches="always") == local
    assert sum(1 for step_pass in cut if max(step_pass.second.values()) > 1) > 10, "with drafts in both halves"


def test_never_is_never(requests: list[Request], local: Answers, cut: list[Pass]) -> None:
    assert answers(requests, GangShape(1, 1), micro_batches="never") == local
    assert not cut


def test_halves_that_overflow_are_run_again(
    requests: list[Request], local: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All-to-all with room for a row less than there are."""
    monkeypatch.setattr("divisi.cluster.dispatch.all_to_all.capacity", lambda rows, hit, spare: max(rows - 1, 1))
    assert answers(requests, GangShape(1, 2), dispatch="all_to_all", micro_batches="always") == local


def test_an_abort_in_a_half_changes_no_token(
    requests: list[Request], local: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard fails three times, in the first half and in the second, while the other one is under way."""
    ran, failed, run = 0, 0, ShardBatch.run

    def failing(self: ShardBatch, layer: int) -> None:
        nonlocal ran, failed
        ran += 1
        if failed < 3 and ran % 101 == 0:
            failed += 1
            raise StepAborted("planted", "attention:0")
        run(self, layer)

    monkeypatch.setattr(ShardBatch, "run", failing)
    assert answers(requests, GangShape(1, 1), micro_batches="always") == local
    assert failed == 3
