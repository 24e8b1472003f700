"""API keys and their file: formats, mistakes, and a file that changes."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from divisi.deploy.limits import ApiKey, KeyFile, KeyFileError, KeyRing
from divisi.deploy.limits.key_file import read_keys
from divisi.deploy.limits.keys import hash_key, is_hash, new_key

KEY = "dv-0123456789abcdef"
OTHER = "dv-fedcba9876543210"


def write(folder: Path, text: str, name: str = "keys.txt") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_new_keys_are_long_and_different() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("dv-") and len(key) >= 46 for key in keys)
    assert is_hash(hash_key(KEY))
    assert hash_key("abc") == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("presented", ["", KEY[:-1], KEY + "x", KEY.upper(), hash_key(KEY), "x" * 10**6, "\udcff"])
def test_only_the_key_itself_is_found(presented: str) -> None:
    ring = KeyRing([ApiKey("a", hash_key(KEY)), ApiKey("b", hash_key(OTHER))])
    assert ring.find(presented) is None
    assert ring.find(KEY) == ApiKey("a", hash_key(KEY))


def test_lines(tmp_path: Path) -> None:
    ring = read_keys(write(tmp_path, f"# ours\n\n{KEY}\tteam a # plain\n{hash_key(OTHER)}\n"))
    assert len(ring) == 2
    found, other = ring.find(KEY), ring.find(OTHER)
    assert found is not None
    assert other is not None
    assert (found.name, found.hash, other.name) == ("team a", hash_key(KEY), "key-4")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    ring = read_keys(write(tmp_path, f"\ufeff{KEY} team-a\n"))
    assert ring.find(KEY) is not None


def test_yaml(tmp_path: Path) -> None:
    text = f"keys:\n- name: a\n  hash: {hash_key(KEY)}\n  max_concurrent: 2\n- {{name: b, hash: '{hash_key(OTHER)}'}}\n"
    ring = read_keys(write(tmp_path, text, "keys.yaml"))
    assert ring.find(KEY) == ApiKey("a", hash_key(KEY), max_concurrent=2)
    assert ring.find(OTHER) == ApiKey("b", hash_key(OTHER))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("k.txt", "", ["no API key", "divisi keys new"]),
        ("k.txt", "shortsecret", ["k.txt:1", "16 to 512"]),
        ("k.txt", "sha256:abcsecret", ["64 hexadecimal"]),
        ("k.txt", f"{KEY} a\n{OTHER} a", ["two entries", "name", "'a'"]),
        ("k.txt", f"{KEY} a\n{hash_key(KEY)} b", ["two entries", "key"]),
        ("k.yaml", "keys: [", ["not valid YAML"]),
        ("k.yaml", f"keys:\n- {KEY}", ["keys.0"]),
        ("k.yaml", f"keys:\n- name: a\n  hash: {KEY}", ["'a'", "divisi keys new"]),
        ("k.yaml", f"keys:\n- name: a\n  hash: {hash_key(KEY)}\n  max_concurrent: 0", ["max_concurrent", "greater"]),
        ("k.yaml", f"keys:\n- name: a\n  key: {KEY}", ["keys.0"]),
        ("k.yaml", f"keys:\n- name: 2024-13-45\n  hash: {hash_key(KEY)}", ["quotes"]),
    ],
)
def test_mistakes_are_named_without_the_key(tmp_path: Path, name: str, text: str, words: list[str]) -> None:
    with pytest.raises(KeyFileError) as caught:
        read_keys(write(tmp_path, text, name))
    assert all(word in str(caught.value) for word in words), caught.value
    assert KEY not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot read the API keys"):
        KeyFile(tmp_path / "none")


def test_a_changed_file_is_read_again_once_a_second_at_most(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    path = write(tmp_path, KEY)
    keys = KeyFile(path, lambda: now)
    stats = 0
    stat = keys._stat

    def counted() -> tuple[int, int, int]:
        nonlocal stats
        stats += 1
        return stat()

    monkeypatch.setattr(keys, "_stat", counted)
    write(tmp_path, OTHER, "new")
    os.replace(tmp_path / "new", path)
    for _ in range(1000):
        assert keys.ring().find(OTHER) is None
    now = 1.5
    for _ in range(1000):
        assert keys.ring().find(OTHER) is not None
    assert keys.ring().find(KEY) is None
    assert stats == 1
    for now, damage in ((3.0, lambda: path.write_text("short")), (5.0, path.unlink)):  # noqa: B007
        caplog.clear()
        damage()
        with caplog.at_level(logging.ERROR):
            assert keys.ring().find(OTHER) is not None, "a broken file locked everybody out"
        assert "the former API keys stay valid" in caplog.text
    write(tmp_path, KEY)
    now = 7.0
    assert keys.ring().find(KEY) is not None
