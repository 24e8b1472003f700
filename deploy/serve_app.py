"""The Ray Serve application: Ingress (HTTP), AttentionWorker and Gang.

Imports no torch: the ingress replicas load this module, and only the constructors of the others need it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from divisi.cluster.cores import keep_to
from divisi.cluster.door import TlsFiles
from divisi.cluster.gang.membership.watchdog import Watchdog
from divisi.cluster.newcomer import made_to_last
from divisi.cluster.nodes import NodeChoice, empty_groups
from divisi.cluster.ray.head import end_without_head
from divisi.cluster.ray.identity import named
from divisi.cluster.ray.nodes import actor_options, has_autoscaler, living_nodes
from divisi.cluster.ray.presence import Presence
from divisi.cluster.spec import GangSpec
from divisi.cluster.telemetry.process import Telemetry
from divisi.cluster.telemetry.spec import TelemetrySpec
from divisi.deploy.api.app import build_app
from divisi.deploy.api.settings import ApiSettings
from divisi.deploy.application.live_settings import refusal, told, with_live
from divisi.deploy.application.redeployed import keep_told, told_before
from divisi.deploy.application.serve_client import ServeEngineClient
from divisi.deploy.application.worker_count import worker_count
from divisi.deploy.core_use import JOINED
from divisi.deploy.fit import fit, used_model
from divisi.deploy.limits import Gate, GateLimits, KeyFile
from divisi.deploy.logs import configure_logs
from divisi.deploy.routing import TOKENS_PER_REQUEST
from divisi.deploy.settings import Settings, SettingsError
from divisi.kernels.choice import kernels_here
from divisi.model.config import ModelConfig
from divisi.model.text import TextCodec
from divisi.model.text.grammar.compiler import GrammarLimits

log = logging.getLogger(__name__)

# Serve's own limits stand aside: admission is the ingress's work, and it answers in OpenAI's shape.
_UNLIMITED = 1_000_000
_LAST_WORDS_S = 3.0
"""For the error events of streams that outlast the grace: the ingress ends them, not Serve by killing replicas."""
_LEAVE_S = 5.0
"""For a worker to leave the gang, after its answers."""
# Requests are logged by the API, with what only it knows.
_NO_ACCESS_LOG = {"enable_access_log": False}
_ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
"""For ingress replicas: Serve hands each piece of an answer from the application's thread to its own otherwise."""


class Ingress:
    """The HTTP side. Ready to answer at once, whether or not there is a gang yet."""

    def __init__(
        self, settings: Settings, spec: GangSpec, workers: DeploymentHandle[Any], gang: DeploymentHandle[Any]
    ) -> None:
        """`workers` and `gang` are only bound to belong to the application: the coordinator, whose name is known, names
        the workers' addresses."""
        self._told = self._settings = settings
        self._spec = spec
        self._client: ServeEngineClient | None = None

    def __serve_build_asgi_app__(self) -> Any:
        """Build the ASGI application."""
        end_without_head()
        settings, spec = self._settings, _named_here(self._spec)
        configure_logs(settings.log, "ingress")
        if spec.core_plan is not None:
            keep_to(spec.core_plan.service)
        ingress_id = serve.get_replica_context().replica_id.unique_id
        gate = Gate(gate_limits(settings))
        file = settings.auth.api_keys_file
        keys = None if file is None else KeyFile(file)
        host = ray.util.get_node_ip_address()
        self._telemetry = Telemetry(spec.telemetry, "ingress", host)
        client = self._client = ServeEngineClient(
            spec, gate, ingress_id, settings.http.ingress_replicas, self._telemetry,
            lambda workers: gate_limits(self._settings, workers),
        )  # fmt: skip
        presence = Presence(spec.name, ingress_id, host, self._telemetry.port)
        presence.start()
        text, api = TextCodec.load(spec.model_dir), api_settings(settings, spec)
        return build_app(client, text, api, gate, keys, self._telemetry, presence, client)

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """For Serve: take new limits and another log level."""
        if (settings := _reconfigured(self._told, user_config)) is not None:
            self._settings = settings
            configure_logs(settings.log, "ingress")
            if self._client is not None:
                self._client.take_limits()

    def __del__(self) -> None:
        if hasattr(self, "_telemetry"):
            self._telemetry.close()


