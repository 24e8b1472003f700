"""The settings of the gang: its processes, and how many there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from divisi.cluster.gang.membership.layout.wait_policy import WaitRule
from divisi.cluster.seats import GangShape
from divisi.deploy.settings.groups import Group
from divisi.deploy.settings.values import HerePath
from divisi.kernels.choice import checked_choice


class TlsSettings(Group):
    """Files in PEM, at the same path on every node, by which the processes of the gang encrypt what crosses nodes."""

    certificate: HerePath
    """The node's own."""
    key: HerePath
    ca: HerePath
    """The certificates of those who sign the nodes'."""


class AutoscalingSettings(Group):
    """How many attention workers there are, by what waits for them. Ingress replicas stay as many as they are."""

    min: int = Field(default=1, le=64, json_schema_extra={"minimum": 1})
    """The gang begins with so many."""
    max: int = Field(ge=1, le=64)
    queued_tokens_per_worker: int | None = Field(default=None, ge=1)
    """For so many tokens one worker is wanted: those of prompts that are still to be computed, 64 for each unfinished
    answer, and what requests bring that were refused for want of room (429), until they may come again. None: 48 for
    each sequence that a worker runs at once, so that one more is wanted before all are full."""
    upscale_delay_s: float = Field(default=3.0, ge=0)
    """More are started once they were wanted for so long."""
    downscale_delay_s: float = Field(default=120.0, ge=0)
    """One is taken away once it was not wanted for so long."""

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.min < 1:
            raise ValueError(
                f"min={self.min} would leave nobody who takes requests, and none could wait for the first worker to "
                "load; give 1 or more"
            )
        if self.min > self.max:
            raise ValueError(f"min={self.min} is more than max={self.max}; lower it, or raise max")
        return self


class ExpertAutoscalingSettings(Group):
    """How many expert shards there are, by the share of their time in steps that attention workers wait for experts."""

    min: int = Field(default=1, ge=1, le=512)
    """The gang begins with so many where `expert_shards` is not given, and has so many once it idles; each shard then
    holds as large a share of the experts."""
    max: int = Field(ge=1, le=512)
    wait_share_high: float = Field(default=0.5, gt=0, lt=1)
    """One more shard is started once the share was above this for all of `upscale_delay_s`."""
    wait_share_low: float = Field(default=0.25, ge=0, lt=1)
    """One is ended once the share was below this for all of `downscale_delay_s`, and is to be below `wait_share_high`
    without it, too."""
    upscale_delay_s: float = Field(default=30.0, ge=0)
    downscale_delay_s: float = Field(default=600.0, ge=0)

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is more than max={self.max}; lower it, or raise max")
        if self.wait_share_low >= self.wait_share_high:
            raise ValueError(
                f"wait_share_low={self.wait_share_low:g} is not less than wait_share_high={self.wait_share_high:g}, so "
                "that shards would come and go for ever; lower it, or raise wait_share_high"
            )
        return self


