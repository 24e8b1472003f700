"""What a worker refuses in a request whatever else it serves, since it would fail in the middle of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from divisi.cluster.errors import RequestRejected
from divisi.cluster.request import SAMPLING_LIMITS, Request, Sampling


def check_request(request: Request, vocab_size: int) -> None:
    """Raise RequestRejected, naming the field, for numbers out of range and ids outside the vocabulary."""
    sampling = request.sampling
    if request.max_tokens < 0:
        raise RequestRejected(f"max_tokens is {request.max_tokens}: it must not be negative")
    if not request.prompt:
        raise RequestRejected("the prompt is empty: give at least one token")
    if sampling.allowed_token_ids is not None and not sampling.allowed_token_ids:
        raise RequestRejected("allowed_token_ids is empty: name at least one token id, or leave it out")
    if not all(sampling.bad_words):
        raise RequestRejected("bad_words has an empty entry: remove it")
    for name, ids in _token_ids(request):
        outside = [token for token in ids if not 0 <= token < vocab_size]
        if outside:
            raise RequestRejected(f"{name} has token ids outside 0..{vocab_size - 1}, such as {outside[0]}")
    for name, count in (("top_k", sampling.top_k), ("min_tokens", request.min_tokens)):
        if not 0 <= count < 2**31:
            raise RequestRejected(f"{name} is {count}: it must be a whole number from 0 to {2**31 - 1}")
    for name, value in _numbers(sampling):
        least, most = SAMPLING_LIMITS[name.partition(" ")[0]]
        if not least <= value <= most:
            raise RequestRejected(f"{name} is {value}: it must be a finite number from {least:g} to {most:g}")


def _numbers(sampling: Sampling) -> Iterator[tuple[str, float]]:
    yield from ((name, getattr(sampling, name)) for name in SAMPLING_LIMITS if name != "logit_bias")
    yield from ((f"logit_bias of {token}", bias) for token, bias in sampling.logit_bias)


def _token_ids(request: Request) -> Iterator[tuple[str, Iterable[int]]]:
    sampling = request.sampling
    yield "the prompt", (min(request.prompt), max(request.prompt))
    if answered := request.answered:
        yield "answered", (min(answered), max(answered))
    if allowed := sampling.allowed_token_ids:
        yield "allowed_token_ids", (min(allowed), max(allowed))
    yield "logit_bias", (token for token, _ in sampling.logit_bias)
    yield "bad_words", (token for word in sampling.bad_words for token in word)
    if request.min_tokens:
        yield "stop_token_ids", request.stop_ids | request.content_stop_ids
