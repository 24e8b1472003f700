"""Scaling by HTTP: who may, and what they are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import jsonschema
import pytest

from divisi.cluster.errors import GangNotReady
from divisi.cluster.gang.membership.coordinator import Coordinator
from divisi.cluster.gang.membership.layout.scaling import ScaleStatus
from divisi.cluster.seats import Address, GangShape
from divisi.deploy.limits import KeyFile
from divisi.deploy.limits.keys import hash_key
from divisi.model.text import TextCodec
from tests.deploy.api.conftest import SETTINGS
from tests.deploy.api.fake_engine import FakeEngine, serve

ADMIN, OTHER = "dv-who-runs-the-server", "dv-who-only-asks-it"
KEYS = f"""
keys:
  - {{name: admin, hash: "{hash_key(ADMIN)}", admin: true}}
  - {{name: other, hash: "{hash_key(OTHER)}"}}
"""
PATH = "/v1/admin/gang"


class Gang:
    """As an ingress reaches it."""

    def __init__(self) -> None:
        self.coordinator: Coordinator | None = Coordinator(GangShape(1, 2), Address("h", 1))

    async def scale(self, expert_shards: int) -> ScaleStatus:
        return self._coordinator().scale(expert_shards)

    async def scale_status(self) -> ScaleStatus:
        return self._coordinator().scale_status()

    def _coordinator(self) -> Coordinator:
        if self.coordinator is None:
            raise GangNotReady("there is no coordinator")
        return self.coordinator


@contextmanager
def client_of(gang: Gang, text: TextCodec, keys: KeyFile | None, key: str | None) -> Iterator[httpx.Client]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    engine = FakeEngine(text.tokenizer)
    with (
        serve(engine, text, SETTINGS, keys=keys, admin=gang) as url,
        httpx.Client(base_url=url, headers=headers) as http,
    ):
        yield http


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    (path := tmp_path / "keys.yaml").write_text(KEYS)
    return KeyFile(path)


def test_a_number_is_asked_for_and_shown(text: TextCodec, keys: KeyFile) -> None:
    with client_of(Gang(), text, keys, ADMIN) as http:
        reply = http.post(PATH, json={"expert_shards": 3})
        assert (reply.status_code, reply.json()["wanted"]) == (202, 3)
        assert "expert:2 is not there yet" in reply.json()["waits_for"]
        assert http.get(PATH).json() == reply.json()
        said = http.get("/openapi.json").json()["paths"][PATH]["post"]
        jsonschema.validate(reply.json(), said["responses"]["202"]["content"]["application/json"]["schema"])
        assert http.post(PATH, json={"expert_shards": 2}).status_code == 202, "no epoch has formed yet"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"expert_shards": 33}, "expert_shards=33: the experts are cut into 32 virtual shards; give 1 to 32"),
        ({"expert_shards": 0}, "expert_shards: input should be greater than or equal to 1, but it is 0"),
        ({}, "expert_shards is required"),
        ({"expert_shard": 3}, "did you mean expert_shards?"),
    ],
)
def test_what_cannot_be_is_refused(text: TextCodec, keys: KeyFile, body: dict[str, int], told: str) -> None:
    with client_of(Gang(), text, keys, ADMIN) as http:
        reply = http.post(PATH, json=body)
        assert reply.status_code == 400
        assert told in reply.json()["error"]["message"]


def test_a_colocated_gang_has_no_shards_to_scale(text: TextCodec, keys: KeyFile) -> None:
    gang = Gang()
    gang.coordinator = Coordinator(GangShape(2, 2, colocated=True), Address("h", 1))
    with client_of(gang, text, keys, ADMIN) as http:
        error = http.post(PATH, json={"expert_shards": 3}).json()["error"]
        assert (error["param"], "use gang.topology 'split'" in error["message"]) == ("expert_shards", True)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_who_may_not(text: TextCodec, keys: KeyFile, method: str) -> None:
    for ring, key, status, told in (
        (None, None, 403, "use `divisi scale`"),
        (keys, OTHER, 403, "marked 'admin: true'"),
        (keys, None, 401, "no API key was sent"),
    ):
        with client_of(Gang(), text, ring, key) as http:
            reply = http.request(method, PATH, json={"expert_shards": 3})
            assert reply.status_code == status
            assert told in reply.json()["error"]["message"]


def test_nobody_to_ask(text: TextCodec, keys: KeyFile) -> None:
    gang = Gang()
    gang.coordinator = None
    with client_of(gang, text, keys, ADMIN) as http:
        assert http.get(PATH).status_code == http.post(PATH, json={"expert_shards": 3}).status_code == 503
