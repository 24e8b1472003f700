"""Whose word on the client counts."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest

from divisi.deploy.api.middleware.forwarded import Forwarded

TRUSTED = [ip_network("127.0.0.1/32"), ip_network("10.0.0.0/8"), ip_network("fd00::/8")]


async def seen(peer: str, *headers: tuple[str, str]) -> dict[str, Any]:
    """The scope that the application gets."""
    found: dict[str, Any] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.update(scope)

    raw = [(name.encode(), value.encode()) for name, value in headers]
    scope = {"type": "http", "scheme": "http", "client": (peer, 1234), "headers": raw}
    await Forwarded(app, trusted=TRUSTED)(scope, None, None)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("127.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("127.0.0.1", ["203.0.113.9, 10.1.2.3"], "203.0.113.9"),
        ("127.0.0.1", ["203.0.113.9", "10.1.2.3"], "203.0.113.9"),  # each proxy its own line
        ("127.0.0.1", ["198.51.100.1, 203.0.113.9, 10.1.2.3"], "203.0.113.9"),  # the first is the client's invention
        ("127.0.0.1", ["10.9.9.9, 10.1.2.3"], "10.9.9.9"),
        ("127.0.0.1", [], "127.0.0.1"),
        ("127.0.0.1", ["nobody"], "nobody"),
        ("fd00::1", ["2001:db8::7"], "2001:db8::7"),
        ("203.0.113.9", ["198.51.100.1"], "203.0.113.9"),  # not a proxy: its header counts for nothing
        ("", ["198.51.100.1"], ""),
    ],
)  # fmt: skip
async def test_the_client_is_the_last_that_no_proxy_is(peer: str, forwarded: list[str], client: str) -> None:
    scope = await seen(peer, *(("x-forwarded-for", value) for value in forwarded), ("accept", "*/*"))
    assert scope["client"][0] == client == scope["state"]["client"]
    assert scope["headers"] == [(b"accept", b"*/*")]


@pytest.mark.parametrize(("peer", "proto", "scheme"), [
    ("10.0.0.1", "https", "https"), ("10.0.0.1", "gopher", "http"), ("203.0.113.9", "https", "http"),
])  # fmt: skip
async def test_the_scheme_is_what_a_proxy_says(peer: str, proto: str, scheme: str) -> None:
    assert (await seen(peer, ("x-forwarded-proto", proto)))["scheme"] == scheme


async def test_a_long_name_does_not_fill_the_log() -> None:
    assert len((await seen("10.0.0.1", ("x-forwarded-for", "x" * 5000)))["state"]["client"]) == 64
