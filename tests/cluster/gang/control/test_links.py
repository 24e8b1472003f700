"""Whom a rank blames when it leaves an epoch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from divisi.cluster.errors import StepAborted
from divisi.cluster.gang.control import links
from divisi.cluster.gang.control.links import shard_links
from divisi.cluster.gang.loops.inbox import Assignment, EpochInbox
from divisi.cluster.seats import Address, GangShape, Membership
from tests.support.credentials import CREDENTIALS

SHAPE = GangShape(2, 1)
MEMBERSHIP = Membership(7, SHAPE, ("a", "b", "e"), (Address("h"),) * 3, Address("s"))


class Mesh:
    """Nobody is at its other end."""

    def __init__(self, *_: object) -> None:
        self.beats: dict[Any, Any] = {}

    def close(self) -> None:
        pass


class Group:
    """Takes long to close: the peers have noticed, have told the coordinator, and that one has ended the epoch."""

    def __init__(self, inbox: EpochInbox) -> None:
        self._inbox = inbox

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        self._inbox.interrupt(MEMBERSHIP.epoch)


@pytest.fixture
def inbox(monkeypatch: pytest.MonkeyPatch) -> EpochInbox:
    inbox = EpochInbox()
    monkeypatch.setattr(links, "FollowerMesh", Mesh)
    monkeypatch.setattr(links, "join_group", lambda *_: Group(inbox))
    monkeypatch.setattr(links.Peers, "of", lambda membership, rank, join: join(1))
    return inbox


def leave(inbox: EpochInbox, interrupted: bool) -> str | None:
    """Whose loss it is put down to."""
    try:
        with shard_links(Assignment(MEMBERSHIP, 2), inbox, torch.device("cpu"), CREDENTIALS):
            if interrupted:
                inbox.interrupt(MEMBERSHIP.epoch)
            raise StepAborted("shared memory was closed", "attention:1")
    except StepAborted as error:
        return error.seat


def test_who_was_lost_is_blamed_although_the_epoch_ends_while_connections_are_closed(inbox: EpochInbox) -> None:
    assert leave(inbox, interrupted=False) == "attention:1"


def test_nobody_is_blamed_for_what_an_interruption_broke(inbox: EpochInbox) -> None:
    assert leave(inbox, interrupted=True) is None
