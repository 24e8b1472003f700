"""`divisi serve` in the foreground: starts Ray where there is none, shows progress, and takes everything down again."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shlex
import threading
import time
from dataclasses import replace as replace_fields
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from divisi.cluster.cores import CorePlan, usable_cores
from divisi.cluster.gang.membership.coordinator import CoordinatorLost
from divisi.cluster.gang.membership.status import CoordinatorStatus
from divisi.cluster.ray.coordinator import find_coordinator
from divisi.cluster.ray.draining import drain_gang
from divisi.cluster.ray.identity import named
from divisi.cluster.spec import GangSpec
from divisi.deploy.core_use import JOINED, core_lines, core_plan, waiting_policy
from divisi.deploy.haproxy.environment import LOOPBACK
from divisi.deploy.logs import LogFileError, with_default_file
from divisi.deploy.ray.address import find_cluster
from divisi.deploy.ray.instance import RayInstance, Told, Wish, ray_instance
from divisi.deploy.ray.interruptible import Interruptible, Stopped
from divisi.deploy.ray.shared_cluster import Claim, ClusterOccupied
from divisi.deploy.ray.start_errors import StartFailed, in_one_line, one_line
from divisi.deploy.serve_app import build_from, gang_spec
from divisi.deploy.settings import Settings, SettingsError, Surroundings
from divisi.deploy.supervision import Orders, say
from divisi.kernels.choice import kernels_here

APP = "divisi"
_LOOK_EVERY_S = 0.25
_LET_GO_S = 4.0
"""For a call of Ray that is under way when the stop signal comes: better not to take down what is just being built."""
_RAY_ERRORS = (RayError, RayServeException, OSError, RuntimeError)


def serve_until_stopped(settings: Settings, orders: Orders, *, replace: bool = False) -> None:
    """Run the application until it is ordered to stop. Raises StartFailed, SettingsError, what `ray_instance` raises.

    `replace`: end the application where it runs already on the cluster that is joined.
    """
    surroundings = Surroundings.read()
    plan, cores = core_plan(settings), usable_cores()
    wish = Wish(
        APP, settings.http, settings.gang.most_ranks, replace, settings.limits.request_timeout_s,
        plan.service if plan else (), waiting_policy(settings, cores),
    )  # fmt: skip
    told = Told(partial(_tell, orders), lambda folder: orders.report(folder=str(folder)), say)
    interruptibly = Interruptible(orders.stop)
    with (
        contextlib.ExitStack() as stopping,
        contextlib.suppress(Stopped),
        ray_instance(wish, surroundings, interruptibly, told) as instance,
    ):
        orders.report(serve_was_there=instance.serve_was_there)
        with contextlib.ExitStack() as ending:
            ending.callback(orders.report, taking_down=True)  # whatever ends this: now Ray's processes may go
            with in_one_line("Ray failed", f"see {instance.logs}", *_RAY_ERRORS):
                settings = _with_log_file(settings, surroundings, instance)
                spec = _settle(settings, instance, plan)
            say(f"Starting {_describe(spec, settings.gang.first_workers)}")
            if instance.own:  # others' ranks may be on other machines
                say(f"  kernels: {kernels_here(spec.kernels, spec.device)}")
                for line in core_lines(settings, cores, plan, instance.haproxy):
                    say(line)
            try:
                _serve(settings, spec, instance, interruptibly, orders)
            finally:
                orders.report(taking_down=True)
                # Ray would print that it goes on trying to reach the actors which are ended here.
                stopping.enter_context(contextlib.redirect_stdout(io.StringIO()))
                if not instance.replaced.is_set():
                    _take_down(instance.serve_was_there)


def _tell(orders: Orders, joined: str) -> None:
    """Ray runs: its own, or that of a cluster which was joined."""
    orders.heed_signals()
    orders.report(own=not joined, joined=joined)


def _settle(settings: Settings, instance: RayInstance, plan: CorePlan | None) -> GangSpec:
    """What is to be served on this Ray. Raises StartFailed and SettingsError."""
    if plan is not None and not instance.own:
        raise SettingsError(JOINED)
    ranks, gpus = settings.gang.most_ranks, ray.cluster_resources().get("GPU", 0)
    spec = named(replace_fields(gang_spec(settings, gpus), core_plan=plan), APP)
    if instance.own and spec.device == "cuda" and gpus < ranks:
        raise StartFailed(f"device cuda takes a GPU for each rank, {ranks} in all, but Ray finds {gpus:.0f} here")
    return spec


def _serve(
    settings: Settings, spec: GangSpec, instance: RayInstance, interruptibly: Interruptible, orders: Orders
) -> None:
    """Deploy, wait for orders, and let open answers end."""
    orders.report(deployed=True)
    with in_one_line("Ray Serve failed", f"see {instance.logs}", *_RAY_ERRORS):
        interruptibly(lambda: _deploy(settings, spec, instance), grace_s=_LET_GO_S)
        if interruptibly(lambda: _wait_until_ready(spec, orders.stop), grace_s=_LET_GO_S):
            orders.report(answers_open=True)
            say(_ready_text(settings))
    orders.stop.wait()
    if instance.replaced.is_set():
        say("Another server has taken this one's place on the cluster; the application is left to it")
    else:
        _stop_taking(spec, settings.limits.shutdown_grace_s, orders)


def _with_log_file(settings: Settings, surroundings: Surroundings, instance: RayInstance) -> Settings:
    """The settings with a file for the log, and a line that says which."""
    try:
        log = with_default_file(settings.log, surroundings.state_home, settings.http.port)
    except LogFileError as error:
        say(f"Request log: {instance.logs}/worker-*.err ({error})")
        return settings
    nodes = sum(node["Alive"] for node in ray.nodes())
    say(f"Request log: {log.file}" + (", on the node of each ingress replica" if nodes > 1 else ""))
    return settings.model_copy(update={"log": log})


def _deploy(settings: Settings, spec: GangSpec, instance: RayInstance) -> None:
    """Hand the application to Serve. Raises StartFailed."""
    _start_http(settings, instance)
    serve.run_many(
        [serve.RunTarget(build_from(settings, spec), name=APP)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


def _start_http(settings: Settings, instance: RayInstance) -> None:
    """Until the application is known, a second or so, Serve itself answers: 503, or 404 without HAProxy."""
    http = settings.http
    host = LOOPBACK if instance.haproxy else http.host
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": http.port})
    except (RayError, RayServeException) as error:
        raise StartFailed(
            f"cannot listen on {http.host}:{http.port}; is another server there? ({one_line(error)})"
        ) from None


def _stop_taking(spec: GangSpec, grace_s: float, orders: Orders) -> None:
    """Let open answers go on for the grace. Proxy, ingress, workers and shards must all outlive them."""
    orders.report(answers_open=True)  # the first may have come before the driver saw that the gang is ready
    say(f"Stopping; open answers have {grace_s:g} s, a second signal ends them now")
    drain_gang(spec.name, grace_s, orders.at_once)


def _take_down(keep_serve: bool) -> None:
    """End the application, and Serve with it unless it has others to serve on a cluster that was there before."""
    try:
        others = set(serve.status().applications) - {APP}
    except RayServeException:  # nothing was started
        return
    if others or keep_serve:
        serve.delete(APP)
    else:
        serve.shutdown()


def remove_application(address: str, keep_serve: bool) -> None:
    """Remove the application from a cluster, for a driver that died before it could; not one that others have taken."""
    cluster = find_cluster(Surroundings.read())
    found = cluster is not None and cluster.found  # only then, and without an address, does Ray look for its token
    ray.init(address=None if found else address, log_to_driver=False, logging_level=logging.CRITICAL)
    with contextlib.redirect_stdout(io.StringIO()):
        if (claim := _claim_of_a_dead_driver()) is not None:
            _take_down(keep_serve)
            claim.release()


def _claim_of_a_dead_driver() -> Claim | None:
    """The claim of the application, once Ray has noticed that its holder is gone; None where another has it."""
    until = time.monotonic() + _LET_GO_S
    while time.monotonic() < until:
        with contextlib.suppress(ClusterOccupied):
            return Claim.take(APP, False, lambda: None)
        time.sleep(0.2)  # Ray has no way to await that a name becomes free
    return None


def _wait_until_ready(spec: GangSpec, stop: threading.Event) -> bool:
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
                raise StartFailed(
                    "; ".join(f"{who}: {one_line(text)}" for who, text in sorted(status.failures.items()))
                )
            if status.reason != reason:
                reason = status.reason
                say(f"  gang: {reason}")
        app = serve.status().applications.get(APP)
        if app is not None and app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise StartFailed(one_line(app.message))
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


def _describe(spec: GangSpec, first_workers: int) -> str:
    shape = spec.shape
    most = _count(shape.attention_workers, "attention worker")
    ranks = most if first_workers == shape.attention_workers else f"{first_workers} to {most}"
    if shape.colocated:
        ranks += f" with {'all' if shape.size == 1 else 'a share of'} the experts{'' if shape.size == 1 else ' each'}"
    elif shape.expert_shards:
        rule = spec.wait_rule
        shards = _count(shape.expert_shards if rule is None else rule.most, "expert shard")
        ranks += f" and {shards}" if rule is None else f" and {rule.least} to {shards}"
    else:
        ranks += ", all in one process"
    deterministic = " deterministic (prefill takes 1.25 to 1.7 times as long)," if spec.deterministic else ""
    return f"{ranks} on {spec.device}, {spec.dtype},{deterministic} up to {spec.max_model_len:,} tokens"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _ready_text(settings: Settings) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.http.host, settings.http.host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{settings.http.port}"
    body = json.dumps(
        {"model": settings.served_model_name, "messages": [{"role": "user", "content": "Hello"}]}, ensure_ascii=False
    )
    return f"Ready. Try:\n  curl {url}/v1/chat/completions -H 'content-type: application/json' -d {shlex.quote(body)}"