class AttentionWorker:
    """One attention worker; its constructor returns when the weights are loaded. Serve sees none of its requests."""

    def __init__(self, settings: Settings, spec: GangSpec) -> None:
        """When the replica is told to end, its open answers have the settings' grace."""
        begin = time.monotonic()
        with made_to_last():
            from divisi.cluster.attention_rank import AttentionRank
            from divisi.cluster.ray.post import ray_post

        end_without_head()
        spec = _named_here(spec)
        self._settings = settings
        configure_logs(settings.log, "attention")
        imported = time.monotonic()
        self._rank = AttentionRank(spec, ray_post(spec))
        loaded = time.monotonic()
        log.info("loaded after %.2f s, of which imports %.2f s", loaded - begin, imported - begin)
        self._watchdog = Watchdog(self._rank.stuck)
        self._grace_s = settings.limits.shutdown_grace_s

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """For Serve: take another log level."""
        if (settings := _reconfigured(self._settings, user_config)) is not None:
            configure_logs(settings.log, "attention")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `application.queue_policy`: the queue of this worker, and what the whole gang has no room for."""
        report = self._rank.last_report
        queued = report.queued_tokens + TOKENS_PER_REQUEST * report.unfinished
        return {"queued_tokens": queued, "refused_tokens": self._rank.refused_tokens}

    def check_health(self) -> None:
        """For Serve: a worker whose step loop has failed is replaced."""
        self._rank.check()

    def __del__(self) -> None:
        if hasattr(self, "_watchdog"):
            self._rank.close(self._grace_s)
            self._watchdog.close()


class Gang:
    """Owns the coordinator and the shards; one replica. They outlive it until the next one has adopted them."""

    def __init__(self, settings: Settings, spec: GangSpec) -> None:
        """What runs when the replica is told to end has the settings' grace, as it needs the gang's actors."""
        from divisi.cluster.ray.gang import GangOwner

        end_without_head()
        spec = _named_here(spec)
        self._name = spec.name
        self._settings = settings
        configure_logs(settings.log, "gang")
        self._owner = GangOwner(spec)
        keep_told(serve.get_replica_context().app_name, spec.name, told(settings))
        self._grace_s = settings.limits.shutdown_grace_s

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """For Serve: take another least number of attention workers, and another log level."""
        if (settings := _reconfigured(self._settings, user_config)) is not None:
            configure_logs(settings.log, "gang")
            self._owner.bound(settings.gang.least_workers)

    def check_health(self) -> None:
        """For Serve: a gang with a shard that cannot load is built anew."""
        self._owner.check()

    def __del__(self) -> None:
        if not hasattr(self, "_grace_s"):
            return
        from divisi.cluster.ray.draining import drain_gang
        from divisi.cluster.ray.gang import GangLost

        with contextlib.suppress(GangLost):  # a gang that is replaced because it fails has nothing to finish
            self._owner.check()
            if not self._owner.displaced:
                drain_gang(self._name, self._grace_s)
        self._owner.close()


def _named_here(spec: GangSpec) -> GangSpec:
    """As the replicas of this application know their gang."""
    return named(spec, serve.get_replica_context().app_name)


def _reconfigured(settings: Settings, user_config: Mapping[str, Any]) -> Settings | None:
    """The settings with a new `user_config`; None, and a line in the log, where that is wrong.

    Serve would replace a replica that raises, with all that it has open.
    """
    try:
        return with_live(settings, user_config)
    except SettingsError as error:
        log.error("user_config is left alone: %s", error)
        return None


def api_settings(settings: Settings, spec: GangSpec) -> ApiSettings:
    """What the HTTP API of one ingress replica has to know."""
    limits, config = settings.limits, ModelConfig.load(spec.model_dir)
    kernels = kernels_here(spec.kernels, spec.device)
    computes = f"{settings.served_model_name} {spec.dtype} {spec.device} {kernels} {spec.shape} {config!r}"
    return ApiSettings(
        served_model_name=settings.served_model_name,
        model_aliases=settings.model_names[1:],
        allowed_origins=settings.http.allowed_origins,
        trusted_proxies=settings.http.trusted_proxies,
        max_model_len=spec.max_model_len,
        vocab_size=config.vocab_size,
        max_body_bytes=limits.max_body_bytes,
        max_prompt_tokens=limits.max_prompt_tokens,
        max_prompts=limits.max_prompts,
        max_n=limits.max_n,
        max_logprobs=limits.max_logprobs,
        grammar_limits=GrammarLimits(max_bytes=limits.max_grammar_bytes),
        retry_after_s=limits.retry_after_s,
        control_tokens_in_messages=settings.http.control_tokens_in_messages,
        headers_after_s=settings.http.headers_after_s,
        keepalive_s=settings.http.keepalive_s,
        max_draft_tokens=spec.max_draft_tokens,
        metrics_open=settings.auth.metrics_open,
        names_requests=False,
        model_dir=spec.model_dir,
        system_fingerprint=f"fp_{hashlib.sha256(computes.encode()).hexdigest()[:10]}",
        metadata={"dtype": spec.dtype, "maxModelLen": spec.max_model_len, "layers": config.num_hidden_layers},
    )


def gate_limits(settings: Settings, workers: int | None = None) -> GateLimits:
    """One ingress replica's share of the limits, with so many attention workers in the epoch; None: all."""
    limits = settings.limits
    return GateLimits(
        max_requests=settings.ingress_share(settings.queued_requests(workers or settings.gang.first_workers)),
        max_queued_tokens=max(settings.ingress_share(settings.max_queued_tokens), 1),
        request_timeout_s=limits.request_timeout_s,
        retry_after_s=limits.retry_after_s,
        replicas=settings.http.ingress_replicas,
    )


