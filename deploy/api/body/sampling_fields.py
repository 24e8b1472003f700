"""The fields of a request body that say how tokens are chosen, each with the bounds that keep it cheap."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from divisi.deploy.api.body.base import Body

MAX_INT = 2**31 - 1
MAX_BIASES = 1024
MAX_ALLOWED_IDS = 2**18
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256
MAX_BIAS = 100.0

TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
BiasKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]


class SamplingFields(Body):
    """What both generating endpoints take. A field that is left out or null has the model's own default."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=MAX_INT)
    """0 and -1 are off."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Least probability of a token, relative to the likeliest one's."""
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    logit_bias: (
        Annotated[dict[BiasKey, Bias], Field(max_length=MAX_BIASES, json_schema_extra={"additionalProperties": False})]
        | None
    ) = None
    """Added to the logits of token ids, which are keys as text."""
    allowed_token_ids: (
        Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED_IDS, fail_fast=True)] | None
    ) = None
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS, fail_fast=True)] | None = None
    min_tokens: int | None = Field(default=None, ge=0, le=MAX_INT)
    """The answer cannot stop before so many tokens."""

    @field_validator("logit_bias")
    @classmethod
    def _check_keys(cls, biases: dict[str, float] | None) -> dict[str, float] | None:
        if biases is not None and len({int(key) for key in biases}) < len(biases):
            raise ValueError("a token id is given twice, in two spellings; give each once")
        return biases
