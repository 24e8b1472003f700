"""`divisi serve` in the foreground: starts Ray where there is none, shows progress, and takes everything down again."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shlex
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from divisi.cluster.errors import DivisiError
from divisi.cluster.gang.coordinator import CoordinatorLost, CoordinatorStatus
from divisi.cluster.ray.coordinator import find_coordinator
from divisi.cluster.ray.draining import drain_gang
from divisi.cluster.spec import GangSpec
from divisi.deploy.serve_app import build_from, gang_spec
from divisi.deploy.settings import Settings
from divisi.deploy.supervision import Orders, say

APP = "divisi"
_LOOK_EVERY_S = 0.25


class StartFailed(DivisiError):
    """The gang could not be started; the text says which rank failed and why."""


def serve_until_stopped(settings: Settings, orders: Orders) -> None:
    """Run the application until it is ordered to stop. Raises StartFailed and SettingsError."""
    ranks = settings.gang.shape.size
    with contextlib.ExitStack() as stopping, _ray(ranks) as own:
        _report_cluster(own, orders)
        gpus = ray.cluster_resources().get("GPU", 0)
        spec = gang_spec(settings, gpus)
        if own and spec.device == "cuda" and gpus < ranks:
            raise StartFailed(f"device cuda takes a GPU for each rank, {ranks} in all, but Ray finds {gpus:.0f} here")
        say(f"Starting {_describe(spec)}")
        try:
            _start_http(settings)
            serve.run_many(
                [serve.RunTarget(build_from(settings, spec), name=APP)],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )
            if _wait_until_ready(spec, settings, orders.stop):
                orders.report(answers_open=True)
                say(_ready_text(settings))
            orders.stop.wait()
            _stop_taking(spec, settings.limits.shutdown_grace_s, orders)
        finally:
            orders.report(taking_down=True)
            # Ray would print that it goes on trying to reach the actors which are ended here.
            stopping.enter_context(contextlib.redirect_stdout(io.StringIO()))
            _take_down()


def _start_http(settings: Settings) -> None:
    """Until the application is known, a second or so, Serve itself answers: 404 to every path but its own."""
    http = settings.http
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": http.host, "port": http.port})
    except (RayError, RayServeException) as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        raise StartFailed(f"cannot listen on {http.host}:{http.port}; is another server there? ({cause})") from None


def _stop_taking(spec: GangSpec, grace_s: float, orders: Orders) -> None:
    """Let open answers go on for the grace. Proxy, ingress, workers and shards must all outlive them."""
    orders.report(answers_open=True)  # the first may have come before the driver saw that the gang is ready
    say(f"Stopping; open answers have {grace_s:g} s, a second signal ends them now")
    drain_gang(spec.name, grace_s, orders.at_once)


def _take_down() -> None:
    """End the application, and Serve with it unless it has others to serve on a cluster that was there before."""
    try:
        others = set(serve.status().applications) - {APP}
    except RayServeException:  # nothing was started
        return
    if others:
        serve.delete(APP)
    else:
        serve.shutdown()


def remove_application(address: str) -> None:
    """Remove the application from a cluster, for a driver that died before it could."""
    ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
    with contextlib.redirect_stdout(io.StringIO()):
        _take_down()


def _report_cluster(own: bool, orders: Orders) -> None:
    orders.heed_signals()  # Ray has installed a handler of its own
    orders.report(own=own, joined="" if own else ray.get_runtime_context().gcs_address)


@contextlib.contextmanager
def _ray(ranks: int) -> Iterator[bool]:
    """Join the cluster that `ray start` or RAY_ADDRESS names, or start a quiet one for as long as the context lasts.

    Yields whether it is its own. Another `divisi serve` on this machine is left alone (`address="auto"` would join it).
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    say("Starting Ray, or joining this machine's cluster")
    try:
        own = _init_ray(ranks)
    except ConnectionError as error:
        raise StartFailed(f"cannot reach the Ray cluster that RAY_ADDRESS or `ray start` names: {error}") from None
    try:
        yield own
    finally:
        ray.shutdown()


def _init_ray(ranks: int) -> bool:
    """Whether a new instance was started. Raises ConnectionError."""
    try:
        ray.init(
            # Logical CPUs only place processes; every rank must find its place on a small machine, too.
            num_cpus=max(os.cpu_count() or 1, ranks + 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
        )
    except ValueError:  # there is a cluster, and only a new one takes a number of CPUs
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        return False
    return True


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
                    say(f"  {who}: {text}")
            if status.failures:
                raise StartFailed("; ".join(f"{who}: {text}" for who, text in sorted(status.failures.items())))
            if status.reason != reason:
                reason = status.reason
                say(f"  gang: {reason}")
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
    shape = spec.shape
    ranks = _count(shape.attention_workers, "attention worker")
    if shape.colocated:
        ranks += f" with {'all' if shape.size == 1 else 'a share of'} the experts{'' if shape.size == 1 else ' each'}"
    elif shape.expert_shards:
        ranks += f" and {_count(shape.expert_shards, 'expert shard')}"
    else:
        ranks += ", all in one process"
    return f"{ranks} on {spec.device}, {spec.dtype}, up to {spec.max_model_len:,} tokens"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _ready_text(settings: Settings) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.http.host, settings.http.host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{settings.http.port}"
    body = json.dumps(
        {"model": settings.served_model_name, "messages": [{"role": "user", "content": "Hello"}]}, ensure_ascii=False
    )
    return f"Ready. Try:\n  curl {url}/v1/chat/completions -H 'content-type: application/json' -d {shlex.quote(body)}"
