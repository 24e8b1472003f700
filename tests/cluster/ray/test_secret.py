"""Where a gang's secret comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from divisi.cluster.door import Secret, SecretError
from divisi.cluster.ray import secret
from divisi.cluster.ray.secret import gang_secret
from divisi.cluster.seats import GangShape
from tests.support.thread_gang import small_spec


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[bytes, bytes], bytes]:
    """Ray's key-value store."""
    store: dict[tuple[bytes, bytes], bytes] = {}

    def put(key: bytes, value: bytes, overwrite: bool, *, namespace: bytes) -> None:
        assert not overwrite
        store.setdefault((namespace, key), value)

    monkeypatch.setattr(secret, "_internal_kv_put", put)
    monkeypatch.setattr(secret, "_internal_kv_get", lambda key, *, namespace: store[namespace, key])
    return store


def test_a_drawn_secret_is_the_same_for_all_that_ask(kept: dict[tuple[bytes, bytes], bytes], tmp_path: Path) -> None:
    spec = small_spec(tmp_path, GangShape(1, 0))
    first, second = gang_secret(spec), gang_secret(spec)
    assert first.key == second.key
    assert gang_secret(small_spec(tmp_path, GangShape(1, 0), name="another")).key != first.key
    assert first.key.hex() not in repr(spec)
    assert repr(first.key) not in repr(spec)


def test_a_file_wins_and_leaves_nothing_with_ray(kept: dict[tuple[bytes, bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.touch(mode=0o600)
    path.write_text("c0ffee" * 8)
    assert gang_secret(small_spec(tmp_path, GangShape(1, 0), secret_file=str(path))).key == Secret.load(path).key
    assert not kept
    path.unlink()
    with pytest.raises(SecretError, match="No such file"):
        gang_secret(small_spec(tmp_path, GangShape(1, 0), secret_file=str(path)))
