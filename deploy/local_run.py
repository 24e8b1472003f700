"""`divisi serve` in the foreground: starts Ray where there is none, shows progress, and takes everything down again."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import ApplicationStatus

from divisi.cluster.errors import DivisiError
from divisi.cluster.gang.coordinator import CoordinatorLost, CoordinatorStatus
from divisi.cluster.ray.coordinator import find_coordinator
from divisi.cluster.spec import GangSpec
from divisi.deploy.serve_app import build_from, gang_spec
from divisi.deploy.settings import Settings

APP = "divisi"
_LOOK_EVERY_S = 0.25


class StartFailed(DivisiError):
    """The gang could not be started; the text says which rank failed and why."""


def serve_until_stopped(settings: Settings) -> None:
    """Run the application until SIGINT or SIGTERM. Raises StartFailed."""
    spec = gang_spec(settings, 0)
    # Ray installs a handler for SIGTERM of its own, so that ours must come after it.
    with _ray(spec), _stop_signals() as stop:
        spec = gang_spec(settings, ray.cluster_resources().get("GPU", 0))
        _say(f"Starting {_describe(spec)}")
        http = {"host": settings.http.host, "port": settings.http.port}
        serve.start(proxy_location="HeadOnly", http_options=http)
        try:
            serve.run_many(
                [serve.RunTarget(build_from(settings, spec), name=APP)],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )
            if _wait_until_ready(spec, settings, stop):
                _say(_ready_text(settings))
            stop.wait()
            _say("Stopping")
        finally:
            serve.shutdown()


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set."""
    stop = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        stop.set()

    former = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _ray(spec: GangSpec) -> Iterator[None]:
    """Join the cluster that this machine belongs to, or start a quiet one for as long as the context lasts."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError:
        ray.init(
            address="local",
            # Logical CPUs only place processes; every rank must find its place on a small machine, too.
            num_cpus=max(os.cpu_count() or 1, spec.shape.size + 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
        )
    try:
        yield
    finally:
        ray.shutdown()


def _wait_until_ready(spec: GangSpec, settings: Settings, stop: threading.Event) -> bool:
    """Print what the ranks do until the gang serves; False when stopped before. Raises StartFailed."""
    shown: dict[str, str] = {}
    reason = ""
    while not stop.wait(_LOOK_EVERY_S):
        status = _status(spec)
        if status is not None:
            for who, text in status.progress.items():
                if shown.get(who) != text:
                    shown[who] = text
                    _say(f"  {who}: {text}")
            if status.failures:
                raise StartFailed("; ".join(f"{who}: {text}" for who, text in sorted(status.failures.items())))
            if status.reason != reason:
                reason = status.reason
                _say(f"  gang: {reason}")
        app = serve.status().applications.get(APP)
        if app is not None and app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise StartFailed(app.message)
        if status is not None and status.ready and app is not None and app.status == ApplicationStatus.RUNNING:
            return True
    return False


def _status(spec: GangSpec) -> CoordinatorStatus | None:
    try:
        reply: Any = find_coordinator(spec.name).status.remote()
        status: CoordinatorStatus = ray.get(reply, timeout=5)
    except (CoordinatorLost, RayError):
        return None
    return status


def _describe(spec: GangSpec) -> str:
    shards = f" and {spec.shape.expert_shards} expert shard(s)" if spec.shape.expert_shards else ", all in one process"
    return f"{spec.shape.attention_workers} attention worker(s){shards} on {spec.device}, {spec.dtype}"


def _ready_text(settings: Settings) -> str:
    host = "127.0.0.1" if settings.http.host == "0.0.0.0" else settings.http.host
    url = f"http://{host}:{settings.http.port}"
    body = f'{{"model": "{settings.served_model_name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return f"Ready. Try:\n  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
