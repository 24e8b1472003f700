"""An expert shard as a Ray actor: loads its experts, takes its seat, and runs the shard loop in a thread."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from functools import partial

from divisi.cluster.assembly import load_shard, served_config, shard_loop
from divisi.cluster.gang.inbox import EpochInbox
from divisi.cluster.gang.shard_loop import ShardLoop
from divisi.cluster.gang.watch import Candidate, SeatWatch
from divisi.cluster.ray.coordinator import RayCoordinatorClient
from divisi.cluster.ray.loading import load_in_thread, own_host, reported
from divisi.cluster.seats import Address
from divisi.cluster.spec import GangSpec
from divisi.model.checkpoint import Checkpoint

log = logging.getLogger(__name__)


class ExpertShardActor:
    """Holds one seat `expert:index` for as long as the process lives; Ray restarts it, and it rejoins."""

    def __init__(self, spec: GangSpec, index: int) -> None:
        host = own_host()
        config = served_config(spec)
        with (
            reported(spec.name, f"expert:{index}") as report,
            contextlib.closing(Checkpoint.open(spec.model_dir)) as checkpoint,
        ):
            experts = load_in_thread(spec, partial(load_shard, spec, config, checkpoint, index, report))
        self._bytes_read = checkpoint.bytes_read
        self._weight_bytes = experts.nbytes
        inbox = EpochInbox()
        self._watch = SeatWatch(
            lambda: RayCoordinatorClient(spec.name), Candidate("expert", Address(host), index), inbox, self._stats
        )
        loop = shard_loop(spec, config, experts, inbox, self._watch)
        self._told = False
        threading.Thread(target=_run_or_exit, args=(loop,), name="shard-loop", daemon=True).start()
        self._watch.start()

    def _stats(self) -> dict[str, float] | None:
        if self._told:
            return None
        self._told = True
        return {"weight_bytes_read": float(self._bytes_read), "weight_bytes": float(self._weight_bytes)}


def _run_or_exit(loop: ShardLoop) -> None:
    try:
        loop.run()
    except BaseException:  # the actor would go on to look alive without its loop; Ray starts a new one instead
        log.exception("the shard loop failed")
        os._exit(1)
