"""A Ray cluster that others use, too: what is there already, and the right to run the application on it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError
from ray.serve.context import _get_global_client

from divisi.cluster.errors import DivisiError
from divisi.cluster.ray.actors import NAMESPACE
from divisi.deploy.settings.groups import HttpSettings

_CALL_S = 10.0
_FREE_S = 20.0
"""Longest wait until the name of a claim whose holder ends is free."""


class ClusterOccupied(DivisiError, ValueError):
    """The cluster runs the application, or Serve on another address; the text says what it has and what to do."""


def serve_address() -> tuple[str, int] | None:
    """Host and port of the Serve that runs on the cluster; None where none runs."""
    client: Any = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else (client.http_config.host, client.http_config.port)


def check_address(http: HttpSettings, running: tuple[str, int]) -> None:
    """Raise ClusterOccupied unless the running Serve listens where the settings say: it has one address for all."""
    if running != (http.host, http.port):
        host, port = running
        raise ClusterOccupied(
            f"http.host and http.port: Ray Serve already listens on {host}:{port} of this cluster, and on no other "
            f"address, not {http.host}:{http.port}; give --host {host} --port {port}"
        )


def head_is_here() -> bool:
    """Whether this process is on the cluster's head node, where Serve listens."""
    here = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == here and "node:__internal_head__" in node["Resources"] for node in ray.nodes())


def check_application(name: str) -> None:
    """Raise ClusterOccupied where Serve has such an application, whatever has come of it."""
    found = serve.status().applications.get(name)
    if found is not None:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.last_deployed_time_s))
        raise ClusterOccupied(
            f"the application {name!r} is on this cluster already ({found.status.value}, deployed {since}); "
            f"end it with `python -c 'from ray import serve; serve.delete(\"{name}\")'`, or give --replace"
        )


class Claim:
    """The right to run an application on the cluster, which one `divisi serve` has at a time.

    A named actor that ends with the process that made it, however that ends; Ray gives each name once. Two that look
    for the application in the same moment would both find none.
    """

    def __init__(self, actor: ActorHandle[Any], lost: Callable[[], None]) -> None:
        self._actor: Any = actor
        self._lost = lost
        self._released = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="claim", daemon=True)
        self._watcher.start()

    @classmethod
    def take(cls, application: str, replace: bool, lost: Callable[[], None]) -> Claim:
        """Take the right; `replace` takes it from another. `lost` is called once somebody takes it from this one.

        Raises ClusterOccupied where another has it.
        """
        name = f"application/{application}"
        options = {
            "name": name,
            "namespace": NAMESPACE,
            "num_cpus": 0,
            "max_restarts": -1,  # a claim is given up or taken, never lost by accident
            "max_task_retries": -1,
        }
        made: Any = ray.remote(Claimant)
        until = time.monotonic() + _FREE_S
        while True:
            try:
                return cls(made.options(**options).remote(_myself()), lost)
            except ValueError:  # the name is taken
                holder = _who_holds(name)
            if holder is not None and not replace:
                raise ClusterOccupied(
                    f"the application {application!r} is run on this cluster by {holder}; stop that, or give --replace"
                )
            if time.monotonic() > until:
                raise ClusterOccupied(
                    f"{holder or 'a process that ends'} does not let go of {application!r}; try again"
                )
            if holder is not None:
                _end(name)
            time.sleep(0.2)  # Ray has no way to await that a name becomes free

    def release(self) -> None:
        """Give the right up, before the connection to Ray is closed: in use, that would end the process."""
        self._released.set()
        ray.kill(self._actor)
        self._watcher.join(_CALL_S)

    def _watch(self) -> None:
        try:
            ray.get(self._actor.wait.remote())
        except RayActorError:
            if not self._released.is_set():
                self._lost()
        except RayError:
            pass  # Ray itself is gone, which is no one's claim


class Claimant:
    """The actor of a claim."""

    def __init__(self, holder: str) -> None:
        self._holder = holder

    async def holder(self) -> str:
        """Who has the claim, for people."""
        return self._holder

    async def wait(self) -> None:
        """Never returns: whoever calls it hears of the actor's end at once."""
        await asyncio.Event().wait()


def _myself() -> str:
    command = " ".join(psutil.Process().cmdline())
    return f"process {os.getpid()} on {socket.gethostname()} ({command if len(command) <= 100 else command[:99] + '…'})"


def _who_holds(name: str) -> str | None:
    """The holder of a claim; None for one that ends just now."""
    try:
        actor: Any = ray.get_actor(name, namespace=NAMESPACE)
        holder: str = ray.get(actor.holder.remote(), timeout=_CALL_S)
    except (ValueError, RayError):
        return None
    return holder


def _end(name: str) -> None:
    with contextlib.suppress(ValueError):  # ended by itself
        ray.kill(ray.get_actor(name, namespace=NAMESPACE))
