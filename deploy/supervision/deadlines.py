"""When the driver has to be gone. Pure: times are passed in."""

from __future__ import annotations

from dataclasses import dataclass

TAKE_DOWN_S = 7.0
"""From the end of the grace to the driver's end: error events for what is still open (3 s), then Serve and Ray."""
KEEPER_S = 1.5
"""What the keeper may take beyond that to end what is left, before the front process ends the keeper, too."""


@dataclass
class Deadlines:
    """What has been ordered and when, and what the driver has said about itself."""

    grace_s: float
    has_ray: bool = False
    """Whether there may be an application; before that, there is nothing to take down."""
    answers_open: bool = False
    """Whether answers may be open; before the gang is ready there is nothing that needs the grace."""
    joined: bool = False
    """Whether the application lives on a cluster that was there before, so that only the driver can remove it."""
    stop_at: float | None = None
    hurry_at: float | None = None
    abandoned_at: float | None = None
    taking_down_at: float | None = None

    def stop(self, now: float) -> None:
        """A first signal came; more of them change nothing."""
        self.stop_at = now if self.stop_at is None else self.stop_at

    def hurry(self, now: float) -> None:
        """A second signal came."""
        self.stop(now)
        self.hurry_at = now if self.hurry_at is None else self.hurry_at

    def abandon(self, now: float) -> None:
        """The front process is gone, and with it whoever could give orders."""
        self.hurry(now)
        self.abandoned_at = now if self.abandoned_at is None else self.abandoned_at

    def take_down(self, now: float) -> None:
        """The driver has begun to take everything down, ordered or by itself."""
        self.taking_down_at = now if self.taking_down_at is None else self.taking_down_at

    @property
    def end(self) -> float | None:
        """When the driver has to be gone; None while it may go on."""
        ends = []
        if self.stop_at is not None:
            grace_s = self.grace_s if self.answers_open else 0.0
            ends.append(self.stop_at + (grace_s + TAKE_DOWN_S if self.has_ray else 0.0))
        if self.hurry_at is not None:
            ends.append(self.hurry_at + (TAKE_DOWN_S if self.answers_open or self.joined else 0.0))
        if self.abandoned_at is not None:
            ends.append(self.abandoned_at + (TAKE_DOWN_S if self.joined else 0.0))
        if self.taking_down_at is not None:
            ends.append(self.taking_down_at + TAKE_DOWN_S)
        return min(ends, default=None)
