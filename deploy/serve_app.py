"""The Ray Serve application: Ingress (HTTP), AttentionWorker and Gang, and how `divisi serve` runs it.

Imports no torch: the ingress replicas load this module, and only the constructors of the others need it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from divisi.cluster.errors import DivisiError, GangNotReady, RequestRejected
from divisi.cluster.gang.seats import GangShape
from divisi.cluster.request import Request, TokenEvent
from divisi.cluster.spec import GangSpec
from divisi.deploy.api.app import build_app
from divisi.deploy.api.settings import ApiSettings
from divisi.deploy.fit import fit
from divisi.deploy.serve_client import ServeEngineClient
from divisi.deploy.settings import Settings
from divisi.model.config import ModelConfig
from divisi.model.text import TextCodec

log = logging.getLogger(__name__)

# Serve's own limits stand aside: admission is the ingress's work, and it answers in OpenAI's shape.
_UNLIMITED = 1_000_000


class Ingress:
    """The HTTP side. Ready to answer at once, whether or not there is a gang yet."""

    def __init__(
        self, settings: Settings, spec: GangSpec, workers: DeploymentHandle[Any], gang: DeploymentHandle[Any]
    ) -> None:
        """`gang` is only bound to belong to the application: its coordinator is reached by name."""
        self._settings = settings
        self._spec = spec
        self._workers = workers

    def __serve_build_asgi_app__(self) -> Any:
        """Build the ASGI application."""
        limits, spec = self._settings.limits, self._spec
        api = ApiSettings(
            served_model_name=self._settings.served_model_name,
            max_model_len=spec.max_model_len,
            vocab_size=ModelConfig.load(spec.model_dir).vocab_size,
            max_body_bytes=limits.max_body_bytes,
            max_prompts=limits.max_prompts,
            max_logprobs=limits.max_logprobs,
            retry_after_s=limits.retry_after_s,
        )
        share = max(limits.max_queued_requests // self._settings.http.ingress_replicas, 1)
        client = ServeEngineClient(self._workers, spec.name, share, limits.retry_after_s)
        return build_app(client, TextCodec.load(spec.model_dir), api)


class AttentionWorker:
    """One attention worker; its constructor returns when the weights are loaded."""

    def __init__(self, spec: GangSpec) -> None:
        from divisi.cluster.ray.worker import AttentionRank

        self._rank = AttentionRank(spec)

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent] | DivisiError, None]:
        """Events of one request. A refusal is an item: as an exception it would arrive wrapped and as a traceback."""
        events = self._rank.generate(request)
        try:
            async for batch in events:
                yield batch
        except (RequestRejected, GangNotReady) as error:
            yield error
        finally:
            await events.aclose()

    def check_health(self) -> None:
        """For Serve: a worker whose step loop has failed is replaced."""
        self._rank.check()

    def __del__(self) -> None:
        if hasattr(self, "_rank"):
            self._rank.close()


class Gang:
    """Owns the coordinator and the shards; one replica."""

    def __init__(self, spec: GangSpec) -> None:
        from divisi.cluster.ray.gang import GangOwner

        self._owner = GangOwner(spec)

    def check_health(self) -> None:
        """For Serve: without its coordinator the gang is built anew."""
        self._owner.check()

    def __del__(self) -> None:
        if hasattr(self, "_owner"):
            self._owner.close()


def gang_spec(settings: Settings, num_gpus: float) -> GangSpec:
    """Settle everything that settings leave open; logs what may surprise. `num_gpus` is what the cluster has.

    Raises SettingsError and ConfigError.
    """
    model_dir = settings.model.model_dir.resolve()
    config = ModelConfig.load(model_dir)
    gang, cache = settings.gang, settings.cache
    shape = GangShape(gang.attention_workers, gang.expert_shards)
    fitted = fit(settings, config, num_gpus)
    for note in fitted.notes:
        log.warning("%s", note)
    return GangSpec(
        name=f"coordinator/{settings.served_model_name}",
        model_dir=str(model_dir),
        dtype=fitted.dtype,
        device=fitted.device,
        threads=gang.threads_per_process or max((os.cpu_count() or 1) // shape.size, 1),
        shape=shape,
        max_model_len=fitted.max_model_len,
        kv_memory=cache.kv_memory,
        page_size=cache.page_size,
        max_seqs=cache.max_seqs,
        max_step_tokens=cache.max_step_tokens,
        step_deadline_s=gang.step_deadline_s,
    )


def build_from(settings: Settings, spec: GangSpec) -> serve.Application:
    """The application for a settled spec."""
    gpus = 1 if spec.device == "cuda" else 0
    grace = settings.limits.shutdown_grace_s
    gang = _deployment(Gang).options(
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=5,
        health_check_period_s=5,
    )
    worker = _deployment(AttentionWorker).options(
        num_replicas=spec.shape.attention_workers,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        max_ongoing_requests=_UNLIMITED,
        graceful_shutdown_timeout_s=grace,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
    )
    ingress = _deployment(serve.ingress()(Ingress)).options(
        num_replicas=settings.http.ingress_replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_UNLIMITED,
        graceful_shutdown_timeout_s=grace,
        graceful_shutdown_wait_loop_s=0.2,
    )
    application: serve.Application = ingress.bind(settings, spec, worker.bind(spec), gang.bind(spec))
    return application


def _deployment(of: type[Any]) -> Any:
    """The decorator as a function; its type is only right for the other use."""
    made: Any = serve.deployment(of)
    return made.options(name=of.__name__)


def build(args: dict[str, Any]) -> serve.Application:
    """Application builder for a Serve config file; `args` has the shape of `Settings`. Raises SettingsError."""
    settings = Settings.from_args(args)
    return build_from(settings, gang_spec(settings, ray.cluster_resources().get("GPU", 0)))


def run(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM, then take everything down. See `divisi.deploy.local_run`."""
    from divisi.deploy.local_run import serve_until_stopped

    serve_until_stopped(settings)
