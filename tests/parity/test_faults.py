"""A step that is aborted anywhere and run again must leave the same tokens as one that was not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from divisi.cluster.errors import StepAborted
from divisi.cluster.request import Request, Sampling
from divisi.model.dispatcher import Dispatcher, Pending
from tests.parity.engines import LocalEngine, local_engine
from tests.parity.variants import build_oracle, save_oracle

LAYERS = 4


class Faulty:
    """Aborts at a chosen layer, before or after the experts have run, then works."""

    def __init__(self, inner: Dispatcher) -> None:
        self._inner = inner
        self.fail_at: tuple[int, bool] | None = None

    def dispatch(self, layer: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, gates_TK: torch.Tensor) -> Pending:
        if self.fail_at == (layer, False):
            raise StepAborted("planted", "expert:0")
        return _Pending(self, layer, self._inner.dispatch(layer, x_TD, expert_ids_TK, gates_TK))


class _Pending:
    def __init__(self, owner: Faulty, layer: int, inner: Pending) -> None:
        self._owner, self._layer, self._inner = owner, layer, inner

    def combine(self) -> torch.Tensor:
        if self._owner.fail_at == (self._layer, True):
            raise StepAborted("planted", "expert:0")
        return self._inner.combine()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_oracle(build_oracle("base"), tmp_path_factory.mktemp("faults"))


def make_requests() -> list[Request]:
    rng = random.Random(11)
    return [
        Request(
            f"r{i}", tuple(rng.randrange(211) for _ in range(length)), 20, Sampling(temperature=0.7 * (i % 2), seed=i)
        )
        for i, length in enumerate((3, 40, 17, 64, 9))
    ]


def serve(local: LocalEngine, faults: list[tuple[int, bool]]) -> tuple[dict[str, list[int]], int]:
    """Run all requests; before each step really runs, abort it at every fault of the list."""
    faulty = Faulty(local.dispatcher)
    tokens: dict[str, list[int]] = {}
    aborted = 0
    for request in make_requests():
        local.engine.submit(request)
    while (plan := local.engine.plan()) is not None:
        for fault in faults:
            faulty.fail_at = fault
            with pytest.raises(StepAborted):
                local.engine.run(plan, faulty)
            aborted += 1
        faulty.fail_at = None
        for event in local.engine.run(plan, faulty):
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
    return tokens, aborted


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("after", [False, True], ids=["before-dispatch", "before-combine"])
@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_every_step_aborted_at_a_layer_and_replayed(
    model_dir: Path, layer: int, after: bool, implementation: str
) -> None:
    make = {"max_step_tokens": 16, "implementation": implementation}
    expected, _ = serve(local_engine(model_dir, **make), [])
    actual, aborted = serve(local_engine(model_dir, **make), [(layer, after)] * 2)
    assert aborted > 40
    assert actual == expected


def test_nothing_is_held_after_aborted_steps(model_dir: Path) -> None:
    local = local_engine(model_dir, max_step_tokens=48)
    before = (local.engine.stats().free_pages, local.engine.stats().free_slots)
    serve(local, [(1, True), (3, False)])
    assert (local.engine.stats().free_pages, local.engine.stats().free_slots) == before
    assert local.engine.plan() is None
