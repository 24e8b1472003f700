"""How an attention worker's memory divides into KV pages and state slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from divisi.cluster.engine.memory.sequence_memory import SLOTS_TO_PREFILL
from divisi.model.config import ModelConfig
from divisi.model.state import StateStore


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Counts and bytes of the two pools, which are sized independently."""

    num_pages: int
    page_size: int
    """Tokens per page."""
    num_slots: int
    bytes_per_page: int
    """Over all layers with attention."""
    bytes_per_slot: int
    """Over all linear layers, replay rings included, and what the MTP layer keeps."""

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        *,
        kv_memory: int,
        page_size: int,
        max_seqs: int,
        max_model_len: int,
        dtype: torch.dtype,
        max_rows: int = 1,
    ) -> Self:
        """Divide `kv_memory` bytes into pages; give each of `max_seqs` sequences a slot, and spares for prefills.

        No more pages than `max_seqs` sequences of `max_model_len` tokens can use. A quarter more slots than
        sequences: more prompts than that are hardly ever in the middle of their prefill at once, since few share
        one step's token budget.
        """
        per_page = StateStore.bytes_per_page(config, page_size, dtype)
        num_slots = max(max_seqs + max_seqs // 4, max_seqs + 1, SLOTS_TO_PREFILL)
        useful = max_seqs * -(-max_model_len // page_size)
        # a model without full attention keeps no KV, and its page tables cost nothing
        num_pages = min(kv_memory // per_page, useful) if per_page else useful
        return cls(num_pages, page_size, num_slots, per_page, StateStore.bytes_per_slot(config, max_rows))

    @property
    def num_tokens(self) -> int:
        """Tokens that the pages hold, over all sequences."""
        return self.num_pages * self.page_size

    @property
    def kv_bytes(self) -> int:
        """Bytes of all pages."""
        return self.num_pages * self.bytes_per_page

    @property
    def state_bytes(self) -> int:
        """Bytes of all state slots."""
        return self.num_slots * self.bytes_per_slot
