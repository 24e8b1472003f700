"""The groups of settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, IPvAnyNetwork, model_validator

from divisi.cluster.nodes import NodeChoice, Placement
from divisi.cluster.seats import GangShape
from divisi.deploy.setting_values import (
    COMMAS,
    Bytes,
    FilePath,
    HerePath,
    ModelName,
    NodeLabel,
    Origin,
    OtlpUrl,
    as_list,
)
from divisi.kernels.choice import checked_choice


class Group(BaseModel):
    """What all groups share: immutable, unknown keys rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelSettings(Group):
    """The checkpoint and how its numbers are held."""

    model_dir: FilePath
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    """Weights and KV; `auto` takes the checkpoint's own, on a CPU bfloat16 in place of float16."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Longest prompt plus answer in tokens; None takes the model's positions, or what the KV pages hold."""


class TlsSettings(Group):
    """Files in PEM, at the same path on every node, by which the processes of the gang encrypt what crosses nodes."""

    certificate: HerePath
    """The node's own."""
    key: HerePath
    ca: HerePath
    """The certificates of those who sign the nodes'."""


class AutoscalingSettings(Group):
    """How many attention workers there are, by what waits for them. Expert shards and ingress replicas stay as many as
    they are."""

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
    """Which implementation does what: `auto`, `reference`, `native` (CPU; or one of its builds `avx512-bf16`, `avx512`,
    `avx2`) or `triton` (GPU), and exceptions by operation, as in `auto,route=reference`."""
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
        if values.get("topology") == "split":
            values.setdefault("expert_shards", 1)
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
        if self.rebalance and self.expert_shards < 2:
            raise ValueError(
                f"rebalance needs two expert shards of their own, or more, got expert_shards={self.expert_shards} "
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


class NodeSettings(Group):
    """Which nodes of a Ray cluster take the processes of a role; those that have all that is named here."""

    labels: dict[NodeLabel, NodeLabel] = {}
    """As `ray start --labels` gives them, or a KubeRay group's `labels`."""
    resources: dict[NodeLabel, Annotated[float, Field(gt=0)]] = {}
    """What each process takes of a node's own resources, which `ray start --resources` gives it."""

    @model_validator(mode="after")
    def _check_resources(self) -> Self:
        if taken := sorted({"CPU", "GPU", "memory", "object_store_memory"} & set(self.resources)):
            raise ValueError(f"{taken[0]} is what Ray counts by itself; name a resource of the nodes' own, or labels")
        return self

    @property
    def choice(self) -> NodeChoice:
        """As the gang has it."""
        return NodeChoice(self.labels, self.resources)


class PlacementSettings(Group):
    """Where on a cluster the roles go, each on nodes of its own. None: wherever there is room."""

    ingress: NodeSettings | None = None
    """The ingress replicas, which then count as a CPU each; with `labels`, also the coordinator."""
    attention: NodeSettings | None = None
    """The attention workers, with the experts of a colocated gang."""
    experts: NodeSettings | None = None
    """Processes that hold nothing but experts."""

    @property
    def choices(self) -> Placement:
        """As the gang has them."""
        roles = (self.ingress, self.attention, self.experts)
        return Placement(*(NodeChoice() if role is None else role.choice for role in roles))


class CacheSettings(Group):
    """Memory for sequences, per attention worker, and the size of a step."""

    kv_memory: Bytes | None = Field(default=None, ge=2**16)
    """At most so many bytes for KV pages, besides state slots (see `divisi inspect`). None: what `divisi serve` finds
    that a GPU of its machine has left, and 1 GiB elsewhere."""
    gpu_memory_fraction: float = Field(default=0.9, gt=0, le=1)
    """Of a GPU's memory for weights, state slots and KV pages; the rest is for a step's intermediate values."""
    page_size: int = Field(default=16, ge=1, le=4096)
    """Tokens per KV page."""
    max_seqs: int = Field(default=32, ge=1, le=4096)
    """Sequences that run at once: so many state slots, and spares for their prefill."""
    max_step_tokens: int = Field(default=512, ge=1)
    """Token budget of one step of the gang: decodes first, the rest prefill chunks."""

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.max_step_tokens < self.max_seqs:
            raise ValueError(
                f"max_step_tokens={self.max_step_tokens} cannot decode max_seqs={self.max_seqs} sequences in one step; "
                f"raise max_step_tokens to {self.max_seqs} or more, or lower max_seqs"
            )
        return self

    @property
    def kv_bytes(self) -> int:
        """Bytes for KV pages."""
        return 2**30 if self.kv_memory is None else self.kv_memory


class MtpSettings(Group):
    """Multi-token prediction, where the checkpoint has the layer for it."""

    max_draft_tokens: int = Field(default=3, ge=0, le=8)
    """Most tokens drafted for an answer in a step; requests can ask for less. 0 turns it off and saves its memory."""
    adaptive: bool = True
    """Whether fewer are drafted where that makes more tokens per second; else always as many as they may be."""


class HttpSettings(Group):
    """Where the API listens and what it calls the model."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    served_model_name: Annotated[tuple[ModelName, ...], BeforeValidator(as_list), COMMAS] = ()
    """Names in /v1/models and in requests; replies have the first. None takes the model directory's name."""
    allowed_origins: Annotated[tuple[Origin, ...], BeforeValidator(as_list), COMMAS] = ()
    """Web pages whose scripts may call the API, as `https://chat.example.org`; `*` for all. None by default."""
    trusted_proxies: Annotated[tuple[IPvAnyNetwork, ...], BeforeValidator(as_list), COMMAS] = ()
    """Addresses or networks (10.0.0.0/8) of the proxies in front, Ray Serve's own HAProxy among them, whose
    X-Forwarded-For and -Proto count. With any, the log names each request's client; without, they count for nothing."""
    ingress_replicas: int = Field(default=1, ge=1, le=256)
    control_tokens_in_messages: bool = False
    """Whether `<|im_end|>` and the like in messages and tools become control tokens, as a forged turn would want."""
    headers_after_s: float = Field(default=2.0, gt=0)
    """How long a stream's status waits for the first event; an error until then keeps its own status."""
    keepalive_s: float = Field(default=10.0, gt=0)
    """Longest silence of a stream: then an SSE comment keeps the connection alive, before the first token too."""
    haproxy: bool = True
    """Whether HAProxy is in front of them, in a Ray that is started for the server; else Ray Serve's Python proxy."""


class LimitSettings(Group):
    """What one client, or all of them together, may ask of the service."""

    max_queued_requests: int | None = Field(default=None, ge=1)
    """Answers admitted and unfinished over the whole gang; above it 429 with Retry-After.

    None is what runs at once, `cache.max_seqs` of each worker; what is let in beyond that could only wait.
    """
    max_queued_tokens: int | None = Field(default=None, ge=1)
    """Prompt tokens admitted and not yet computed over the whole gang; above it 429. None is 32 full steps' tokens."""
    request_timeout_s: float | None = Field(default=3600.0, gt=0)
    """Longest time for an answer from its admission; then it ends with an error: 504, or a stream's last event."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt; None is what the context holds."""
    max_body_bytes: Bytes = Field(default=16 * 2**20, ge=1024)
    max_prompts: int = Field(default=128, ge=1)
    """Prompts in one /v1/completions body."""
    max_n: int = Field(default=16, ge=1, le=128)
    """Choices that one request may ask for of a prompt (n, best_of)."""
    max_grammar_bytes: Bytes = Field(default=65536, ge=64)
    """Longest JSON schema, expression or grammar that an answer may have to follow."""
    max_logprobs: int = Field(default=20, ge=0, le=1000)
    retry_after_s: int = Field(default=1, ge=1)
    shutdown_grace_s: float = Field(default=10.0, ge=0)
    """How long running answers may go on after a stop signal; then they end with an error."""


class AuthSettings(Group):
    """Who may call."""

    api_keys_file: HerePath | None = None
    """Keys, one per line or YAML, see `divisi.deploy.limits.key_file`; read again when it changes. None: everybody."""
    metrics_open: bool = True
    """Whether /metrics can be read without a key. The health paths always can."""


class TelemetrySettings(Group):
    """Metrics and traces. Nothing that a client writes is in a metric."""

    traces_endpoint: OtlpUrl | None = None
    """Where spans go by OTLP over HTTP, as in `http://127.0.0.1:4318`; None: no spans are made."""
    metrics_endpoint: OtlpUrl | None = None
    """Where metrics go by OTLP over HTTP, besides being there to be scraped; None: nowhere."""
    scraped: bool = True
    """Whether each process opens a port for Prometheus on its node's address; `/metrics/targets` lists them."""
    scrape_from_port: int = Field(default=0, ge=0, le=65_472)
    """The first of 64 ports, of which each process takes one that is free on its node, for firewalls; 0: any port."""
    trace_ratio: float = Field(default=1.0, ge=0, le=1)
    """Of the requests whose client has not decided by `traceparent`, so many are traced."""
    step_ratio: float = Field(default=0.01, ge=0, le=1)
    """Of the steps, so many are traced."""
    content: bool = False
    """Whether spans hold messages and answers."""
    vllm_names: bool = False
    """Whether scrapes have vLLM's names too, for dashboards made for it."""


class LogSettings(Group):
    """The log of the ingress and the attention workers. No line holds a prompt, an answer or a key."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """`info` has a line for every request."""
    format: Literal["json", "text"] = "json"
    file: HerePath | None = None
    """All processes append to it, each on its own node. None is standard error, which Ray keeps with its session's
    logs; `divisi serve` then takes a file in the user's state folder, see `divisi.deploy.logs.with_default_file`."""
    max_file_bytes: Bytes | None = Field(default=None, ge=2**12)
    """A file that has grown to so many bytes becomes FILE.1, in place of a former one; None: never."""
