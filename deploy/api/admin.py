"""The route for those who run the server: how many expert shards there are, and another number of them."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from divisi.cluster.gang.membership.layout.scaling import ScaleStatus
from divisi.deploy.api.body.protocol import GangBody
from divisi.deploy.api.body.reading import read_parsed
from divisi.deploy.api.body.replayed import Dropped
from divisi.deploy.api.engine_client import GangAdmin
from divisi.deploy.api.errors import ApiError
from divisi.deploy.api.middleware.auth import key_of

_MOST_BYTES = 4096


class AdminApi:
    """The endpoints."""

    def __init__(self, gang: GangAdmin, has_keys: bool) -> None:
        """`has_keys`: whether the server knows its callers by a file of API keys."""
        self._gang, self._has_keys = gang, has_keys

    async def scale(self, http: HttpRequest) -> Response:
        """POST /v1/admin/gang: have so many expert shards. Answers at once; GET shows how it goes."""
        self._check(http)
        body = await read_parsed(GangBody, http, _MOST_BYTES, Dropped())
        try:
            status = await self._gang.scale(body.expert_shards)
        except ValueError as error:
            raise ApiError(str(error), param="expert_shards") from None
        return JSONResponse(_shown(status), 202 if status.waits_for else 200)

    async def show(self, http: HttpRequest) -> Response:
        """GET /v1/admin/gang: how many expert shards serve and are to, and what that waits for."""
        self._check(http)
        return JSONResponse(_shown(await self._gang.scale_status()))

    def _check(self, http: HttpRequest) -> None:
        if not self._has_keys:
            raise ApiError(
                "this server has no file of API keys, so that anybody could do this; give it one by "
                "auth.api_keys_file, or use `divisi scale` on the server's machine",
                status=403,
                code="admin_only",
            )
        if (key := key_of(http.scope)) is None or not key.admin:
            raise ApiError(
                "this is for keys that are marked 'admin: true' in the server's key file; use such a key",
                status=403,
                code="admin_only",
            )


def _shown(status: ScaleStatus) -> dict[str, object]:
    return {
        "expert_shards": status.expert_shards,
        "wanted": status.wanted,
        "waits_for": list(status.waits_for),
        "seconds": {part: round(seconds, 3) for part, seconds in status.seconds.items()},
        "bytes_read": status.bytes_read,
        "why": status.why,
    }
