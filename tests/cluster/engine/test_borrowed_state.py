"""A sequence that begins with somebody else's prefix: shared pages, and a state that it reads and never writes.

Nothing in the product lends yet; the scheduler here does.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from divisi.cluster.dispatch.local import LocalEnd
from divisi.cluster.engine.engine import Engine
from divisi.cluster.engine.memory.sequence_memory import Prefix
from divisi.cluster.engine.scheduler import Scheduler, SchedulerConfig
from divisi.cluster.engine.sequence import Sequence
from divisi.cluster.errors import StepAborted
from divisi.cluster.request import Request, Sampling
from divisi.kernels.select import select_kernels
from divisi.model.checkpoint import Checkpoint
from divisi.model.config import ModelConfig
from divisi.model.dispatcher import Pending
from divisi.model.experts import ExpertBank
from divisi.model.placement import whole_share
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from divisi.model.runner import ModelRunner
from divisi.model.sampling.sampler import Sampler
from divisi.model.state import StateStore
from divisi.model.stopwatch import Stopwatch
from divisi.model.weights import load_weights
from tests.support.model_steps import LayerByLayer

CPU = torch.device("cpu")
PAGE, CHUNK = 8, 24


class Lender(Scheduler):
    """Gives whoever is admitted the prefix that was put by."""

    prefix: Prefix | None = None

    def _admit(self) -> Sequence:
        sequence = super()._admit()
        if (prefix := self.prefix) is not None:
            self.memory.release(sequence.holding)
            sequence.admitted = self.memory.acquire(len(sequence.tokens), prefix)
            sequence.length = prefix.length
        return sequence


class Rig:
    """A small model on one worker, with its parts at hand."""

    def __init__(self, path: Path, implementation: str) -> None:
        config, checkpoint, kernels = ModelConfig.load(path), Checkpoint.open(path), select_kernels(CPU, implementation)
        limits = SchedulerConfig(
            vocab_size=config.vocab_size, max_model_len=256, num_pages=64, page_size=PAGE, num_slots=8, max_seqs=4,
            max_step_tokens=CHUNK,
        )  # fmt: skip
        self.store = StateStore(config, num_pages=64, page_size=PAGE, num_slots=8, dtype=torch.float32, device=CPU)
        runner = ModelRunner(config, load_weights(checkpoint, config, kernels, torch.float32, CPU), self.store, kernels)
        self.scheduler = Lender(limits)
        self.engine = Engine(runner, Sampler(), self.scheduler, device=CPU, stopwatch=Stopwatch())
        experts = ExpertBank.load(checkpoint, config, whole_share(config), kernels, torch.float32, CPU)
        self.dispatcher = LocalEnd(experts)

    def step(self) -> list[int]:
        plan = self.engine.plan()
        assert plan is not None
        return [token for event in self.engine.run(plan, self.dispatcher) for token in event.token_ids]

    def put_by(self, prompt: tuple[int, ...]) -> Prefix:
        """Prefill a prompt, end its request, and keep what it held."""
        self.engine.submit(Request("lender", prompt, 4, Sampling(temperature=0.0)))
        memory, sequence = self.scheduler.memory, self.scheduler.waiting[0]
        while sequence.length < len(prompt):
            self.step()
        holding = sequence.holding
        prefix = Prefix(len(prompt), holding.pages.copy(), holding.slot)
        memory.pages.share(prefix.pages)
        memory.slots.share([prefix.slot])
        self.engine.cancel("lender")
        return prefix

    def bytes_of(self, prefix: Prefix) -> list[torch.Tensor]:
        """A copy of all that lies in the prefix's slot and pages."""
        rows = [page * PAGE + row for page in prefix.pages for row in range(PAGE)][: prefix.length]
        found = [tensor[rows] for pool in self.store.kv.values() for tensor in (pool.key_PJD, pool.value_PJD)]
        for state in self.store.delta.values():
            tensors = (state.state_SHKV, state.conv_SRC, state.key_SRGK, state.delta_SRHV, state.decay_SRH)
            found += [tensor[prefix.slot] for tensor in (*tensors, state.position_S)]
        return [tensor.clone() for tensor in found]


class AbortsAt(LayerByLayer):
    """Aborts a step at one layer."""

    layer: int | None = None

    def dispatch(self, layer: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, gates_TK: torch.Tensor) -> Pending:
        if layer == self.layer:
            raise StepAborted("planted", "expert:0")
        return super().dispatch(layer, x_TD, expert_ids_TK, gates_TK)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_random_checkpoint(path, SMALL_CONFIG, seed=5, tokenizer=False)
    return path


@pytest.fixture(params=["native", "reference"])
def rig(request: pytest.FixtureRequest, model_dir: Path) -> Rig:
    return Rig(model_dir, request.param)


@pytest.mark.parametrize("length", [CHUNK, CHUNK - 3], ids=["whole pages", "a page in part"])
@pytest.mark.parametrize("how", ["commit", "abort", "cancel"])
def test_the_borrowed_bytes_stay_and_the_answer_is_that_of_a_whole_prefill(rig: Rig, how: str, length: int) -> None:
    rng = random.Random(3)
    prompt = tuple(rng.randrange(SMALL_CONFIG["vocab_size"]) for _ in range(CHUNK + 37))
    request = Request("borrower", prompt, 12, Sampling(temperature=0.0))
    expected: list[int] = []
    rig.engine.submit(request)
    while len(expected) < request.max_tokens:
        expected += rig.step()
    memory = rig.scheduler.memory
    prefix = rig.put_by(prompt[:length])
    held = (memory.pages.num_free, memory.slots.num_free)
    before = rig.bytes_of(prefix)

    rig.scheduler.prefix = prefix
    rig.engine.submit(request)
    answer: list[int] = []
    while len(answer) < request.max_tokens:
        plan = rig.engine.plan()
        if plan is None:
            break
        if how == "abort":
            faulty = AbortsAt(rig.dispatcher._experts)
            for faulty.layer in range(SMALL_CONFIG["num_hidden_layers"]):
                with pytest.raises(StepAborted):
                    rig.engine.run(plan, faulty)
        if how == "cancel":
            rig.engine.cancel("borrower")
        answer += [token for event in rig.engine.run(plan, rig.dispatcher) for token in event.token_ids]
    assert answer == ([] if how == "cancel" else expected)
    assert all(torch.equal(now, then) for now, then in zip(rig.bytes_of(prefix), before, strict=True))
    assert (memory.pages.num_free, memory.slots.num_free) == held
    assert memory.slots.holders(prefix.slot) == 1
