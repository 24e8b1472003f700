"""Passes over a step's tokens: of the full model, and of the MTP layer.

Shapes: T rows, D model width, R rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from divisi.kernels.mixture.layout import Update
from divisi.kernels.native.passes import AllDrafted
from divisi.kernels.pass_memory import PassKind
from divisi.kernels.sampling.layout import Draws
from divisi.kernels.select import Kernels
from divisi.model.batch import StepBatch
from divisi.model.config import ModelConfig
from divisi.model.dispatcher import Dispatcher, InProcess
from divisi.model.experts import ExpertBank
from divisi.model.inference import in_inference_mode
from divisi.model.layers.block import Block
from divisi.model.layers.head import logits
from divisi.model.layers.passes import WholePasses
from divisi.model.layers.rotary import Rotary
from divisi.model.layers.turns import in_turns
from divisi.model.mtp import Drafted, MtpLayer
from divisi.model.state import Pairs, StateStore
from divisi.model.stopwatch import Stopwatch
from divisi.model.weights import Weights


class ModelRunner:
    """Holds the attention side's weights and memory; the routed experts are behind the dispatcher of each step.

    Activations are fp32 on a CPU, whatever the weights' dtype, and in the weights' dtype on a GPU.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        store: StateStore,
        kernels: Kernels,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.store = store
        self.stopwatch = stopwatch or Stopwatch()
        self.kernels = kernels
        self._config, self._weights = config, weights
        device = weights.embed_VD.device
        self._activation_dtype = torch.float32 if device.type == "cpu" else weights.embed_VD.dtype
        self._rotary = Rotary(config, min(config.max_position_embeddings, store.num_pages * store.page_size), device)
        self._blocks = [Block(config, kernels, layer, index, store) for index, layer in enumerate(weights.layers)]
        self._draft_passes = 0
        """Of the step under way, before the pass under way."""
        self._mtp: MtpLayer | None = None
        if weights.mtp is not None:
            self._mtp = MtpLayer(config, weights, weights.mtp, store, kernels, self._activation_dtype)

        self._bank: ExpertBank | None = None
        self._whole: WholePasses | None = None
        """Over the bank, the last one that a pass had."""

    @in_inference_mode
    def forward(self, batch: StepBatch, dispatcher: Dispatcher) -> Tensor:
        """Return ``logits_RV`` (fp32). Nothing that the pass writes counts until the caller commits the step.

        Raises what the dispatcher raises when the step cannot be finished; the same batch may then be run again.
        """
        self.kernels.memory.begin("full", batch.token_ids_T.device, decoding=batch.prefill is None)
        if (whole := self._whole_passes(batch, dispatcher)) is not None:
            return whole.full(batch, self.stopwatch)
        return self._logits(in_turns([self._layers(batch, dispatcher)]))

    @in_inference_mode
    def draw(self, batch: StepBatch, dispatcher: Dispatcher, draws: Draws) -> list[int] | None:
        """As `forward`, with the token after each row in the same call; None where that needs logits."""
        whole = self._whole_passes(batch, dispatcher)
        return None if whole is None else whole.draw(batch, draws, self.stopwatch)

    @in_inference_mode
    def forward_in_turns(self, batches: Sequence[StepBatch], dispatcher: Dispatcher) -> Tensor:
        """As `forward`, of micro-batches: while the rows of one are with the experts, the next one is computed here.

        The dispatcher gets a layer's rows micro-batch by micro-batch. The same bits as of one batch of all rows, as far
        as these do not depend on their number.
        """
        self.kernels.memory.begin("full", batches[0].token_ids_T.device, decoding=False)  # several are under way
        return self._logits(in_turns([self._layers(batch, dispatcher) for batch in batches]))

    def _layers(self, batch: StepBatch, dispatcher: Dispatcher) -> Generator[None, None, Tensor]:
        """All layers and the final norm: h of the rows whose logits are wanted. Stops while rows are with experts."""
        kernels = self.kernels
        residual_TD = kernels.embed(self._weights.embed_VD, batch.token_ids_T).to(self._activation_dtype)
        cos_sin_TR = self._cos_sin(batch.positions_T)
        self.stopwatch.lap("other")
        update: Update | None = None
        for index, block in enumerate(self._blocks):
            kernels.memory.layer(index)
            mixed_TD = block.mix(residual_TD, update, cos_sin_TR, batch)
            self.stopwatch.lap("mixer")
            answer = block.feed(residual_TD, mixed_TD, batch, dispatcher, self.stopwatch)
            yield
            update = answer()
        assert update is not None, "a model has at least one layer"
        kernels.memory.after_layers()
        every = batch.logit_rows_R.shape[0] == batch.num_tokens
        if self._mtp is None and not every:  # h of the other rows is nobody's
            residual_TD, update = residual_TD[batch.logit_rows_R], update[batch.logit_rows_R]
            every = True
        h_TD = kernels.mixture.add_norm(residual_TD, update, self._weights.final_scale_D, self._config.rms_norm_eps)
        if self._mtp is not None:
            self._mtp.record(h_TD, batch, cos_sin_TR)
            self.stopwatch.lap("draft")
        return h_TD if every else h_TD[batch.logit_rows_R]

    def _logits(self, parts_RD: Sequence[Tensor]) -> Tensor:
        h_RD = parts_RD[0] if len(parts_RD) == 1 else torch.cat(list(parts_RD))
        logits_RV = logits(self.kernels, h_RD, self._weights.head_VD)
        self.stopwatch.lap("other")
        return logits_RV

    @in_inference_mode
    def draft(self, batch: StepBatch, dispatcher: Dispatcher, hidden_SD: Tensor | None) -> Drafted:
        """One pass over the MTP layer, of decoding sequences of one row each; see `MtpLayer.draft`."""
        assert self._mtp is not None, "only a model with an MTP layer drafts"
        self._draft_passes = 0 if hidden_SD is None else self._draft_passes + 1
        kind: PassKind = "odd draft" if self._draft_passes % 2 else "even draft"
        self.kernels.memory.begin(kind, batch.token_ids_T.device, decoding=True)
        if (whole := self._whole_passes(batch, dispatcher)) is not None:
            return whole.draft(batch, hidden_SD, self.stopwatch)
        return self._mtp.draft(batch, self._cos_sin(batch.positions_T), hidden_SD, dispatcher, self.stopwatch)

    def drafts_at_once(self, rows: int, dispatcher: Dispatcher) -> bool:
        """Whether `draft_all` takes draft passes of at most so many rows."""
        whole = self._passes_in_process(dispatcher)
        return whole is not None and whole.takes_rows(rows)

    @in_inference_mode
    def draft_all(
        self, batch: StepBatch, counts: tuple[int, ...], dispatcher: Dispatcher, draws: Draws
    ) -> AllDrafted:
        """All draft passes of a step in one call, where `drafts_at_once`.

        `batch` has the first one's rows, with all pages of its sequences; of these the first `counts` draft in each.
        """
        whole = self._passes_in_process(dispatcher)
        assert whole is not None, "the experts are in this process"
        return whole.draft_all(batch, counts, draws, self.stopwatch)

    @in_inference_mode
    def prepare(self, flushes: Pairs, slot_copies: Pairs, page_copies: Pairs) -> None:
        """Carry out what a step wants done with memory before its passes; doing it again changes nothing.

        Rings are replayed up to a position, (slot, position), then slots and pages copied, (from, to).
        """
        if flushes:
            self.store.flush(self.kernels, flushes)
        if slot_copies:
            self.store.copy_slots(slot_copies)
        if page_copies:
            self.store.copy_pages(page_copies)

    @property
    def most_equal_rows(self) -> int:
        """Up to so many decoding rows in a pass, each has the bits that it has in company of any other number."""
        return 0 if self.kernels.fused is None else self.kernels.fused.most_rows(self._weights.head_VD)

    def timed_apart(self) -> ModelRunner:
        """The same weights and memory, with a stopwatch of its own."""
        return ModelRunner(self._config, self._weights, self.store, self.kernels)

    def _whole_passes(self, batch: StepBatch, dispatcher: Dispatcher) -> WholePasses | None:
        """What computes such a pass in one call; None where it goes layer by layer."""
        whole = self._passes_in_process(dispatcher)
        return whole if whole is not None and whole.takes(batch) else None

    def _passes_in_process(self, dispatcher: Dispatcher) -> WholePasses | None:
        """Over the dispatcher's experts, where it has all of them."""
        fused = self.kernels.fused
        if fused is None or not isinstance(dispatcher, InProcess) or (bank := dispatcher.bank) is None:
            return None
        if bank is not self._bank:
            self._bank = bank
            self._whole = WholePasses.of(
                fused, self._config, self._weights, self._rotary, self._blocks, self._mtp, bank
            )
        return self._whole

    def _cos_sin(self, positions_T: Tensor) -> Tensor:
        shape = positions_T.shape[0], self._config.rotary_dim
        return self._rotary.cos_sin(positions_T, self.kernels.memory.empty(shape, torch.float32, positions_T.device))
