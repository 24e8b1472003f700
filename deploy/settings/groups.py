"""The groups of settings, but for the gang's."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, IPvAnyNetwork, model_validator

from divisi.cluster.nodes import NodeChoice, Placement
from divisi.deploy.settings.values import (
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
    """The log of the ingress, the attention workers and the gang's owner. No line has a prompt, an answer or a key."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """`info` has a line for every request."""
    format: Literal["json", "text"] = "json"
    file: HerePath | None = None
    """All processes append to it, each on its own node. None is standard error, which Ray keeps with its session's
    logs; `divisi serve` then takes a file in the user's state folder, see `divisi.deploy.logs.with_default_file`."""
    max_file_bytes: Bytes | None = Field(default=None, ge=2**12)
    """A file that has grown to so many bytes becomes FILE.1, in place of a former one; None: never."""
