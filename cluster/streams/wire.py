"""What an ingress and an attention worker tell each other, as bytes: msgpack, never pickle. Imports no torch.

A message is an array: its kind, a map of extensions, its fields. Extensions that a reader does not know are ignored;
the trace context of a request stands there. An answer is named by a number that its ingress gives it, counted up for
each connection, so that a connection has no words for the answers of another.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgpack
from pydantic import TypeAdapter, ValidationError

from divisi.cluster.door import MAX_FRAME
from divisi.cluster.errors import DivisiError, GangNotReady, RequestRejected, WorkerLeft, WorkerLost
from divisi.cluster.request import Request, TokenEvent, TokenLogprob

_SUBMIT, _CANCEL, _EVENTS, _REFUSED, _REPORT = range(1, 6)
_NO_EXTENSIONS: dict[str, object] = {}
_TRACE = "traceparent"
"""An extension of `Submit`."""
_REQUEST = TypeAdapter(Request)
_LONGEST_TRACE = 64
_APART = {"prompt", "answered", "arrived", "trace"}
"""Fields of a request that do not travel with the others."""
_SWAPS = sys.byteorder == "big"


class WireError(ValueError):
    """Bytes that are no message of this protocol; the connection cannot go on."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Begin an answer, or go on with one. `refusal` is there instead of a request whose fields are of the wrong kind.

    `age_s` is how long ago the request came to its ingress: clocks of two machines have nothing in common.
    """

    number: int
    request: Request | None
    refusal: str = ""
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Cancel:
    """Drop an answer, if it is there. One `before_its_request`: a long request is overtaken by what is short."""

    number: int
    before_its_request: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """An answer that will not begin or, where the worker has left or failed, not go on."""

    number: int
    why: Literal["rejected", "not ready", "left", "failed"]
    text: str

    @classmethod
    def by(cls, number: int, error: BaseException) -> Refused:
        """For the error of a worker that could not take the request."""
        return cls(number, "rejected" if isinstance(error, RequestRejected) else "not ready", str(error))

    def error(self) -> DivisiError:
        """The worker's error."""
        return _REFUSALS.get(self.why, GangNotReady)(self.text)


_REFUSALS: Mapping[str, type[DivisiError]] = {
    "rejected": RequestRejected, "not ready": GangNotReady, "left": WorkerLeft, "failed": WorkerLost,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Report:
    """A worker's queue at one moment, and whether it takes requests."""

    queued_tokens: int
    """Prompt tokens still to be computed."""
    unfinished: int
    """Requests that run or wait."""
    free_tokens: int
    """Tokens for which it has pages that no sequence holds."""
    refusal: str = ""
    """Why it takes no requests: it has no seat, is leaving, or has failed. Empty where it does."""
    leaving: bool = False
    """Whether its open answers had better go on elsewhere."""


@dataclass(slots=True)
class Events:
    """What a step brought to the answers of one connection: columns, since most events are one token and nothing else.

    `tokens` holds an event's ids, or its only id by itself; `indices` how many of the answer come before. By an event's
    place, `drafts` has the counts of an answer with drafts, and `details` what else there is to an event.
    """

    numbers: list[int] = field(default_factory=list)
    tokens: list[int | Sequence[int]] = field(default_factory=list)
    details: dict[int, Sequence[Any]] = field(default_factory=dict)
    drafts: dict[int, Sequence[int]] = field(default_factory=dict)
    indices: list[int] = field(default_factory=list)

    def add(self, number: int, event: TokenEvent) -> None:
        """Append the next event of answer `number`."""
        if event.finish_reason is not None or event.logprobs is not None or event.prompt_logprobs is not None:
            told, prompt = _plain(event.logprobs), _plain(event.prompt_logprobs)
            self.details[len(self.numbers)] = (event.finish_reason, event.error, event.stop_id, told, prompt)
        if event.drafted:
            self.drafts[len(self.numbers)] = (event.drafted, event.accepted)
        self.numbers.append(number)
        self.indices.append(event.index)
        ids = event.token_ids
        self.tokens.append(ids[0] if len(ids) == 1 else ids)

    def messages(self) -> Iterator[bytes]:
        """Encoded, in messages that keep their order on the way; only what tells a whole prompt is longer."""
        message = encode(self)
        if len(message) <= MAX_FRAME or len(self.numbers) == 1:
            yield message
            return
        middle = len(self.numbers) // 2
        yield from self._part(0, middle).messages()
        yield from self._part(middle, len(self.numbers)).messages()

    def _part(self, begin: int, end: int) -> Events:
        details = {place - begin: told for place, told in self.details.items() if begin <= place < end}
        drafts = {place - begin: counts for place, counts in self.drafts.items() if begin <= place < end}
        return Events(self.numbers[begin:end], self.tokens[begin:end], details, drafts, self.indices[begin:end])

    def event(self, place: int, request_id: str) -> TokenEvent:
        """The event at a place."""
        found = self.tokens[place]
        ids = (found,) if isinstance(found, int) else tuple(found)
        counts = (*self.drafts.get(place, (0, 0)), self.indices[place])
        if place not in self.details:
            return TokenEvent(request_id, ids, None, None, None, None, None, *counts)
        reason, error, stop_id, told, prompt = self.details[place]
        logprobs = None if told is None else tuple([_logprob(plain) for plain in told])
        prompt_logprobs = None if prompt is None else tuple([plain and _logprob(plain) for plain in prompt])
        return TokenEvent(request_id, ids, logprobs, prompt_logprobs, reason, error, stop_id, *counts)


Message = Submit | Cancel | Refused | Report | Events


def encode(message: Message) -> bytes:
    """A message as bytes."""
    match message:
        case Events():
            columns = (message.numbers, message.tokens, message.details, message.drafts, message.indices)
            fields: tuple[object, ...] = (_EVENTS, _NO_EXTENSIONS, *columns)
        case Submit(number, request, _, age_s):
            assert request is not None, "only a decoded message has a refusal"
            ids = _id_bytes(request.prompt), _id_bytes(request.answered)
            extensions = {_TRACE: request.trace} if request.trace else _NO_EXTENSIONS
            fields = (_SUBMIT, extensions, number, *ids, age_s, _plain_request(request))
        case Cancel(number, before):
            fields = (_CANCEL, _NO_EXTENSIONS, number, before)
        case Refused(number, why, text):
            fields = (_REFUSED, _NO_EXTENSIONS, number, why, text)
        case Report():
            queue = (message.queued_tokens, message.unfinished, message.free_tokens)
            fields = (_REPORT, _NO_EXTENSIONS, *queue, message.refusal, message.leaving)
    packed: bytes = msgpack.packb(fields)
    return packed


def decode(data: bytes) -> Message:
    """Inverse of `encode`. Raises WireError; a request that is wrong in itself becomes a `Submit` with a refusal."""
    try:
        kind, extensions, *fields = msgpack.unpackb(data, use_list=False, strict_map_key=False)
        message = _DECODERS[kind](*fields)
        trace = extensions.get(_TRACE)
        if isinstance(trace, str) and isinstance(message, Submit) and message.request is not None:
            return replace(message, request=replace(message.request, trace=trace[:_LONGEST_TRACE]))
        return message
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"a message cannot be read: {type(error).__name__}: {error}") from error