def gang_spec(settings: Settings, num_gpus: float) -> GangSpec:
    """Settle everything that settings leave open; logs what may surprise. `num_gpus` is what the cluster has.

    Raises SettingsError and ConfigError.
    """
    # Not resolved: a link may lead elsewhere on the machines where the ranks run.
    model_dir = settings.model.model_dir.absolute()
    config = used_model(settings, model_dir)
    gang, cache, tls = settings.gang, settings.cache, settings.gang.tls
    fitted = fit(settings, config, num_gpus)
    for note in fitted.notes:
        log.warning("%s", note)
    log.info("kernels: %s", kernels_here(gang.kernels, fitted.device))
    return GangSpec(
        name="",
        model_dir=str(model_dir),
        dtype=fitted.dtype,
        device=fitted.device,
        threads=gang.threads_per_process,
        kernels=gang.kernels,
        deterministic=gang.deterministic,
        shape=gang.shape,
        virtual_shards=min(gang.virtual_shards, config.num_experts),
        expert_copies=gang.expert_copies,
        rebalance=gang.rebalance,
        wait_rule=gang.wait_rule,
        dispatch=gang.dispatch,
        micro_batches=gang.micro_batches,
        min_attention_workers=gang.least_workers,
        max_model_len=fitted.max_model_len,
        kv_memory=cache.kv_bytes,
        page_size=cache.page_size,
        max_seqs=cache.max_seqs,
        max_step_tokens=cache.max_step_tokens,
        step_deadline_s=gang.step_deadline_s,
        suspect_after_s=gang.suspect_after_s or (2.0 if fitted.device == "cpu" else 0.5),
        spare_shards=fitted.device == "cpu" if gang.spare_shards is None else gang.spare_shards,
        secret_file=None if gang.secret_file is None else str(gang.secret_file),
        tls=None if tls is None else TlsFiles(str(tls.certificate), str(tls.key), str(tls.ca)),
        placement=settings.placement.choices,
        max_draft_tokens=fitted.max_draft_tokens,
        adaptive_drafts=settings.mtp.adaptive,
        telemetry=telemetry_spec(settings),
    )


