"""Who the client is, behind proxies: `X-Forwarded-For` and `-Proto` count as far as the proxies are known."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address

from starlette.types import ASGIApp, Receive, Scope, Send

Network = IPv4Network | IPv6Network
_FOR, _PROTO = b"x-forwarded-for", b"x-forwarded-proto"


class Forwarded:
    """ASGI middleware: `client` and `scheme` of the scope are the client's own, and the state's `client` names it.

    Each proxy appends the address that called it. From the last one on, an address is believed while a trusted proxy
    has written it; what stands before that could be anybody's invention. The headers end here.
    """

    def __init__(self, app: ASGIApp, *, trusted: Sequence[Network]) -> None:
        """`trusted`: where proxies are; the one that calls this process has to be among them, too."""
        self._app = app
        self._trusted = trusted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "http":
            scope = self._seen_through(scope)
        await self._app(scope, receive, send)

    def _seen_through(self, scope: Scope) -> Scope:
        headers = scope["headers"]
        rest = [(name, value) for name, value in headers if name not in (_FOR, _PROTO)]
        peer, port = scope.get("client") or ("", 0)
        state = {**scope.get("state", {}), "client": peer}
        if not self._trusts(peer):
            return {**scope, "headers": rest, "state": state}
        client = peer
        for address in reversed(_items(headers, _FOR)):
            client = address
            if not self._trusts(address):
                break
        schemes = _items(headers, _PROTO)
        scheme = schemes[-1] if schemes and schemes[-1] in ("http", "https") else scope["scheme"]
        state["client"] = client[:64]
        return {**scope, "headers": rest, "client": (client, port), "scheme": scheme, "state": state}

    def _trusts(self, address: str) -> bool:
        try:
            found = ip_address(address)
        except ValueError:
            return False
        return any(found in network for network in self._trusted)


def _items(headers: Sequence[tuple[bytes, bytes]], wanted: bytes) -> list[str]:
    text = ",".join(value.decode("latin-1") for name, value in headers if name == wanted)
    return [item.strip() for item in text.split(",") if item.strip()]
