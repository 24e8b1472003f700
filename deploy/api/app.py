"""The HTTP application: routes, error handlers and middleware, composed from an engine client and a text codec."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Protocol

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response

from divisi.cluster.errors import DivisiError
from divisi.cluster.seats import ScrapeTarget
from divisi.cluster.telemetry.process import Telemetry
from divisi.cluster.telemetry.slices import slice_of
from divisi.deploy.api.admin import AdminApi
from divisi.deploy.api.body.protocol import ChatBody, CompletionBody, DetokenizeBody, GenerationBody, TokenizeBody
from divisi.deploy.api.body.reading import BodyT, read_parsed
from divisi.deploy.api.body.replayed import Dropped
from divisi.deploy.api.compile.call import Call, Compiler, check_model
from divisi.deploy.api.compile.formats import UNENFORCED, unenforced_formats
from divisi.deploy.api.engine_client import EngineClient, GangAdmin, GangStatus
from divisi.deploy.api.errors import no_such_route, to_reply
from divisi.deploy.api.metrics import CountRequests, Metrics, RequestClock
from divisi.deploy.api.middleware.auth import HEALTH, METRICS, Authenticate, key_of
from divisi.deploy.api.middleware.boundary import Boundary
from divisi.deploy.api.middleware.forwarded import Forwarded
from divisi.deploy.api.middleware.request_id import RequestIds
from divisi.deploy.api.middleware.request_log import LogRequests, note_dropped
from divisi.deploy.api.middleware.tracing import TraceRequests, note_clock, trace_of
from divisi.deploy.api.pages import Pages
from divisi.deploy.api.reply.chat import ChatWriter
from divisi.deploy.api.reply.completions import CompletionWriter
from divisi.deploy.api.reply.streaming import GenerationResponse, Pace, Writer
from divisi.deploy.api.schema.openapi import (
    chat_docs,
    completion_docs,
    detokenize_docs,
    gang_docs,
    reading_docs,
    ready_docs,
    tokenize_docs,
)
from divisi.deploy.api.settings import ApiSettings
from divisi.deploy.limits import Gate, GateLimits, KeyFile
from divisi.model.text import TextCodec, TextError
from divisi.model.text.grammar.compiler import GrammarCompiler
from divisi.model.text.grammar.process import GrammarProcess
from divisi.model.text.grammar.reader import GrammarReader

VERSION = version("divisi")
_OF_ROLE = {"ingress": "ingress", "attention": "worker", "expert": "shard"}
"""The label that tells the processes of a role apart."""

logger = logging.getLogger(__name__)


class Presence(Protocol):
    """How this process is known to the coordinator."""

    @property
    def ordinal(self) -> int | None:
        """A number that no other replica has; None before one was given."""
        ...


class Api:
    """The endpoints."""

    def __init__(
        self,
        engine: EngineClient,
        text: TextCodec,
        settings: ApiSettings,
        metrics: Metrics,
        gate: Gate,
        presence: Presence | None,
    ) -> None:
        self._engine = engine
        self._presence = presence
        self._gate = gate
        self._tokenizer = text.tokenizer
        self._settings = settings
        self._metrics = metrics
        reader = GrammarReader.of(text) if settings.model_dir is None else GrammarProcess(settings.model_dir)
        self._grammars = GrammarCompiler(reader, settings.grammar_limits)
        self._compiler = Compiler(text, settings, self._grammars)
        self._created = int(time.time())
        self._pace = Pace(settings.headers_after_s, settings.keepalive_s)

    async def chat(self, http: HttpRequest) -> Response:
        """POST /v1/chat/completions."""
        clock = self._clock(http, "chat")
        self._gate.check(key_of(http.scope))  # before anything that costs
        body = await self._body(ChatBody, http)
        calls = self._placed(http, body, await self._compiler.chat(body), tools=bool(body.tools))
        name, fingerprint = self._settings.served_model_name, self._settings.system_fingerprint
        writer = ChatWriter(body, calls, name, self._tokenizer, fingerprint)
        return self._reply(body, calls, writer, clock)

    async def completion(self, http: HttpRequest) -> Response:
        """POST /v1/completions."""
        clock = self._clock(http, "completion")
        self._gate.check(key_of(http.scope))  # before anything that costs
        body = await self._body(CompletionBody, http)
        calls = self._placed(http, body, await self._compiler.completion(body), tools=False)
        name, fingerprint = self._settings.served_model_name, self._settings.system_fingerprint
        writer = CompletionWriter(body, calls, name, self._tokenizer, fingerprint)
        return self._reply(body, calls, writer, clock)

    def _clock(self, http: HttpRequest, endpoint: str) -> RequestClock:
        clock = RequestClock(self._metrics, endpoint)
        if trace_of(http.scope) is not None:
            note_clock(http.scope, clock)
        return clock

    def _placed(self, http: HttpRequest, body: ChatBody | CompletionBody, calls: list[Call], tools: bool) -> list[Call]:
        """The calls with their slice, and in the trace of their request."""
        trace = trace_of(http.scope)
        traceparent = "" if trace is None else trace.traceparent
        found = slice_of(max(len(call.request.prompt) for call in calls), tools)
        if found != "chat" or traceparent:
            calls = [replace(call, request=replace(call.request, slice=found, trace=traceparent)) for call in calls]
        if trace is not None:
            said = [part.plain() for part in body.messages] if isinstance(body, ChatBody) else body.prompt
            trace.asked([call.request for call in calls], calls[0].answer_id, said)
        return calls

    def _reply(self, body: GenerationBody, calls: Sequence[Call], writer: Writer, clock: RequestClock) -> Response:
        formats = unenforced_formats(body, self._grammars)
        notes = {UNENFORCED: ", ".join(formats)} if formats else {}
        pace = self._pace if body.stream else None
        return GenerationResponse(
            self._engine, self._tokenizer, calls, writer, clock, self._gate, stream=pace, notes=notes
        )

    async def tokenize(self, http: HttpRequest) -> Response:
        """POST /tokenize."""
        body = await self._body(TokenizeBody, http)
        ids = await self._compiler.tokenize(body)
        reply: dict[str, Any] = {"count": len(ids), "max_model_len": self._settings.max_model_len, "tokens": ids}
        if body.return_token_strs:
            reply["token_strs"] = [self._tokenizer.name_of(token_id) for token_id in ids]
        return JSONResponse(reply)

    async def detokenize(self, http: HttpRequest) -> Response:
        """POST /detokenize."""
        body = await self._body(DetokenizeBody, http)
        return JSONResponse({"prompt": await self._compiler.detokenize(body)})

    async def version(self) -> Response:
        """GET /version."""
        return JSONResponse({"version": VERSION})

    async def metadata(self) -> Response:
        """GET /v1/metadata: what is served, in NIM's shape."""
        model = {"shortName": self._settings.served_model_name, **self._settings.metadata}
        return JSONResponse({"version": VERSION, "modelInfo": [model], "assetInfo": []})

    async def models(self) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": list(map(self._model, self._settings.model_names))})

    async def model(self, model_id: str) -> Response:
        """GET /v1/models/{id}; 404 for any but the names of the served one."""
        check_model(model_id, self._settings.model_names)
        return JSONResponse(self._model(model_id))

    async def live(self) -> Response:
        """GET /v1/health/live: this process answers. It says nothing of the gang, which may be recovering."""
        return JSONResponse({"status": "live"})

    async def ready(self) -> Response:
        """GET /v1/health/ready: 200 when the gang can serve now, else 503 and why not."""
        status = await self._status()
        if status.ready:
            return JSONResponse({"status": "ready"})
        wait = {"Retry-After": str(self._settings.retry_after_s)}
        return JSONResponse({"status": "not ready", "reason": status.reason}, 503, wait)

    async def metrics(self) -> Response:
        """GET /metrics."""
        ordinal = None if self._presence is None else self._presence.ordinal
        page = self._metrics.render(await self._status(), None if ordinal is None else str(ordinal))
        return Response(page, media_type=CONTENT_TYPE_LATEST)

    async def targets(self) -> Response:
        """GET /metrics/targets: every process that can be scraped, for Prometheus's service discovery over HTTP."""
        return JSONResponse([_target(target) for target in (await self._status()).targets])

    async def _body(self, kind: type[BodyT], http: HttpRequest) -> BodyT:
        dropped = Dropped()
        body = await read_parsed(kind, http, self._settings.max_body_bytes, dropped)
        self._metrics.count_dropped(dropped.counts)
        note_dropped(http.scope, dropped.shown)
        return body

    async def _status(self) -> GangStatus:
        try:
            async with asyncio.timeout(self._settings.status_timeout_s):
                return await self._engine.status()
        except TimeoutError:
            return GangStatus(ready=False, reason="the gang does not answer")
        except DivisiError as error:
            return GangStatus(ready=False, reason=str(error))
        except Exception:  # whatever broke between here and the gang: the answer is then no, not a 500
            logger.exception("the gang's status cannot be read")
            return GangStatus(ready=False, reason="the gang's status cannot be read; the server's log has the details")

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "divisi",
            "root": self._settings.served_model_name,
            "max_model_len": self._settings.max_model_len,
        }


