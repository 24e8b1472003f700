"""Where a rank is, and how it reaches its gang: all that it has of the processes around it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from divisi.cluster.door import Secret
from divisi.cluster.gang.membership.client import CoordinatorClient


@dataclass(frozen=True, slots=True)
class Post:
    """Of one rank; `divisi.cluster.ray.post` makes those of Ray's actors."""

    host: str
    """The address that peers reach this process at."""
    secret: Secret
    """What the processes of the gang know each other by."""
    connect: Callable[[], CoordinatorClient]
    """Raises CoordinatorLost while there is no coordinator."""
    reported: Callable[[str], AbstractContextManager[Callable[[int], None] | None]]
    """Tells people how the loading of a rank goes, which is given by name, and how it ends; what it gives is told the
    bytes read so far."""
    process: str = ""
    """The name of an expert shard's process, which the one that is started in its place has too."""
