"""What the HTTP API has to know; the Serve application fills it from the deployment's settings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ApiSettings(BaseModel):
    """Name, sizes and limits of one served model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    served_model_name: str = Field(min_length=1)
    max_model_len: int = Field(ge=1)
    """Longest prompt plus answer, in tokens."""
    vocab_size: int | None = Field(default=None, ge=1)
    """Rows of the embedding, the bound of token ids in prompts; None takes the tokenizer's."""
    max_body_bytes: int = Field(default=16 * 2**20, ge=1024)
    max_prompts: int = Field(default=128, ge=1)
    """Prompts in one /v1/completions body."""
    max_logprobs: int = Field(default=20, ge=0)
    retry_after_s: int = Field(default=1, ge=1)
    """`Retry-After` of a 503; a 429 carries what the engine says."""
    status_timeout_s: float = Field(default=2.0, gt=0)
    """Longest wait for the engine in /health and /metrics."""