def build_app(
    engine: EngineClient,
    text: TextCodec,
    settings: ApiSettings,
    gate: Gate | None = None,
    keys: KeyFile | None = None,
    telemetry: Telemetry | None = None,
    presence: Presence | None = None,
    admin: GangAdmin | None = None,
) -> FastAPI:
    """The ASGI application of one HTTP process. Without a gate everything is let in; without keys, everybody.

    `admin`: the gang whose shards can be scaled, if any.

    Without `telemetry` its metrics are on `/metrics` alone, and nothing is traced.
    """
    app = FastAPI(
        title="Divisi",
        # FastAPI's own spans would fork the trace that Ray Serve carries.
        telemetry={"tracing": False, "metrics": False, "logs": False, "operation_spans": False},
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    metrics = Metrics(None if telemetry is None else telemetry.metrics, settings.served_model_name)
    gate = gate or Gate(GateLimits())
    metrics.watch(gate)
    api = Api(engine, text, settings, metrics, gate, presence)
    route = app.add_api_route
    route("/v1/chat/completions", api.chat, methods=["POST"], response_class=Response, openapi_extra=chat_docs())
    route("/v1/completions", api.completion, methods=["POST"], response_class=Response, openapi_extra=completion_docs())
    route("/tokenize", api.tokenize, methods=["POST"], openapi_extra=tokenize_docs())
    route("/detokenize", api.detokenize, methods=["POST"], openapi_extra=detokenize_docs())
    if admin is not None:
        gang = AdminApi(admin, keys is not None)
        route("/v1/admin/gang", gang.scale, methods=["POST"], openapi_extra=gang_docs())
        _get(app, "/v1/admin/gang", gang.show, operation_id="gang", docs=reading_docs)
    _get(app, "/version", api.version)
    _get(app, "/v1/version", api.version, operation_id="v1_version")
    _get(app, "/v1/metadata", api.metadata)
    _get(app, "/v1/health/live", api.live)
    _get(app, "/v1/health/ready", api.ready, docs=ready_docs)
    _get(app, "/health", api.ready, operation_id="health", docs=ready_docs)
    _get(app, "/metrics", api.metrics, response_class=Response)
    _get(app, "/metrics/targets", api.targets)
    for path in ("/v1/models", "/models"):
        _get(app, path, api.models, operation_id=path.replace("/", "_").strip("_"))
        _get(app, f"{path}/{{model_id:path}}", api.model, operation_id=path.replace("/", "_").strip("_") + "_one")
    pages = Pages(app.openapi, settings)
    _get(app, "/", pages.home, operation_id="home")
    _get(app, "/docs", pages.docs, response_class=HTMLResponse)
    handler = _error_handler(settings, [path for path in app.openapi()["paths"] if "{" not in path])
    for kind in (DivisiError, TextError, HTTPException):
        app.add_exception_handler(kind, handler)
    _add_middleware(app, settings, metrics, keys, telemetry)
    return app


def _add_middleware(
    app: FastAPI, settings: ApiSettings, metrics: Metrics, keys: KeyFile | None, telemetry: Telemetry | None
) -> None:
    """The last one added is the outermost: every reply is logged, counted and has an id, the boundary's too."""
    if keys is not None:
        app.add_middleware(Authenticate, keys=keys, open_paths=HEALTH | METRICS if settings.metrics_open else HEALTH)
    app.add_middleware(Boundary)
    app.add_middleware(RequestIds, tells=settings.names_requests)
    if settings.allowed_origins:  # around all that refuses: a page is to read why, and its preflight has no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("X-Request-Id", "Retry-After", UNENFORCED),
        )
    app.add_middleware(CountRequests, metrics=metrics)
    if telemetry is not None and telemetry.tracer is not None:
        app.add_middleware(TraceRequests, telemetry=telemetry)
    app.add_middleware(LogRequests)
    if settings.trusted_proxies:
        app.add_middleware(Forwarded, trusted=settings.trusted_proxies)