class GangSettings(Group):
    """The processes that run one copy of the model."""

    topology: Literal["local", "split", "colocated"] = "local"
    """`local`: one process does everything. `split`: attention workers and expert shards apart. `colocated`: each
    attention worker holds a shard of the experts, too."""
    attention_workers: int = Field(default=1, ge=1, le=64)
    min_attention_workers: int | None = Field(default=None, ge=1, le=64)
    """With so many the gang serves, once all experts are there. None: one; a colocated gang always waits for all."""
    autoscaling: AutoscalingSettings | None = None
    """None: there are always `attention_workers`, which is `autoscaling.max` otherwise."""
    expert_shards: int = Field(default=0, ge=0, le=512)
    """Processes that hold nothing but experts; a colocated gang has none."""
    expert_autoscaling: ExpertAutoscalingSettings | None = None
    """None: there are `expert_shards`, or as many as somebody asks for (`divisi scale`)."""
    expert_copies: int = Field(default=0, ge=0, le=8)
    """By so many other expert shards each virtual shard is held, on other nodes where there are several, so that what a
    shard served that dies is served by those in the next epoch, without waiting for another process. Each copy takes as
    much memory as all experts do, shared among the shards."""
    rebalance: bool = False
    """Whether virtual shards are moved from the busiest expert shard to the idlest, one at a time, where rows are
    shared unevenly for long. A shard may then hold half as many again as its even share. Off by default: unevenness is
    mostly chance, and what a shard serves in several pieces takes a reply for each."""
    virtual_shards: int = Field(default=32, ge=1, le=512)
    """Into how many the experts are cut for good: tokens are the same bit for bit for any number of shards up to it."""
    dispatch: Literal["auto", "broadcast", "all_to_all"] = "auto"
    """How rows reach expert shards of their own: all to each of them, or each to those that it visits; auto: whichever
    a model of their cost prefers. The tokens are the same."""
    micro_batches: Literal["auto", "never", "always"] = "auto"
    """Which decoding steps go through the layers in two halves, one in attention while expert shards compute the other;
    auto: where a model of their cost expects a gain and tokens stay the same to the bit. On CPUs only."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads_per_process: int | None = Field(default=None, ge=1)
    """CPU threads of each rank; None: the cores of the machine that it runs on, shared among the ranks there."""
    pin_cores: bool = False
    """Each rank keeps to cores of its own, ingress replicas and HAProxy to the others; only in a Ray that is started
    for the server, on whose one machine the cores are known."""
    kernels: Annotated[str, AfterValidator(checked_choice)] = "auto"
    """Which implementation does what: `auto`, `reference`, `native` (CPU; or one of its builds `amx`, `avx512-bf16`,
    `avx512`, `avx2`) or `triton` (GPU), and exceptions by operation, as in `auto,route=reference`."""
    deterministic: bool = False
    """A request's logits do not depend on what is served beside it, to the bit; on CPUs only. See kernels/README.md."""
    step_deadline_s: float = Field(default=30.0, gt=0)
    """Longest wait inside one step before it is aborted and replayed in a new epoch."""
    suspect_after_s: float | None = Field(default=None, gt=0)
    """A rank that is silent for so long is left out of the next epoch, until it is heard of again. None: 2 s on CPUs,
    where a busy machine may keep a healthy one silent for some tenths of a second; else 0.5 s."""
    spare_shards: bool | None = None
    """On each node with expert shards, and on one more, another process with everything loaded but weights, which takes
    the place of one that dies. Until then it holds no GPU's memory, but a GPU, as Ray lends them. None: on CPUs."""
    secret_file: HerePath | None = None
    """By it the processes of the gang know each other; the same on every node. None: one is drawn, and Ray keeps it."""
    tls: TlsSettings | None = None
    """None: requests and tokens cross nodes authenticated, but not encrypted."""

    @model_validator(mode="before")
    @classmethod
    def _infer_topology(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        values = dict(data)
        if "topology" not in values and values.get("expert_shards") not in (None, 0, "0"):
            values["topology"] = "split"
        shards = values.get("expert_autoscaling")
        least = shards.get("min", 1) if isinstance(shards, Mapping) else None
        if least is not None:
            values.setdefault("topology", "split")
        if values.get("topology") == "split":
            values.setdefault("expert_shards", least or 1)
        if isinstance(scaling := values.get("autoscaling"), Mapping) and "max" in scaling:
            values.setdefault("attention_workers", scaling["max"])
        return values

    @model_validator(mode="after")
    def _check_autoscaling(self) -> Self:
        if (scaling := self.autoscaling) is None:
            return self
        if self.topology != "split":
            reason = {
                "colocated": "has a share of the experts in each attention worker, so that none can be taken away",
                "local": "is one process",
            }[self.topology]
            raise ValueError(f"autoscaling: topology {self.topology!r} {reason}; use topology 'split', or leave it out")
        if self.attention_workers != scaling.max:
            raise ValueError(
                f"attention_workers={self.attention_workers} contradicts autoscaling.max={scaling.max}; leave it out"
            )
        if self.least_workers > scaling.min:
            raise ValueError(
                f"min_attention_workers={self.least_workers} is more than autoscaling.min={scaling.min}, with which "
                "the gang would not serve; lower it, or raise autoscaling.min"
            )
        return self

    @model_validator(mode="after")
    def _check_expert_autoscaling(self) -> Self:
        if (scaling := self.expert_autoscaling) is None:
            return self
        if self.topology != "split":
            raise ValueError(
                f"expert_autoscaling: topology {self.topology!r} has no expert shards of their own; use topology "
                "'split', or leave it out"
            )
        if not scaling.min <= self.expert_shards <= scaling.max:
            raise ValueError(
                f"expert_shards={self.expert_shards} is not from expert_autoscaling.min={scaling.min} to "
                f"max={scaling.max}; leave it out to begin with min, or give one of these"
            )
        if scaling.max > self.virtual_shards:
            raise ValueError(
                f"expert_autoscaling.max={scaling.max} is more than virtual_shards={self.virtual_shards}, of which "
                "each shard has one at least; lower it, or raise virtual_shards, which changes tokens in the last bits"
            )
        if self.expert_copies and self.expert_copies >= scaling.min:
            raise ValueError(
                f"expert_copies={self.expert_copies} needs as many expert shards and one more, and "
                f"expert_autoscaling.min={scaling.min}; lower it, or raise min"
            )
        if self.pin_cores:
            raise ValueError(
                "pin_cores gives cores to the shards that there are at first, and expert_autoscaling has others come; "
                "leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _check_topology(self) -> Self:
        if self.topology == "split" and self.expert_shards < 1:
            raise ValueError("topology 'split' needs expert_shards >= 1; give it, or use topology 'local'")
        if self.topology == "local" and self.expert_shards > 0:
            raise ValueError(f"topology 'local' has no expert shards, got {self.expert_shards}; use topology 'split'")
        if self.topology == "local" and self.attention_workers > 1:
            raise ValueError(
                f"topology 'local' is one process, got attention_workers={self.attention_workers}; "
                "use topology 'colocated', or 'split' with expert shards"
            )
        if self.expert_copies and self.expert_copies >= self.expert_shards:
            raise ValueError(
                f"expert_copies={self.expert_copies} needs as many expert shards of their own, and one more, got "
                f"expert_shards={self.expert_shards} with topology {self.topology!r}; lower it, or give more shards"
            )
        if self.rebalance and self.most_shards < 2:  # with one of several at times there is nothing to move then
            raise ValueError(
                f"rebalance needs two expert shards of their own, or more, got {self.most_shards} at most "
                f"with topology {self.topology!r}; leave it out, or give more shards"
            )
        if self.min_attention_workers is not None and self.least_workers != self.min_attention_workers:
            raise ValueError(
                f"min_attention_workers={self.min_attention_workers} doesn't go with topology {self.topology!r} and "
                f"attention_workers={self.attention_workers}: give at most that, and exactly that to a colocated gang"
            )
        if self.topology == "colocated" and self.expert_shards > 0:
            raise ValueError(
                f"topology 'colocated' has a shard of the experts in each of the attention_workers, got "
                f"expert_shards={self.expert_shards} besides; leave it out, or use topology 'split'"
            )
        return self

    @property
    def first_workers(self) -> int:
        """With how many attention workers the gang begins."""
        return self.attention_workers if self.autoscaling is None else self.autoscaling.min

    @property
    def most_ranks(self) -> int:
        """How many processes the gang has at most, by policy."""
        return self.shape.size + self.most_shards - self.expert_shards

    @property
    def most_shards(self) -> int:
        """How many expert shards of their own there are at most, by policy."""
        return self.expert_shards if self.expert_autoscaling is None else self.expert_autoscaling.max

    @property
    def wait_rule(self) -> WaitRule | None:
        """By what there are more expert shards or fewer; None: as many as are asked for."""
        if (scaling := self.expert_autoscaling) is None:
            return None
        return WaitRule(
            scaling.min, scaling.max, scaling.wait_share_high, scaling.wait_share_low, scaling.upscale_delay_s,
            scaling.downscale_delay_s,
        )  # fmt: skip

    @property
    def least_workers(self) -> int:
        """With how many attention workers the gang serves."""
        if self.topology == "colocated":
            return self.attention_workers
        return min(self.min_attention_workers or 1, self.attention_workers)

    @property
    def shape(self) -> GangShape:
        """The gang's seats."""
        if self.topology == "colocated":
            return GangShape(self.attention_workers, self.attention_workers, colocated=True)
        return GangShape(self.attention_workers, self.expert_shards)
