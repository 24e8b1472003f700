"""What a step has drafted so far: tokens, what they go on from, and the masks of their rows. Nothing outlives the step.

A row is named by its run and by how many drafts stand before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from divisi.cluster.engine.grammar import Grammars, Guided
from divisi.cluster.engine.step.plan import Run
from divisi.model.sampling.sampler import NO_TOKEN


class Row(NamedTuple):
    """A row that chooses a token, of the model's or a draft."""

    run: Run
    ahead: int
    """Drafts before it."""

    @property
    def position(self) -> int:
        """Where the token stands that it chooses."""
        return self.run.end - self.run.num_drafts + self.ahead


class Drafts:
    """The drafts of one attempt at a step. They stay on the device until somebody asks what they are."""

    def __init__(self) -> None:
        self.hidden_SD: Tensor | None = None
        """What the next pass goes on from."""
        self._passes: list[tuple[list[Run], Tensor]] = []
        self._read = 0
        """Passes whose drafts are among the tokens."""
        self.told: list[list[int]] | None = None
        """The drafts of all passes, where these were one: known on the host from the first."""
        self._tokens: dict[int, list[int]] = {}

    @property
    def by_pass(self) -> list[Tensor]:
        """The drafts of each pass so far, int64 [S] on the device; NO_TOKEN where a run's rules left none."""
        return [token_ids_S for _, token_ids_S in self._passes]

    def add(self, runs: list[Run], token_ids_S: Tensor) -> None:
        """One more draft of each run."""
        self._passes.append((runs, token_ids_S))

    def tell(self, runs: Sequence[Run], told: list[list[int]]) -> None:
        """All drafts at once, pass by pass; the runs of each are the first of those before it."""
        self.told = told
        for tokens in told:
            for run, token in zip(runs, tokens, strict=False):
                self._tokens.setdefault(run.row, []).append(token)

    def here(self, run: Run) -> list[int]:
        """A run's drafts where they were told, else as many zeros: waits for nobody."""
        return [0] * run.num_drafts if self.told is None else self._tokens.get(run.row, [])

    def of(self, run: Run) -> list[int]:
        """A run's drafts; NO_TOKEN where its rules left none. Waits for the device."""
        for runs, token_ids_S in self._passes[self._read :]:
            for each, token in zip(runs, token_ids_S.tolist(), strict=True):
                self._tokens.setdefault(each.row, []).append(token)
        self._read = len(self._passes)
        return self._tokens.get(run.row, [])

    def ahead(self, rows: list[Row]) -> Tensor | None:
        """The drafts before each row, int64 [R, A], padded with NO_TOKEN; None where no row has any."""
        most = max(row.ahead for row in rows)
        if not most:
            return None
        padding = [NO_TOKEN] * most
        return torch.tensor([(self.of(row.run)[: row.ahead] + padding)[:most] for row in rows])


class StepMasks:
    """The masks of rows that follow a grammar, each computed once, in another thread, from when it is asked for."""

    def __init__(self, grammars: Grammars | None) -> None:
        self._grammars = grammars
        self._found: dict[tuple[int, int], tuple[Future[NDArray[np.int32]], int]] = {}

    def ask(self, rows: Iterable[Row], drafts: Drafts) -> None:
        """Begin to compute those that are not there yet. A row past the answer's end gets none: it never counts."""
        answers: list[Guided] = []
        keys: list[tuple[int, int]] = []
        for run, ahead in rows:
            sequence, key = run.sequence, (run.row, ahead)
            if sequence.guide is None or key in self._found:
                continue
            before = drafts.of(run)[:ahead]
            if NO_TOKEN in before or not sequence.request.stop_ids.isdisjoint(before):
                continue
            keys.append(key)
            answers.append(Guided(sequence.guide, sequence.tokens, len(sequence.request.prompt), tuple(before)))
        if answers:
            assert self._grammars is not None, "a request with a grammar was accepted"
            masks = self._grammars.start(answers)
            self._found |= {key: (masks, place) for place, key in enumerate(keys)}

    def of(self, rows: Iterable[Row]) -> NDArray[np.int32] | None:
        """Masks [M, B] of rows that follow a grammar, in their order; None without such rows."""
        wanted = [self._found.get((row.run.row, row.ahead)) for row in rows]
        if not wanted:
            return None
        assert self._grammars is not None, "a request with a grammar was accepted"
        nothing = self._grammars.nothing
        return np.stack([nothing if entry is None else entry[0].result()[entry[1]] for entry in wanted])