def _get(
    app: FastAPI,
    path: str,
    endpoint: Callable[..., Awaitable[Response]],
    *,
    response_class: type[Response] = JSONResponse,
    operation_id: str | None = None,
    docs: Callable[[], dict[int | str, dict[str, Any]]] = reading_docs,
) -> None:
    """GET, and HEAD for the load balancers that probe with it; the server drops the body."""
    app.add_api_route(
        path, endpoint, methods=["GET"], response_class=response_class, operation_id=operation_id, responses=docs()
    )
    app.add_api_route(path, endpoint, methods=["HEAD"], response_class=response_class, include_in_schema=False)


def _target(target: ScrapeTarget) -> dict[str, object]:
    """As Prometheus wants it. The labels say whose numbers they are; the processes themselves do not."""
    host = f"[{target.host}]" if ":" in target.host else target.host
    labels = {"role": target.role}
    if (label := _OF_ROLE.get(target.role)) is not None:
        labels[label] = str(target.index)
    return {"targets": [f"{host}:{target.port}"], "labels": labels}


Handler = Callable[[HttpRequest, Exception], Awaitable[Response]]


def _error_handler(settings: ApiSettings, paths: Sequence[str]) -> Handler:
    async def reply_to(http: HttpRequest, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            error = no_such_route(error, http.method, http.url.path, paths)
        reply = to_reply(error, retry_after_s=settings.retry_after_s)
        if reply.status >= 500 and reply.status != 503:
            logger.error("%s %s failed: %s", http.method, http.url.path, error)
        return Response(reply.body(), reply.status, reply.headers, media_type="application/json")

    return reply_to
