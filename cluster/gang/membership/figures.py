"""What a coordinator knows of its gang's processes in numbers, and where they are scraped. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from divisi.cluster.gang.membership.holder import Holder
from divisi.cluster.gang.membership.ordinals import Ordinals
from divisi.cluster.gang.membership.status import Stats
from divisi.cluster.seats import GangShape, Membership, ScrapeTarget, Seat


class Figures:
    """Of one gang; plain data, and no clock."""

    def __init__(self) -> None:
        self.stats: dict[str, Stats] = {}
        """The last of each holder."""
        self.progress: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.ingresses = Ordinals()
        self.joins: Counter[str] = Counter()
        self.epochs = 0
        """That were formed."""
        self._last_epoch = 0

    def count(self, membership: Membership | None) -> None:
        """The epoch of now."""
        if membership is not None and membership.epoch != self._last_epoch:
            self._last_epoch = membership.epoch
            self.epochs += 1

    def by_seat(self, holders: Iterable[Holder]) -> dict[str, Stats]:
        """The statistics of those who hold seats; those of others are forgotten."""
        seats = {holder.holder_id: str(holder.seat) for holder in holders}
        self.stats = {holder_id: stats for holder_id, stats in self.stats.items() if holder_id in seats}
        return {seats[holder_id]: stats for holder_id, stats in self.stats.items()}

    def weights_read(self) -> dict[str, float]:
        """Bytes of weights that each shard has read, by its holder."""
        found = {who: stats.get("weight_bytes_read") for who, stats in self.stats.items()}
        return {who: read for who, read in found.items() if isinstance(read, float)}

    def of_gang(
        self, shape: GangShape, seats_filled: int, membership: Membership | None
    ) -> dict[str, float | Mapping[str, float]]:
        """Seats and epochs."""
        return {
            "seats": shape.size,
            "seats_filled": seats_filled,
            "epoch": 0 if membership is None else membership.epoch,
            "epochs": self.epochs,
            "seat_joins": dict(self.joins),
        }

    def targets(self, own: ScrapeTarget | None, holders: Iterable[Holder], now: float) -> tuple[ScrapeTarget, ...]:
        """Whose metrics can be scraped; `own`: the coordinator's."""
        targets = [] if own is None else [own]
        targets += [ScrapeTarget("ingress", *known) for known in self.ingresses.all(now) if known[2]]
        for holder in sorted(holders, key=_seat):
            if holder.address.metrics:
                seat, address = holder.seat, holder.address
                targets.append(ScrapeTarget(seat.role, seat.index, address.host, address.metrics))
        return tuple(targets)


def _seat(holder: Holder) -> Seat:
    return holder.seat
