"""A small model on the CPU that is driven step by step, without a scheduler: runs in, logits out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from divisi.cluster.dispatch.local import LocalEnd
from divisi.kernels.gated_delta.layout import Leaves
from divisi.kernels.select import Kernels
from divisi.model.batch import DecodeRows, PrefillRows, StepBatch
from divisi.model.checkpoint import Checkpoint
from divisi.model.config import ModelConfig
from divisi.model.experts import ExpertBank
from divisi.model.mtp import Drafted
from divisi.model.placement import whole_share
from divisi.model.runner import ModelRunner
from divisi.model.state import StateStore
from divisi.model.weights import load_weights

CPU = torch.device("cpu")
PAGE = 8


@dataclass
class _Held:
    """What one sequence holds."""

    pages: list[int]
    slot: int
    spare: int
    length: int = 0


class LayerByLayer(LocalEnd):
    """Experts in this process whose rows are seen at every layer, as by a meter that measures."""

    bank = None


@dataclass
class _Run:
    held: _Held
    tokens: list[int]
    accepted: int


@dataclass
class ModelSteps:
    """Every sequence has fixed pages and two slots; a step's rows are committed as soon as it has run."""

    runner: ModelRunner
    dispatcher: LocalEnd
    held: list[_Held] = field(default_factory=list)

    @classmethod
    def load(
        cls, path: Path, kernels: Kernels, dtype: torch.dtype, *, sequences: int, most_tokens: int, max_rows: int = 1
    ) -> ModelSteps:
        config, checkpoint = ModelConfig.load(path), Checkpoint.open(path)
        each = -(-most_tokens // PAGE)
        store = StateStore(
            config, num_pages=sequences * each, page_size=PAGE, num_slots=2 * sequences, max_rows=max_rows,
            dtype=dtype, device=CPU,
        )  # fmt: skip
        runner = ModelRunner(config, load_weights(checkpoint, config, kernels, dtype, CPU), store, kernels)
        bank = ExpertBank.load(checkpoint, config, whole_share(config), kernels, dtype, CPU)
        # scattered, so that a mistake in a page table shows
        pages = torch.randperm(sequences * each, generator=torch.Generator().manual_seed(1)).view(sequences, each)
        held = [_Held(own, 2 * index, 2 * index + 1) for index, own in enumerate(pages.tolist())]
        return cls(runner, LocalEnd(bank), held)

    def forget(self) -> None:
        """Begin all sequences anew."""
        for held in self.held:
            held.length = 0

    def draft(self, tokens: Mapping[int, int], ahead: int, hidden: Tensor | None) -> Drafted:
        """One pass over the MTP layer: a token of each sequence, so many positions past the committed length."""
        return self.runner.draft(self.draft_batch(tokens, ahead), self.dispatcher, hidden)

    def draft_batch(self, tokens: Mapping[int, int], ahead: int) -> StepBatch:
        """The rows of such a pass."""
        runs = [_Run(replace(held, length=held.length + ahead), [token], 0) for held, token in self._of(tokens)]
        positions = [run.held.length for run in runs]
        return StepBatch(
            token_ids_T=torch.tensor([*tokens.values()]),
            positions_T=_ints(positions),
            kv_rows_T=_ints(
                run.held.pages[at // PAGE] * PAGE + at % PAGE for run, at in zip(runs, positions, strict=True)
            ),
            decode=_decode_rows(runs),
            prefill=None,
            decode_rows=len(runs),
            logit_rows_R=torch.arange(len(runs)),
        )

    def _of(self, tokens: Mapping[int, int]) -> list[tuple[_Held, int]]:
        return [(self.held[index], token) for index, token in tokens.items()]

    def step(
        self,
        rings: Mapping[int, Sequence[int]],
        scans: Mapping[int, Sequence[int]],
        *,
        rejected: Mapping[int, int] = {},
        last_only: bool = False,
        cut: int = 0,
    ) -> dict[int, Tensor]:
        """Run tokens of sequences as ring runs and as scan runs; return the logits of each sequence's rows.

        So many rows at the end of a ring run are `rejected`, that is not committed. `last_only` asks for the logits of
        each run's last row only. With `cut`, the rows of so many sequences are the first of two micro-batches.
        """
        decode = [
            _Run(self.held[index], list(tokens), len(tokens) - rejected.get(index, 0))
            for index, tokens in rings.items()
        ]
        prefill = [_Run(self.held[index], list(tokens), len(tokens)) for index, tokens in scans.items()]
        runs = [*decode, *prefill]
        ends = list(accumulate(len(run.tokens) for run in runs))
        positions = [run.held.length + i for run in runs for i in range(len(run.tokens))]
        pages = [run.held.pages for run in runs for _ in run.tokens]
        batch = StepBatch(
            token_ids_T=torch.tensor([token for run in runs for token in run.tokens]),
            positions_T=_ints(positions),
            kv_rows_T=_ints(own[at // PAGE] * PAGE + at % PAGE for own, at in zip(pages, positions, strict=True)),
            decode=_decode_rows(decode) if decode else None,
            prefill=_prefill_rows(prefill) if prefill else None,
            decode_rows=sum(len(run.tokens) for run in decode),
            logit_rows_R=torch.tensor([end - 1 for end in ends]) if last_only else torch.arange(len(positions)),
        )
        if cut:
            logits = self.runner.forward_in_turns(batch.cut(cut, ends[cut - 1]), self.dispatcher)
        else:
            logits = self.runner.forward(batch, self.dispatcher)
        for run in runs:
            run.held.length += run.accepted
        for run in prefill:
            run.held.slot, run.held.spare = run.held.spare, run.held.slot
        parts = logits.split([1 if last_only else len(run.tokens) for run in runs])
        return dict(zip([*rings, *scans], parts, strict=True))


def _decode_rows(runs: Sequence[_Run]) -> DecodeRows:
    return DecodeRows(
        _starts(runs),
        _ints(run.held.length for run in runs),
        _ints(run.held.slot for run in runs),
        torch.tensor([run.held.pages for run in runs], dtype=torch.int32),
    )


def _prefill_rows(runs: Sequence[_Run]) -> PrefillRows:
    return PrefillRows(
        _starts(runs),
        _ints(run.held.length for run in runs),
        _ints(run.held.slot if run.held.length else -1 for run in runs),
        Leaves(
            _ints(range(len(runs) + 1)),
            _ints(run.held.length + len(run.tokens) for run in runs),
            _ints(run.held.spare for run in runs),
        ),
        torch.tensor([run.held.pages for run in runs], dtype=torch.int32),
    )


def _starts(runs: Sequence[_Run]) -> Tensor:
    return _ints(accumulate((len(run.tokens) for run in runs), initial=0))


def _ints(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)
