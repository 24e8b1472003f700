"""Finds out what steps take, by steps: an engine's own, over the same model, memory and gang, before it serves anybody.

Sequences that mean nothing decode, so many at once with so many drafts each, for a few steps; all drafts stand, since
what stands costs time too: the next step replays it. They run where requests will: inside an epoch, with the threads
that it grants and the experts wherever they are. A table that was made before under the same circumstances is read from
a file instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from divisi.cluster.drafting import FixedDepth
from divisi.cluster.engine.engine import Engine
from divisi.cluster.engine.scheduler import SchedulerConfig
from divisi.cluster.engine.step.plan import StepPlan
from divisi.cluster.engine.times.cells import STEPS, Cell, Samples, cells
from divisi.cluster.engine.times.times_file import TimesFile
from divisi.cluster.request import Request, Sampling
from divisi.cluster.step_times.times import StepTimes
from divisi.model.dispatcher import Dispatcher
from divisi.model.sampling.sampler import ChooseTokens, Sampled, Sampler, SamplingBatch

_BUDGET_S = 6.0
"""For the whole table; what is left out then is estimated from the rest."""
_SETTLED_S = 0.03
"""Of a cell's steps, after which further ones are no faster."""
_ROUNDS, _MORE_S = 3, 3.0
"""Times that all kinds of step have their turn, and the seconds after which no further round begins: what disturbs
a machine for a moment then disturbs one turn.
"""


class Agreeing(Sampler):
    """Chooses as a sampler does, and then takes a token that depends on its sequence and position alone."""

    def __init__(self, choose: ChooseTokens, vocab_size: int) -> None:
        super().__init__(choose)
        self._vocab_size = np.uint64(vocab_size)

    def sample(
        self,
        logits_RV: Tensor,
        batch: SamplingBatch,
        positions_R: NDArray[np.int64],
        masks: NDArray[np.int32] | None = None,
        ahead_RA: Tensor | None = None,
    ) -> Sampled:
        """See Sampler. What was drafted stands; tokens differ, as do the experts that they visit."""
        sampled = super().sample(logits_RV, batch, positions_R, masks, ahead_RA)
        # Behind the sampler's own work on its device, so that whoever reads the tokens waits for that, too.
        token_ids_R = torch.from_numpy(self._mixed(batch, positions_R)).to(logits_RV.device, non_blocking=True)
        return Sampled(token_ids_R, sampled.logprobs)

    def drawn(self, passes: list[list[int]], batch: SamplingBatch, positions: Sequence[int]) -> list[list[int]]:
        """See Sampler."""
        mixed = [self._mixed(batch, np.array(positions) + ahead).tolist() for ahead in range(len(passes))]
        return [tokens[: len(drawn)] for tokens, drawn in zip(mixed, passes, strict=True)]

    def _mixed(self, batch: SamplingBatch, positions_R: NDArray[np.int64]) -> NDArray[np.int64]:
        mixed_R = positions_R.astype(np.uint64) * 7919 + batch.free.seeds_R * 104729
        return (mixed_R % self._vocab_size).astype(np.int64)


class Calibration:
    """Runs the cells' steps one by one. See `engine.Rehearsal`."""

    def __init__(self, engine: Engine, drafting: FixedDepth, config: SchedulerConfig, times: StepTimes) -> None:
        """`engine` is one of its own, of which nobody knows; its sampler is `Agreeing`, its policy `drafting`.

        What is found goes to `times`.
        """
        self._engine, self._drafting, self._times = engine, drafting, times
        self._vocab_size = config.vocab_size
        self._cells, self._samples = list(cells(config)), Samples()
        self._turns = self._in_turn()
        self._cell: Cell | None = None
        self._turn: list[float] = []
        """Seconds of the cell's steps in this turn."""
        self._begun = self._spent_s = 0.0

    @property
    def complete(self) -> bool:
        """Whether every kind of step was measured."""
        return all(self._samples.count(cell) for cell in self._cells)

    def plan(self) -> StepPlan | None:
        """See Rehearsal."""
        while self._spent_s < _BUDGET_S:
            self._begun = perf_counter()
            if self._goes_on() and (plan := self._engine.plan()) is not None:
                return plan
            self._end_cell()
            if not self._begin(next(self._turns, None)):
                break
        self._end_cell()
        self._times.learn(self._samples.measured())
        return None

    def run_pass(self, plan: StepPlan, index: int, dispatcher: Dispatcher) -> None:
        """See Rehearsal. Raises StepAborted."""
        self._engine.run_pass(plan, index, dispatcher)

    def commit(self, plan: StepPlan) -> None:
        """See Rehearsal."""
        self._engine.commit(plan)
        seconds, cell = perf_counter() - self._begun, self._cell
        self._spent_s += seconds
        if cell is None or plan.scans or plan.num_rows != cell.rows:
            return
        self._turn.append(seconds)
        drafted_s = self._engine.draft_seconds
        self._samples.add(cell, seconds - sum(drafted_s), drafted_s)

    def _goes_on(self) -> bool:
        """Whether the cell's turn is not over."""
        if self._cell is None:
            return False
        return len(self._turn) < (STEPS if sum(self._turn) >= _SETTLED_S else self._cell.most_steps)

    def _in_turn(self) -> Iterator[Cell]:
        for _ in range(_ROUNDS):
            yield from self._cells
            if self._spent_s > _MORE_S:
                break

    def _begin(self, cell: Cell | None) -> bool:
        """Queue the sequences of the next cell; False without one."""
        self._cell = cell
        if cell is None:
            return False
        self._turn.clear()
        self._drafting.most = cell.drafts
        for number in range(cell.sequences):
            prompt = tuple(token % self._vocab_size for token in range(cell.prompt))
            self._engine.submit(Request(str(number), prompt, cell.answer, Sampling(temperature=0.0, seed=number)))
        return True

    def _end_cell(self) -> None:
        """Between two steps, so that what is cancelled has ended."""
        for number in range(0 if self._cell is None else self._cell.sequences):
            self._engine.cancel(str(number))
        self._engine.take_events()


class Remembered:
    """A calibration that runs only where no file has its outcome, and leaves one if it came to its end. See
    `engine.Rehearsal`.
    """

    def __init__(self, calibration: Calibration, file: Callable[[], TimesFile], times: StepTimes) -> None:
        """`file` is asked for in the first plan: it depends on the threads that an epoch grants."""
        self._calibration, self._find, self._times = calibration, file, times
        self._file: TimesFile | None = None

    def plan(self) -> StepPlan | None:
        """See Rehearsal."""
        if self._file is None:
            self._file = self._find()
            if (measured := self._file.read()) is not None:
                self._times.learn(measured)
                return None
        if (plan := self._calibration.plan()) is None and self._calibration.complete:
            self._file.write(self._times.measured)
        return plan

    def run_pass(self, plan: StepPlan, index: int, dispatcher: Dispatcher) -> None:
        """See Rehearsal. Raises StepAborted."""
        self._calibration.run_pass(plan, index, dispatcher)

    def commit(self, plan: StepPlan) -> None:
        """See Rehearsal."""
        self._calibration.commit(plan)
