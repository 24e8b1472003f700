"""Gangs that draft: the tokens of one process that doesn't, in every topology, whatever aborts on the way."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor

from divisi.cluster.errors import StepAborted
from divisi.cluster.request import Request, Sampling
from divisi.cluster.seats import GangShape
from divisi.model.config import ModelConfig
from divisi.model.demo import checkpoint_dir
from tests.distributed.test_gang import Answers
from tests.support.thread_gang import Worker, small_spec, thread_gang

SHAPES = [
    pytest.param(GangShape(1, 2), marks=pytest.mark.verify),
    GangShape(2, 2),
    GangShape(2, 2, colocated=True),
]
LAYERS = ModelConfig.load(checkpoint_dir()).num_hidden_layers
DRAFTS = 3


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """A text that the demo model goes on with, so that some drafts stand and others don't."""
    return [
        Request(f"r{i}", tuple(range(20 + 7 * i, 60 + 9 * i)), 48, Sampling(temperature=float(i % 2), seed=i))
        for i in range(6)
    ]


@pytest.fixture(scope="module")
def plain(requests: list[Request]) -> Answers:
    with thread_gang(small_spec(checkpoint_dir(), GangShape(1, 0))) as (worker,):
        worker.submit(*requests)
        return {request.request_id: worker.finish(request.request_id) for request in requests}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_topology_gives_the_tokens_of_one_process_without_drafts(
    requests: list[Request], plain: Answers, shape: GangShape
) -> None:
    """Workers with limits of their own: their passes are merged, and some have none."""
    limits = [None, 1, 0, 2, None, 3]
    with thread_gang(small_spec(checkpoint_dir(), shape, max_draft_tokens=DRAFTS, adaptive_drafts=False)) as gang:
        for number, (request, limit) in enumerate(zip(requests, limits, strict=True)):
            gang[number % len(gang)].submit(replace(request, max_draft_tokens=limit))
        drafted = 0
        for number, request in enumerate(requests):
            worker = gang[number % len(gang)]
            assert worker.finish(request.request_id) == plain[request.request_id]
            drafted += worker.events[request.request_id][-1].drafted
        assert drafted > 20


class FailingExperts:
    """Aborts a step in one layer of one pass after the other, each once; the next attempt goes through."""

    def __init__(self, worker: Worker) -> None:
        assert worker.experts is not None
        self._partial_sum = worker.experts.partial_sum
        worker.experts.partial_sum = self.partial_sum  # type: ignore[method-assign]
        self._pass = 0
        self._last: int | None = None
        self._forgiving = False
        self.failed: list[tuple[int, int]] = []
        """(draft passes before it in the step, layer)."""

    def partial_sum(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        if layer in (0, LAYERS):
            self._pass = self._pass + 1 if self._last == LAYERS else 0
        self._last = layer
        place = (self._pass, layer)
        drafting = layer == LAYERS or self._pass == DRAFTS
        if drafting and place not in self.failed and not self._forgiving:
            self.failed.append(place)
            self._last = None
            self._forgiving = True
            raise StepAborted("planted", "attention:1")
        if layer == LAYERS - 1:
            self._forgiving = False  # the step is about to end
        return self._partial_sum(layer, x_TD, expert_ids_TK, gates_TK)


@pytest.mark.timeout(300)
def test_an_abort_in_any_layer_of_any_pass_changes_no_token(requests: list[Request], plain: Answers) -> None:
    """Each costs an epoch; the step is run again from its first pass."""
    shape = GangShape(2, 2, colocated=True)
    spec = small_spec(checkpoint_dir(), shape, max_draft_tokens=DRAFTS, adaptive_drafts=False)
    with thread_gang(spec) as gang:
        failing = FailingExperts(gang[1])
        for number, request in enumerate(requests):
            gang[number % 2].submit(request)
        for number, request in enumerate(requests):
            assert gang[number % 2].finish(request.request_id, 120) == plain[request.request_id]
    everywhere = [(at, LAYERS) for at in range(DRAFTS)] + [(DRAFTS, layer) for layer in range(LAYERS)]
    assert sorted(failing.failed) == sorted(everywhere)
