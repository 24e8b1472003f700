"""The secret and its file."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from divisi.cluster.door import Secret, SecretError

TEXT = "c0ffee" * 8


def write(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("data", [TEXT, f"{TEXT}\n", f"\ufeff{TEXT}\r\n", f"  {TEXT}\t\n\n"],
                         ids=["plain", "newline", "byte order mark", "blanks"])  # fmt: skip
def test_what_an_editor_adds_is_no_part_of_it(tmp_path: Path, data: str) -> None:
    plain = Secret.load(write(tmp_path / "plain", TEXT.encode()))
    assert Secret.load(write(tmp_path / "other", data.encode())).key == plain.key


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", r"this one has 0; make one with"),
        (b" \n", "this one has 0"),
        (b"short", "32 to 4096 characters, this one has 5"),
        (b"a" * 5000, "or more"),
        (b"\xff" * 40, "not UTF-8"),
        (f"{TEXT}\n{TEXT}\n".encode(), "several lines"),
    ],
    ids=["empty", "blank", "short", "long", "binary", "lines"],
)
def test_a_file_that_is_no_secret_is_refused_and_not_quoted(tmp_path: Path, data: bytes, says: str) -> None:
    path = write(tmp_path / "secret", data)
    with pytest.raises(SecretError, match=says) as error:
        Secret.load(path)
    assert str(path) in str(error.value)
    assert TEXT not in str(error.value)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o660, 0o666])
def test_a_secret_that_others_may_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(SecretError, match=r"chmod 600 .*secret"):
        Secret.load(write(tmp_path / "secret", TEXT.encode(), mode))


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o440])
def test_a_secret_that_the_group_may_read_is_taken(tmp_path: Path, mode: int) -> None:
    assert len(Secret.load(write(tmp_path / "secret", TEXT.encode(), mode)).key) == 32


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(SecretError, match=r"missing: cannot read the secret: No such file"):
        Secret.load(tmp_path / "missing")
    with pytest.raises(SecretError, match="cannot read the secret"):
        Secret.load(tmp_path)


def test_a_secret_shows_and_travels_nowhere() -> None:
    secret = Secret.draw()
    assert secret.key.hex() not in repr(secret) + str(secret) + f"{secret}"
    assert repr(secret.key) not in repr(secret)
    with pytest.raises(TypeError, match="does not travel"):
        pickle.dumps(secret)
    with pytest.raises(SecretError, match="has 3"):
        Secret(b"abc")
    assert Secret.draw().key != secret.key
