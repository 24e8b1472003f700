"""An expert shard: waits for a share of the experts that nobody serves, loads it, takes its seat. Knows no Ray.

While it serves it may be told to hold others besides, or fewer. Where another process has taken its seat meanwhile,
since it was silent for too long, or there is no such seat any more, it waits for a share again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from divisi.cluster.activity import StuckCheck
from divisi.cluster.assembly import load_shard, metered, served_config, shard_loop, sharded_mode
from divisi.cluster.dispatch.meter import MeteredExperts
from divisi.cluster.dispatch.protocol import ShardedMode
from divisi.cluster.dispatch.row_reports import RowReports
from divisi.cluster.door import Credentials
from divisi.cluster.gang.loops.inbox import EpochInbox
from divisi.cluster.gang.membership.client import CoordinatorClient
from divisi.cluster.gang.membership.coordinator import CoordinatorLost
from divisi.cluster.gang.membership.neighbours import Neighbours, own_process, process_age_s
from divisi.cluster.gang.membership.status import Stats
from divisi.cluster.gang.membership.vacancies import Applicant, Share
from divisi.cluster.gang.membership.watch import Candidate, SeatWatch
from divisi.cluster.holdings import Holdings
from divisi.cluster.loading import load_in_thread
from divisi.cluster.post import Post
from divisi.cluster.seats import Address
from divisi.cluster.spec import GangSpec
from divisi.cluster.telemetry.process import Telemetry
from divisi.cluster.telemetry.ranks import show_shard
from divisi.kernels.select import select_kernels
from divisi.model.checkpoint import Checkpoint
from divisi.model.config import ModelConfig
from divisi.model.experts import ExpertBank

log = logging.getLogger(__name__)

_WAIT_S = 1.0
_RETRY_S = 0.1
_RENEW_S = 3.0
NewMode = Callable[[GangSpec, ModelConfig], ShardedMode]


class ExpertRank:
    """One expert shard, or a spare until somebody's share of the experts is to be served."""

    def __init__(
        self,
        spec: GangSpec,
        post: Post,
        own: int | None = None,
        new_mode: NewMode = sharded_mode,
        orphaned: Callable[[], bool] = lambda: False,
    ) -> None:
        """Get everything ready but the weights. No memory of a device is taken before they are loaded.

        `own`: the share that this process was created for; None: it is a spare. `new_mode` makes the way that rows
        reach experts. `orphaned`: whether this process is about to end, so that it takes no share any more.
        """
        self._spec, self._post = spec, post
        self._config = served_config(spec)
        self._mode = new_mode(spec, self._config)
        self._orphaned = orphaned
        self._applicant = Applicant(post.process, post.host, own)
        self._telemetry = Telemetry(spec.telemetry, "expert", post.host)
        select_kernels(torch.device(spec.device), spec.kernels, deterministic=spec.deterministic)
        self._inbox = EpochInbox()
        self._closed = threading.Event()
        self._asked_at = self._heard_at = time.monotonic()
        self._waiting = True
        self._watch: SeatWatch | None = None
        self._index: int | None = None
        self._bank: ExpertBank | None = None
        self._weights: dict[str, float] = {}
        self._told = False
        self._reports: RowReports | None = None
        self.experts: MeteredExperts | None = None
        """What it serves; None before `load`."""

    def load(self) -> bool:
        """Wait until there is a share to serve, as long as that takes, and load it; False once it is closed.

        Raises CheckpointError.
        """
        while (share := self._vacancy()) is not None:
            self._index, self._waiting = share.index, False
            self._load(share)
            if self._is_wanted(share.index):
                return True
            self._forget()
        return False

    def _load(self, share: Share) -> None:
        who = f"expert:{share.index}"
        with (
            self._post.reported(who) as report,
            contextlib.closing(Checkpoint.open(self._spec.model_dir)) as checkpoint,
        ):
            progress = partial(self._progress, report)
            load = partial(load_shard, self._spec, self._config, checkpoint, share.leaves, progress)
            self._bank = bank = load_in_thread(self._spec, load)
        self._weights = {"weight_bytes_read": float(checkpoint.bytes_read), "weight_bytes": float(bank.nbytes)}
        self.experts = metered(self._spec, self._config, bank)
        if self._spec.rebalance:
            self._reports = RowReports(self.experts, torch.device(self._spec.device))

    def serve(self) -> None:
        """Take the seat of what was loaded, and serve in its epochs until it is closed or has lost the seat."""
        assert self.experts is not None, "load comes first"
        assert self._bank is not None
        address = Address(
            self._post.host, metrics=self._telemetry.port, process=self._post.process, local=own_process()
        )
        candidate = Candidate("expert", address, self._index, spec=self._spec.fingerprint)
        holdings = Holdings(self._bank, self._spec.model_dir, self._config, self._prepared)
        self._watch = SeatWatch(self._post.connect, candidate, self._inbox, self._stats, holdings)
        observer = show_shard(self._telemetry, self.experts, f"expert:{self._index}", self._weights)
        credentials = Credentials(self._post.secret, self._spec.tls)
        loop = shard_loop(
            self._spec, self._config, self._mode, self.experts, credentials, self._inbox, self._watch, observer
        )
        self._watch.start()
        with contextlib.closing(holdings):
            loop.run()
        if not self._closed.is_set():
            log.warning("expert:%s is another's seat, or there is none; this one is a spare from now on", self._index)
            self._inbox.reopen()
            self._forget()

    def _prepared(self, order: int, bytes_read: int) -> None:
        """For the thread that loads: what the coordinator has ordered is held."""
        watch, bank = self._watch, self._bank
        if watch is None or bank is None:
            return
        self._weights["weight_bytes_read"] += bytes_read
        self._weights["weight_bytes"] = float(bank.nbytes)
        watch.push_stats(dict(self._weights))
        self._told = False
        watch.prepared(order)

    def _forget(self) -> None:
        """What was loaded, which another process serves."""
        self._applicant = replace(self._applicant, own=None, returned=True)
        self._telemetry.metrics.forget()
        self._asked_at = self._heard_at = time.monotonic()
        self._waiting, self._told = True, False
        self._watch = self._index = self._bank = self.experts = self._reports = None
        if self._spec.device == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """End the loop, and give the seat up. From another thread than `serve`'s, which returns then."""
        self._closed.set()
        self._inbox.stop()
        if self._watch is not None:
            self._watch.stop("this shard is shutting down")
        self._telemetry.close()

    @property
    def stuck(self) -> Callable[[], bool]:
        """Whether the loop hangs, as seen from now on."""
        return StuckCheck(self._inbox.activity, self._spec.patience.stuck_after_s)

    @property
    def share(self) -> int | None:
        """Whose experts it serves; None for a spare."""
        return self._index

    @property
    def is_spare(self) -> bool:
        """Whether it waits for something to serve."""
        return self._waiting

    @property
    def serves(self) -> bool:
        """Whether it has reached its peers in some epoch."""
        watch = self._watch  # of the rank's own thread
        return watch is not None and watch.has_served

    @property
    def silent_s(self) -> float:
        """Seconds since a coordinator was heard of; 0 while weights are loaded."""
        if (watch := self._watch) is not None:
            return time.monotonic() - watch.heard_at
        return time.monotonic() - self._heard_at if self._waiting else 0.0

    def _vacancy(self) -> Share | None:
        with contextlib.closing(Neighbours(self._tell_end)) as neighbours:
            while not self._closed.is_set():
                try:
                    client = self._post.connect()
                    while not self._closed.is_set():
                        share = client.vacancy(replace(self._applicant, age_s=process_age_s()), _WAIT_S)
                        self._asked_at = self._heard_at = time.monotonic()
                        if self._orphaned():
                            self._closed.wait()  # asking again would keep from others what was promised
                        elif share is not None and self._confirms(client, share.index):
                            return share
                        neighbours.watch(client.neighbours(self._post.host))
                except CoordinatorLost:
                    self._closed.wait(_RETRY_S)
                except Exception:  # whatever it was: without this thread the process would be a spare for good
                    log.exception("asking for a share of the experts failed, and begins anew")
                    self._closed.wait(_RETRY_S)
        return None

    def _confirms(self, client: CoordinatorClient, index: int) -> bool:
        """Ask again at once: what is promised to who may have died meanwhile is soon another's."""
        share = client.vacancy(self._applicant, 0.0)
        return share is not None and share.index == index

    def _is_wanted(self, index: int) -> bool:
        """Whether what was loaded is still to be served: its last holder may have come back."""
        try:
            return self._confirms(self._post.connect(), index)
        except CoordinatorLost:  # nobody knows better; who has the seat keeps it
            return True

    def _tell_end(self, holder_id: str) -> None:
        """The peers of who died are the first to know, but cannot be as sure."""
        with contextlib.suppress(CoordinatorLost):
            self._post.connect().ended(holder_id)

    def _progress(self, report: Callable[[int], None] | None, bytes_read: int) -> None:
        """Of loading; what is promised to who loads is soon another's unless it asks again."""
        if report is not None:
            report(bytes_read)
        if time.monotonic() - self._asked_at > _RENEW_S:
            self._asked_at = time.monotonic()
            with contextlib.suppress(CoordinatorLost):
                self._post.connect().vacancy(self._applicant, 0.0)

    def _stats(self) -> Stats | None:
        if self._told and not self._spec.rebalance:
            return None
        self._told = True
        return self._numbers()

    def _numbers(self) -> Stats:
        reports = self._reports
        return dict(self._weights) if reports is None else {**self._weights, "leaf_rows": reports.rows()}
