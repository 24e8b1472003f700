"""An expert shard as a Ray actor: loads its experts, takes its seat, and runs the shard loop in a thread.

It outlives who created it. It ends once no coordinator has been heard of for long, and where another process has taken
its seat: then Ray took this one's node to be lost.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from functools import partial

from divisi.cluster.activity import StuckCheck
from divisi.cluster.assembly import load_shard, metered, served_config, shard_loop
from divisi.cluster.door import Credentials
from divisi.cluster.gang.loops.inbox import EpochInbox
from divisi.cluster.gang.loops.shard_loop import ShardLoop
from divisi.cluster.gang.membership.watch import Candidate, SeatWatch
from divisi.cluster.gang.membership.watchdog import Watchdog
from divisi.cluster.loading import load_in_thread
from divisi.cluster.ray.actors import ORPHANED_S, end_own_actor
from divisi.cluster.ray.coordinator import RayCoordinatorClient
from divisi.cluster.ray.loading import own_host, reported
from divisi.cluster.ray.secret import gang_secret
from divisi.cluster.seats import Address
from divisi.cluster.spec import GangSpec
from divisi.cluster.telemetry.process import Telemetry
from divisi.cluster.telemetry.ranks import show_shard
from divisi.model.checkpoint import Checkpoint

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0


class ExpertShardActor:
    """Holds one seat `expert:index` for as long as the process lives; Ray restarts it, and it rejoins."""

    def __init__(self, spec: GangSpec, index: int) -> None:
        host = own_host()
        config = served_config(spec)
        telemetry = Telemetry(spec.telemetry, "expert", host)
        with (
            reported(spec.name, f"expert:{index}") as report,
            contextlib.closing(Checkpoint.open(spec.model_dir)) as checkpoint,
        ):
            experts = load_in_thread(spec, partial(load_shard, spec, config, checkpoint, index, report))
        self._weights = {"weight_bytes_read": float(checkpoint.bytes_read), "weight_bytes": float(experts.nbytes)}
        inbox = EpochInbox()
        candidate = Candidate("expert", Address(host, metrics=telemetry.port), index, spec=spec.fingerprint)
        self._watch = SeatWatch(lambda: RayCoordinatorClient(spec.name), candidate, inbox, self._stats)
        meter = metered(spec, config, experts, index)
        observer = show_shard(telemetry, meter, f"expert:{index}", self._weights)
        credentials = Credentials(gang_secret(spec), spec.tls)
        loop = shard_loop(spec, config, meter, credentials, inbox, self._watch, observer)
        self._told = False
        threading.Thread(target=_run_or_exit, args=(loop,), name="shard-loop", daemon=True).start()
        self._watch.start()
        self._watchdog = Watchdog(StuckCheck(inbox.activity, spec.patience.stuck_after_s))
        threading.Thread(target=self._end_when_not_wanted, name="owner", daemon=True).start()

    def _end_when_not_wanted(self) -> None:
        while not self._watch.superseded.wait(_LOOK_EVERY_S):
            if time.monotonic() - self._watch.heard_at > ORPHANED_S:
                log.warning("no coordinator has been heard of for %g s; this shard ends", ORPHANED_S)
                end_own_actor()
        log.warning("another process has this shard's seat; this one ends")
        os._exit(1)

    def _stats(self) -> dict[str, float] | None:
        if self._told:
            return None
        self._told = True
        return self._weights


def _run_or_exit(loop: ShardLoop) -> None:
    try:
        loop.run()
    except BaseException:  # the actor would go on to look alive without its loop; Ray starts a new one instead
        log.exception("the shard loop failed")
        os._exit(1)
