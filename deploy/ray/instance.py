"""The Ray that a server runs in: the cluster that it is told to join, or one of its own; and the right to be there."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import serve

from divisi.deploy.haproxy.environment import PYTHON_PROXY, Front, haproxy
from divisi.deploy.ray.address import ClusterAddress, find_cluster, short_temp_dir
from divisi.deploy.ray.interruptible import Interruptible
from divisi.deploy.ray.port_lock import hold_port, resolve
from divisi.deploy.ray.shared_cluster import Claim, check_address, check_application, head_is_here, serve_address
from divisi.deploy.ray.start_errors import in_one_line
from divisi.deploy.settings import Surroundings, set_environment
from divisi.deploy.settings.groups import HttpSettings

_JOIN_S = 30.0
"""Longest time for joining a cluster at whose address somebody listens; an idle machine needs one second."""

_OWN_RAY = {"RAY_worker_niceness": "0"}
"""Ray gives its workers nice 15: beside anything else on the machine they would hardly run."""

Say = Callable[[str], object]


@dataclass(frozen=True)
class Wish:
    """What is to run, and where it is to listen."""

    application: str
    http: HttpSettings
    ranks: int
    replace: bool = False
    """Whether to end the application where it runs on the cluster already."""
    longest_answer_s: float | None = None
    """For HAProxy, which waits somewhat longer; None: no limit."""
    front_cores: tuple[int, ...] = ()
    """Cores that HAProxy keeps to; empty: all."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of the processes of a Ray of its own."""


@dataclass(frozen=True)
class RayInstance:
    """A Ray in which the application may run."""

    own: bool
    """Whether it was started for this server, and ends with it."""
    logs: str
    """Folder of Ray's own logs on this machine."""
    serve_was_there: bool = False
    """Whether Ray Serve ran on it already, and so must outlive the application."""
    haproxy: bool = False
    """Whether HAProxy listens for clients, and Ray Serve itself is to listen for HAProxy only."""
    replaced: threading.Event = field(default_factory=threading.Event)
    """Set, with the stop event, when another server has taken this one's place: the application is no longer its."""


@dataclass(frozen=True)
class Told:
    """Who hears of what."""

    entered: Callable[[str], object]
    """Called as soon as Ray runs, with the address of the cluster that was joined, else "". Ray has installed signal
    handlers of its own by then."""
    made: Callable[[Path], object]
    """Called with a folder that has to be gone at the end, however that comes."""
    say: Callable[[str], object]
    """Called with lines for people."""


@contextlib.contextmanager
def ray_instance(
    wish: Wish, surroundings: Surroundings, interruptibly: Interruptible, told: Told
) -> Iterator[RayInstance]:
    """Join the cluster that `ray start` or RAY_ADDRESS names, or start a quiet one for as long as the context lasts.

    The Ray of another server on this machine is left alone. The address to listen on is locked where it is this
    machine's, and so is the application on a cluster that others may use.

    Raises StartFailed, SettingsError, PortTaken, ClusterOccupied, and Stopped.
    """
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    cluster = find_cluster(surroundings)
    with contextlib.ExitStack() as held:
        if cluster is None:
            held.enter_context(hold_port(wish.http.host, wish.http.port))
            front = held.enter_context(_front(wish, told))
            set_environment({**_OWN_RAY, **wish.environment, **front})
            held.callback(ray.shutdown)
            logs = _start(wish.ranks, surroundings, interruptibly, told.say)
            told.entered("")
            yield RayInstance(True, logs, haproxy=front is not PYTHON_PROXY)
            return
        held.callback(ray.shutdown)
        logs = _join(cluster, interruptibly, told.say)
        told.entered(ray.get_runtime_context().gcs_address)
        if wish.http.haproxy:
            told.say("HTTP goes through what this cluster's Ray Serve has: HAProxy can be chosen only as Ray starts")
        with in_one_line(f"Ray Serve on the cluster at {cluster.address} does not answer", f"see {logs}"):
            running = interruptibly(serve_address, timeout_s=_JOIN_S)
            instance = RayInstance(False, logs, serve_was_there=running is not None)
            if running is None and interruptibly(head_is_here, timeout_s=_JOIN_S):
                held.enter_context(hold_port(wish.http.host, wish.http.port))
            elif running is not None:
                check_address(wish.http, running)

            def lose() -> None:
                instance.replaced.set()
                interruptibly.stop.set()

            claim = interruptibly(lambda: Claim.take(wish.application, wish.replace, lose))
            held.callback(claim.release)
            interruptibly(lambda: _make_room(wish, told.say))
        yield instance


def _front(wish: Wish, told: Told) -> AbstractContextManager[dict[str, str]]:
    """The environment of Ray Serve with the front that is wished for."""
    http = wish.http
    if not http.haproxy or http.port == 0:  # HAProxy would have to know the port beforehand
        return contextlib.nullcontext(PYTHON_PROXY)
    front = Front(str(resolve(http.host, http.port)), http.port, wish.longest_answer_s, wish.front_cores)
    return haproxy(front, told.made, told.say)


def _make_room(wish: Wish, say: Say) -> None:
    """Raises ClusterOccupied where the application is there already and is not to be replaced."""
    if not wish.replace:
        check_application(wish.application)
    elif wish.application in serve.status().applications:
        say(f"Ending the application {wish.application!r} that runs there; its open answers have their grace")
        serve.delete(wish.application, _blocking=False)  # it would wait for a minute, whatever their grace is
        while wish.application in serve.status().applications:
            time.sleep(0.2)  # Serve has no way to await the end of an application for longer than a minute


def _start(ranks: int, surroundings: Surroundings, interruptibly: Interruptible, say: Say) -> str:
    """Returns the folder of the logs. Raises StartFailed and Stopped."""
    say("Starting a Ray of its own")
    short = short_temp_dir(surroundings)
    if short is not None:
        say(f"{surroundings.temp_dir_variable} is too long for the paths of sockets: the files of Ray are in {short}")

    def start() -> Any:
        return ray.init(
            address="local",
            # Logical CPUs only place processes; every rank must find its place on a small machine, too.
            num_cpus=max(os.cpu_count() or 1, ranks + 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
            _temp_dir=None if short is None else str(short),
        )

    folder = short or surroundings.temp_dir / "ray"
    with in_one_line("Ray cannot be started", f"see {folder}/session_latest/logs"):
        context = interruptibly(start)
    return _logs(context)


def _join(cluster: ClusterAddress, interruptibly: Interruptible, say: Say) -> str:
    """Returns the folder of the logs. Raises StartFailed, SettingsError and Stopped."""
    say(f"Joining the Ray cluster at {cluster.address}, which {cluster.source} names")
    interruptibly(cluster.check)
    address = None if cluster.found else cluster.address
    with in_one_line(f"cannot join the Ray cluster at {cluster.address}, which {cluster.source} names", cluster.remedy):
        context = interruptibly(
            lambda: ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR), timeout_s=_JOIN_S
        )
    return _logs(context)


def _logs(context: Any) -> str:
    return f"{context.address_info['session_dir']}/logs"
