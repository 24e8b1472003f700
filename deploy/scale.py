"""Asks the gang of a running server, through Ray, for another number of expert shards, and tells how that goes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.services import find_gcs_addresses
from ray.exceptions import RayError

from divisi.cluster.errors import DivisiError
from divisi.cluster.gang.membership.coordinator import CoordinatorLost
from divisi.cluster.gang.membership.layout.scaling import PARTS, ScaleStatus
from divisi.cluster.ray.coordinator import find_coordinator
from divisi.cluster.ray.identity import gang_of
from divisi.deploy.ray.address import ClusterAddress, find_cluster
from divisi.deploy.ray.start_errors import in_one_line
from divisi.deploy.settings import SettingsError, Surroundings

_LOOK_EVERY_S = 0.1
_ANSWER_S = 10.0
_REMEDY = "name another with --ray-address HOST:PORT"


class ScaleFailed(DivisiError):
    """There is no gang to ask, or it did not get there in time."""


def scale(
    expert_shards: int, application: str, address: str | None, within_s: float, say: Callable[[str], None]
) -> None:
    """Ask for so many, and wait until they serve. Raises SettingsError and ScaleFailed."""
    with _joined(address):
        if (gang := gang_of(application)) is None:
            raise ScaleFailed(f"this Ray cluster has no application {application!r}; name another with --application")
        try:
            coordinator: Any = find_coordinator(gang)
            reply: Any = coordinator.scale.remote(expert_shards)
            say(_told(ray.get(reply, timeout=_ANSWER_S)))
            _wait(coordinator, expert_shards, within_s, say)
        except ValueError as error:  # of the coordinator's, in Ray's wrapping
            raise SettingsError(str(getattr(error, "cause", error))) from None
        except (CoordinatorLost, RayError) as error:
            raise ScaleFailed(f"the gang of {application!r} cannot be asked now: {error}") from None


def _wait(coordinator: Any, expert_shards: int, within_s: float, say: Callable[[str], None]) -> None:
    until, last = time.monotonic() + within_s, ""
    while True:
        reply: Any = coordinator.scale_status.remote()
        status: ScaleStatus = ray.get(reply, timeout=_ANSWER_S)
        if status.wanted != expert_shards:
            raise ScaleFailed(f"{expert_shards} are wanted no more, but {status.wanted}: {status.why}")
        if not status.waits_for:
            say(_done(status))
            return
        if (told := "; ".join(status.waits_for)) != last:
            say(f"  waits: {told}")
            last = told
        if time.monotonic() > until:
            raise ScaleFailed(
                f"not there after {within_s:g} s: {told}. It goes on: ask for {status.expert_shards} again to take it "
                "back, or wait longer with --within"
            )
        time.sleep(_LOOK_EVERY_S)  # Ray has no way to await what another actor comes to know


def _told(status: ScaleStatus) -> str:
    return f"{status.expert_shards} expert shards serve, {status.wanted} are wanted"


def _done(status: ScaleStatus) -> str:
    parts = ", ".join(f"{part} {status.seconds[part]:.2f} s" for part in PARTS if part in status.seconds)
    taken = f" after {sum(status.seconds.values()):.2f} s ({parts})" if parts else ""
    return f"{status.expert_shards} expert shards serve{taken}; {status.bytes_read / 1e6:,.1f} MB of weights read"


@contextmanager
def _joined(address: str | None) -> Iterator[None]:
    """Raises SettingsError and StartFailed."""
    cluster = _found() if address is None else ClusterAddress(address, "--ray-address", _REMEDY)
    cluster.check()
    logging.getLogger("ray").setLevel(logging.ERROR)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # by itself only where Ray finds the address
    with in_one_line(f"cannot join the Ray cluster at {cluster.address}", _REMEDY):
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _found() -> ClusterAddress:
    """The cluster that RAY_ADDRESS or `ray start` names, else the only Ray of this machine."""
    if (cluster := find_cluster(Surroundings.read())) is not None:
        return cluster
    found = sorted(find_gcs_addresses())
    if len(found) != 1:
        there = f"several run on this machine: {', '.join(found)}" if found else "none runs on this machine"
        raise SettingsError(f"--ray-address: which Ray the server is in is not said, and {there}; give its HOST:PORT")
    return ClusterAddress(str(found[0]), "the one Ray of this machine", _REMEDY)