def _submit(number: int, prompt: bytes, answered: bytes, age_s: float, fields: Mapping[str, Any]) -> Submit:
    if not isinstance(number, int):
        raise WireError(f"the number of an answer is {number!r}: it must be a whole number")
    if not isinstance(age_s, int | float) or not 0 <= age_s < math.inf:
        raise WireError(f"the age of a request is {age_s!r}: it must be a number of seconds")
    prompt_ids, answered_ids = _ids(prompt), _ids(answered)
    try:
        request = _REQUEST.validate_python({**fields, "prompt": ()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return Submit(number, None, f"{'.'.join(map(str, first['loc']))}: {first['msg']}, but it is {first['input']!r}")
    return Submit(number, replace(request, prompt=prompt_ids, answered=answered_ids), "", age_s)


_DECODERS: Mapping[int, Callable[..., Message]] = {
    _SUBMIT: _submit, _CANCEL: Cancel, _EVENTS: Events, _REFUSED: Refused, _REPORT: Report,
}  # fmt: skip


def _id_bytes(token_ids: Sequence[int]) -> bytes:
    ids = array("I", token_ids)
    if _SWAPS:
        ids.byteswap()
    return ids.tobytes()


def _ids(data: bytes) -> tuple[int, ...]:
    ids = array("I")
    ids.frombytes(data)
    if _SWAPS:
        ids.byteswap()
    return tuple(ids)


def _plain_request(request: Request) -> dict[str, Any]:
    """All but the tokens and what is this process's own, without what has its default."""
    seed = request.sampling.seed % 2**64  # what counts of it, and what fits into an integer of msgpack
    request = replace(request, sampling=replace(request.sampling, seed=seed))
    plain: dict[str, Any] = _REQUEST.dump_python(request, mode="json", exclude=_APART, exclude_defaults=True)
    return plain


def _plain(told: Sequence[TokenLogprob | None] | None) -> list[tuple[object, ...] | None] | None:
    if told is None:
        return None
    return [None if entry is None else (entry.token_id, entry.logprob, entry.top) for entry in told]


def _logprob(plain: Sequence[Any]) -> TokenLogprob:
    token_id, logprob, top = plain
    return TokenLogprob(token_id, logprob, top)
