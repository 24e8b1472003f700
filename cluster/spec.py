"""What the processes of a gang are told when they are created. Imports neither Ray nor torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

from divisi.cluster.cores import CorePlan
from divisi.cluster.door import TlsFiles
from divisi.cluster.gang.membership.layout.wait_policy import WaitRule
from divisi.cluster.nodes import Placement
from divisi.cluster.seats import GangShape, Patience
from divisi.cluster.telemetry.spec import TelemetrySpec
from divisi.model.placement import VIRTUAL_SHARDS


@dataclass(frozen=True, slots=True)
class GangSpec:
    """One gang: the checkpoint, its shape and the sizes of its ranks, with nothing left to be found out."""

    name: str
    """Of the gang: the Serve application's, and an id that no other gang has; empty until both are known."""
    model_dir: str
    dtype: Literal["bfloat16", "float32", "float16"]
    device: Literal["cpu", "cuda"]
    threads: int | None
    """CPU threads of each rank; None: the cores of the machine that it runs on, shared among the ranks there."""
    kernels: str
    """Which implementation of each operation; see `select_kernels`."""
    deterministic: bool
    """Whether a row's bits may depend on its sequence only; see `select_kernels`."""
    shape: GangShape
    max_model_len: int
    kv_memory: int
    page_size: int
    max_seqs: int
    max_step_tokens: int
    """Of the whole gang."""
    step_deadline_s: float
    secret_file: str | None = None
    """Holds what the processes of the gang know each other by; None: a secret is drawn, and Ray keeps it."""
    tls: TlsFiles | None = None
    """Encrypts connections between nodes."""
    core_plan: CorePlan | None = None
    """Which cores the ranks keep to, where they are all on one machine and are to keep to any."""
    placement: Placement = field(default_factory=Placement)
    """Which nodes take which of the processes."""
    max_draft_tokens: int = 0
    """Most tokens that the MTP layer drafts for a sequence in a step; 0: its weights are left alone."""
    adaptive_drafts: bool = True
    """Whether fewer are drafted where that makes more tokens per second."""
    telemetry: TelemetrySpec = field(default_factory=TelemetrySpec)
    virtual_shards: int = VIRTUAL_SHARDS
    """Into how many the experts are cut for good, at most one for each: tokens are the same for any number of shards up
    to it."""
    dispatch: Literal["auto", "broadcast", "all_to_all"] = "auto"
    """How rows reach expert shards; auto: by `divisi.cluster.dispatch.planner`."""
    micro_batches: Literal["auto", "never", "always"] = "auto"
    """Which decoding steps are cut in two, so that attention and experts compute at once; auto: as above."""
    min_attention_workers: int | None = None
    """With how many an epoch forms; None: all of the shape's."""
    suspect_after_s: float = 2.0
    """After how much silence a rank is suspected."""
    expert_copies: int = 0
    """By how many expert shards each virtual shard is held besides the one that serves it."""
    rebalance: bool = False
    """Whether virtual shards are moved to other expert shards, where rows are shared unevenly."""
    wait_rule: WaitRule | None = None
    """By what there are more expert shards or fewer; None: as many as are asked for."""
    spare_shards: bool = False
    """Whether each node with expert shards has a process with everything loaded but weights, for one that dies."""

    @property
    def patience(self) -> Patience:
        """Of the ranks with each other."""
        return Patience(self.suspect_after_s, 0.9 * self.step_deadline_s)  # before the others' deadline blames anybody

    @property
    def fingerprint(self) -> str:
        """Equal for processes that were told the same, and may share an epoch."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    @property
    def max_worker_step_tokens(self) -> int:
        """Most tokens that an attention worker brings to a step: its share where there are as few as may be."""
        return self.step_share(self.min_attention_workers or self.shape.attention_workers)

    def step_share(self, workers: int) -> int:
        """The share of a step's token budget that each of so many attention workers plans with."""
        return max(self.max_step_tokens // workers, self.max_seqs)