def telemetry_spec(settings: Settings) -> TelemetrySpec:
    """What all processes are told about telemetry."""
    chosen = settings.telemetry
    return TelemetrySpec(
        traces_endpoint=_otlp(chosen.traces_endpoint, "v1/traces"),
        metrics_endpoint=_otlp(chosen.metrics_endpoint, "v1/metrics"),
        scraped=chosen.scraped,
        scrape_from_port=chosen.scrape_from_port,
        trace_ratio=chosen.trace_ratio,
        step_ratio=chosen.step_ratio,
        content=chosen.content,
        vllm_names=chosen.vllm_names,
        model=settings.served_model_name,
    )


def _otlp(endpoint: str | None, path: str) -> str | None:
    """The path of OTLP over HTTP, unless the URL has one of its own."""
    if endpoint is None or endpoint.partition("://")[2].partition("/")[2]:
        return endpoint
    return f"{endpoint}/{path}"


def build_from(settings: Settings, spec: GangSpec) -> serve.Application:
    """The application for a settled spec."""
    gpus = 1 if spec.device == "cuda" else 0
    grace, places = settings.limits.shutdown_grace_s, spec.placement
    gang = _deployment(Gang).options(
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, **actor_options(NodeChoice(places.ingress.labels))},
        graceful_shutdown_timeout_s=grace + _LAST_WORDS_S + 5,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=5,
    )
    worker = _deployment(AttentionWorker).options(
        **worker_count(settings),
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus, **actor_options(places.attention)},
        graceful_shutdown_timeout_s=grace + _LAST_WORDS_S + _LEAVE_S,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
    )
    ingress = _deployment(serve.ingress()(Ingress)).options(
        num_replicas=settings.http.ingress_replicas,
        # Among others, where any node will do, it needs no CPU of its own to be placed.
        ray_actor_options={
            "num_cpus": 1 if places.ingress else 0,
            "runtime_env": {"env_vars": _ONE_LOOP},
            **actor_options(places.ingress),
        },
        max_ongoing_requests=_UNLIMITED,
        graceful_shutdown_timeout_s=grace + _LAST_WORDS_S,
        logging_config=_NO_ACCESS_LOG,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=1,
    )
    workers, owner = worker.bind(settings, spec), gang.bind(settings, spec)
    application: serve.Application = ingress.bind(settings, spec, workers, owner)
    return application


def _deployment(of: type[Any]) -> Any:
    """The decorator as a function; its type is only right for the other use."""
    made: Any = serve.deployment(of)
    return made.options(name=of.__name__)


def build(args: dict[str, Any]) -> serve.Application:
    """Application builder for a Serve config file; `args` has the shape of `Settings`. Raises SettingsError.

    Raises RayServeException, whose text Serve shows, where the args change those of a gang that serves.
    """
    settings = Settings.from_args(args)
    if settings.gang.pin_cores:
        raise SettingsError(JOINED)
    if settings.gang.device == "auto" and has_autoscaler():
        raise SettingsError(
            "gang.device: 'auto' cannot be settled on a cluster with an autoscaler, whose GPUs may still come; "
            "give 'cuda' or 'cpu'"
        )
    spec = gang_spec(settings, ray.cluster_resources().get("GPU", 0))
    for reason in empty_groups(spec.placement, len(spec.shape.shard_ranks), living_nodes()):
        log.warning("%s; what belongs there waits for one", reason)
    if reason := refusal(told_before(args), settings):
        raise RayServeException(reason)
    return build_from(settings, spec)
