"""An expert shard as a Ray actor; also a spare, which becomes one where another dies.

It outlives who created it. It ends once no coordinator has been heard of for long, and where it serves nothing and has
no raylet any more: then Ray took its node to be lost.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from pathlib import Path

from divisi.cluster.expert_rank import ExpertRank
from divisi.cluster.gang.membership.watchdog import Watchdog
from divisi.cluster.ray.actors import ORPHANED_S, end_own_actor
from divisi.cluster.ray.head import end_without_head
from divisi.cluster.ray.post import ray_post
from divisi.cluster.ray.shards import start_spares
from divisi.cluster.spec import GangSpec

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_SPARES_EVERY_S = 5.0


class ExpertShardActor:
    """Serves a share of the experts for as long as the process lives; Ray restarts it, and it asks for one again."""

    def __init__(self, spec: GangSpec, name: str, own: int | None) -> None:
        """`name` is the actor's; `own` its share at first, None for a spare."""
        end_without_head()
        self._spec = spec
        self._raylet = os.getppid()
        self._rank = ExpertRank(spec, ray_post(spec, name), own, orphaned=self._orphaned)
        self._watchdog = Watchdog(self._rank.stuck)
        threading.Thread(target=self._run, name="shard-loop", daemon=True).start()
        threading.Thread(target=self._look_after, name="owner", daemon=True).start()

    def _orphaned(self) -> bool:
        return os.getppid() != self._raylet

    def _run(self) -> None:
        while self._load():
            try:
                self._name_process()
                self._rank.serve()
            except BaseException:  # the actor would go on to look alive without its loop; Ray starts a new one instead
                log.exception("the shard loop failed")
                os._exit(1)

    def _load(self) -> bool:
        try:
            return self._rank.load()
        except Exception:  # the coordinator was told; the owner of the gang is replaced, and all with it
            log.exception("this shard could not load")
            end_own_actor()

    def _look_after(self) -> None:
        """End this process when nobody wants it, and have spares once it serves."""
        wait, spares_at = threading.Event(), 0.0
        while True:
            wait.wait(_LOOK_EVERY_S)
            self._name_process()  # again: Ray gives it a title of its own once the constructor has returned
            if self._rank.silent_s > ORPHANED_S:
                log.warning("no coordinator has been heard of for %g s; this shard ends", ORPHANED_S)
                end_own_actor()
            if self._rank.is_spare and self._orphaned():
                log.warning("the raylet is gone; this spare ends")
                os._exit(1)
            if self._spec.spare_shards and self._rank.serves and time.monotonic() > spares_at:
                start_spares(self._spec)
                spares_at = time.monotonic() + _SPARES_EVERY_S

    def _name_process(self) -> None:
        """For `top` and `ps -o comm`: the title that Ray gives it says nothing of what it serves."""
        with contextlib.suppress(OSError):
            Path("/proc/self/comm").write_text("spare" if self._rank.is_spare else f"expert:{self._rank.share}")
