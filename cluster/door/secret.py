"""The secret that all processes of a gang share, and the file it can stand in."""

from __future__ import annotations

import os
import secrets
import stat
from hashlib import blake2b
from pathlib import Path

from divisi.cluster.door.errors import SecretError

MIN_CHARS, MAX_CHARS = 32, 4096
_KEY_BYTES = 32
_REMEDY = "make one with: (umask 077; openssl rand -hex 32 > FILE)"


class Secret:
    """A key of 32 bytes. Its text never shows it, and it refuses to be pickled: who needs it reads it where it is."""

    __slots__ = ("key",)

    def __init__(self, key: bytes) -> None:
        """Raises SecretError."""
        if len(key) != _KEY_BYTES:
            raise SecretError(f"a secret's key has {_KEY_BYTES} bytes, this one has {len(key)}")
        self.key = key

    @classmethod
    def draw(cls) -> Secret:
        """A new one."""
        return cls(secrets.token_bytes(_KEY_BYTES))

    @classmethod
    def load(cls, path: Path) -> Secret:
        """The secret of a file: one line of text, whose key is its hash. Raises SecretError."""
        try:
            with path.open("rb") as file:
                _check_mode(path, os.fstat(file.fileno()))
                data = file.read(MAX_CHARS + 16)
            text = data.decode("utf-8-sig").strip()  # a byte order mark and the last line's end are no part of it
        except OSError as error:
            raise SecretError(f"{path}: cannot read the secret: {error.strerror}") from None
        except UnicodeDecodeError:
            raise SecretError(f"{path}: the secret is not UTF-8 text; {_REMEDY}") from None
        if len(text.splitlines()) > 1:
            raise SecretError(f"{path}: holds several lines, where a secret is one; leave that one only")
        if not MIN_CHARS <= len(text) <= MAX_CHARS:
            raise SecretError(
                f"{path}: a secret has {MIN_CHARS} to {MAX_CHARS} characters, this one has {len(text)}"
                f"{' or more' if len(text) > MAX_CHARS else ''}; {_REMEDY}"
            )
        return cls(blake2b(text.encode(), digest_size=_KEY_BYTES, person=b"divisi secret").digest())

    def __repr__(self) -> str:
        return "Secret(...)"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a secret does not travel; read it again where it is needed")


def _check_mode(path: Path, found: os.stat_result) -> None:
    """A group may read it: a mounted secret is owned by root, and read by the group of the container's user."""
    if not stat.S_ISREG(found.st_mode):
        raise SecretError(f"{path}: is no regular file; give the file that holds the secret")
    if found.st_mode & (stat.S_IRWXO | stat.S_IWGRP | stat.S_IXGRP):
        raise SecretError(
            f"{path}: other users may read or change the secret (mode {stat.S_IMODE(found.st_mode):04o}); "
            f"run: chmod 600 {path} (a secret mounted by Kubernetes: defaultMode: 0440)"
        )
