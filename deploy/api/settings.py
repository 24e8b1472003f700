"""What the HTTP API has to know; the Serve application fills it from the deployment's settings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, IPvAnyNetwork

from divisi.model.text.grammar.compiler import GrammarLimits


class ApiSettings(BaseModel):
    """Name, sizes and limits of one served model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    served_model_name: str = Field(min_length=1)
    model_aliases: tuple[str, ...] = ()
    """Other names under which requests may ask for it; replies have the one above."""
    max_model_len: int = Field(ge=1)
    """Longest prompt plus answer, in tokens."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt; None is what the context holds."""
    vocab_size: int | None = Field(default=None, ge=1)
    """Rows of the embedding, the bound of token ids in prompts; None takes the tokenizer's."""
    max_body_bytes: int = Field(default=16 * 2**20, ge=1024)
    max_prompts: int = Field(default=128, ge=1)
    """Prompts in one /v1/completions body."""
    max_n: int = Field(default=16, ge=1)
    """Choices of one prompt."""
    max_logprobs: int = Field(default=20, ge=0)
    grammar_limits: GrammarLimits = GrammarLimits()
    model_dir: str | None = None
    """Where the tokenizer lies, to try grammars with; None only reads them."""
    system_fingerprint: str = "fp_unknown"
    """Changes when what computes the answers does."""
    metadata: dict[str, str | int] = {}
    """What /v1/metadata tells of the model."""
    max_draft_tokens: int = Field(default=0, ge=0)
    """What the gang drafts for an answer in a step; 0: nothing."""
    retry_after_s: int = Field(default=1, ge=1)
    """`Retry-After` of a 503; a 429 carries what the engine says."""
    status_timeout_s: float = Field(default=2.0, gt=0)
    """Longest wait for the engine in /health and /metrics."""
    names_requests: bool = True
    """Whether replies carry `X-Request-Id`; Serve's proxy adds it itself."""
    control_tokens_in_messages: bool = False
    """Whether the letters of an added token become that token in messages and tools, too; otherwise they are text."""
    headers_after_s: float = Field(default=2.0, gt=0)
    """How long a stream's status waits for its first event; an error until then keeps its own status."""
    keepalive_s: float = Field(default=10.0, gt=0)
    """Longest silence of a stream, before a comment is sent."""
    metrics_open: bool = True
    """Whether /metrics can be read without an API key, where keys are asked for at all."""
    allowed_origins: tuple[str, ...] = ()
    """Web pages whose scripts may call, by origin, or `*` for all; none by default."""
    trusted_proxies: tuple[IPvAnyNetwork, ...] = ()
    """Whose word on who the client is counts; without any, the log does not name clients."""

    @property
    def model_names(self) -> tuple[str, ...]:
        """All names of the model, its own first."""
        return (self.served_model_name, *self.model_aliases)
