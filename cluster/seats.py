"""The fixed places of a gang and what fills them. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from divisi.model.placement import Layout

Role = Literal["attention", "expert"]


@dataclass(frozen=True, slots=True, order=True)
class Seat:
    """A place in the gang; it outlives the process in it. Its text form is `expert:2`."""

    role: Role
    index: int

    def __str__(self) -> str:
        return f"{self.role}:{self.index}"


@dataclass(frozen=True, slots=True)
class GangShape:
    """How many seats of each role a gang has. Ranks number the attention workers first, then the shards."""

    attention_workers: int
    expert_shards: int
    colocated: bool = False
    """Each attention worker holds a shard of the experts too, and there are no other ranks."""

    def __post_init__(self) -> None:
        if self.attention_workers < 1 or self.expert_shards < 0:
            raise ValueError(f"a gang needs attention_workers >= 1 and expert_shards >= 0, got {self}")
        if self.colocated and self.expert_shards != self.attention_workers:
            raise ValueError(f"a colocated gang has as many expert shards as attention workers, got {self}")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.attention_workers + len(self.shard_ranks)

    @property
    def seats(self) -> tuple[Seat, ...]:
        """All seats, in rank order."""
        return tuple(self.seat(rank) for rank in range(self.size))

    @property
    def shard_ranks(self) -> range:
        """Ranks that hold nothing but experts."""
        first = self.attention_workers
        return range(first, first if self.colocated else first + self.expert_shards)

    def suffices(self, filled: Collection[Seat], least_workers: int) -> bool:
        """Whether those in such seats can be an epoch: all experts, and so many attention workers or more."""
        workers = sum(seat.role == "attention" for seat in filled)
        needed = (seat for seat in self.seats if self.colocated or seat.role == "expert")
        return workers >= least_workers and all(seat in filled for seat in needed)

    def seat(self, rank: int) -> Seat:
        """The seat of a rank."""
        if rank < self.attention_workers:
            return Seat("attention", rank)
        return Seat("expert", rank - self.attention_workers)

    def rank(self, seat: Seat) -> int:
        """The rank of a seat."""
        return seat.index if seat.role == "attention" else self.attention_workers + seat.index


@dataclass(frozen=True, slots=True)
class StreamAddress:
    """Where the ingresses reach an attention worker."""

    host: str
    port: int
    """0 where no other host can reach it."""
    path: str
    """Of a Unix socket, for the ingresses of its own host."""


@dataclass(frozen=True, slots=True)
class LocalProcess:
    """A process, for others of its machine."""

    pid: int
    born: int
    """When it began, in clock ticks since the machine did: the number alone may be another's by now."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a rank can be reached: `host` for its process group, `port` of its control listener (leader only)."""

    host: str
    port: int = 0
    streams: StreamAddress | None = None
    """Of an attention worker."""
    metrics: int = 0
    """Port on which its metrics are scraped; 0: none."""
    process: str = ""
    """The name of an expert shard's process, which the one that is started in its place has too."""
    local: LocalProcess | None = None
    """That process."""


@dataclass(frozen=True, slots=True)
class ScrapeTarget:
    """A process whose metrics can be scraped."""

    role: str
    """`ingress`, `attention`, `expert` or `coordinator`."""
    index: int
    """Of its seat; else a number that no other process of the role has at the time."""
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Patience:
    """After how many seconds the ranks of an epoch suspect each other."""

    suspect_after_s: float = 2.0
    """One that is silent. A false suspicion costs an epoch."""
    stuck_after_s: float = 27.0
    """One that stands still in a step, and waits for nobody."""


@dataclass(frozen=True, slots=True)
class Membership:
    """Who takes part in one epoch; never changes. `addresses` and `holders` are in rank order.

    Ranks are the epoch's own: those who are there, attention workers first, in the order of their seats. Whatever
    outlasts an epoch goes by seat.
    """

    epoch: int
    shape: GangShape
    holders: tuple[str, ...]
    addresses: tuple[Address, ...]
    store: Address
    """The key-value store through which process groups meet."""
    absent: frozenset[Seat] = frozenset()
    """Seats that have no part: attention workers' that nobody fills, and expert seats that serve nothing."""
    patience: Patience = field(default_factory=Patience)
    layout: Layout | None = None
    """Which virtual shards each expert seat serves; None: dealt evenly, as always where workers hold the experts."""

    def __post_init__(self) -> None:
        if self.layout is not None and tuple(sorted(self.shards)) != self.layout.seats:
            raise ValueError(f"the expert seats {sorted(self.shards)} take part, and {self.layout.seats} serve experts")

    @property
    def seats(self) -> tuple[Seat, ...]:
        """The seats that are filled, in rank order."""
        return tuple(seat for seat in self.shape.seats if seat not in self.absent)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.holders)

    @property
    def workers(self) -> dict[int, int]:
        """Rank by the index of each attention seat."""
        return {seat.index: rank for rank, seat in enumerate(self.seats) if seat.role == "attention"}

    @property
    def shards(self) -> dict[int, int]:
        """Rank by the index of each share of the experts."""
        if self.shape.colocated:
            return self.workers
        return {seat.index: rank for rank, seat in enumerate(self.seats) if seat.role == "expert"}

    def rank(self, seat: Seat) -> int:
        """The rank of a seat that is filled."""
        return self.seats.index(seat)

    def ranks_beside(self, rank: int) -> int:
        """Ranks on the machine of a rank, itself included."""
        return sum(address.host == self.addresses[rank].host for address in self.addresses)

    @property
    def leader(self) -> Address:
        """Control listener of the lowest attention worker."""
        return self.addresses[0]
