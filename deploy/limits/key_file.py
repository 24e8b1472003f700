"""The file of API keys: one per line, or YAML; read again when it changes.

One per line, a key or its hash, and a name:

    sha256:9f86d0... team-a
    dv-xyz...        team-b

YAML (.yaml, .yml), with limits:

    keys:
      - name: team-a
        hash: sha256:9f86d0...
        max_concurrent: 8
        tokens_per_minute: 60000
      - name: who-runs-it
        hash: sha256:6b86b2...
        admin: true             # may change the gang, by /v1/admin/gang
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from divisi.cluster.errors import DivisiError
from divisi.deploy.limits.keys import MAX_KEY_CHARS, MIN_KEY_CHARS, ApiKey, KeyRing, hash_key, is_hash

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
Name = Annotated[str, Field(min_length=1, max_length=128)]


class KeyFileError(DivisiError, ValueError):
    """The file cannot be used; the text names the file, the entry and the remedy, and never a key."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    name: Name
    hash: str
    max_concurrent: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    admin: bool = False


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    keys: list[_Entry] = Field(min_length=1)


class KeyFile:
    """Keys of a file. The file is looked at once a second at most, and read only when it has changed."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises KeyFileError."""
        self._path = path
        self._clock = clock
        self._looked_at = clock()
        self._version = self._stat()
        self._ring = read_keys(path)

    def ring(self) -> KeyRing:
        """The keys now. A new version that cannot be read is logged, and the former keys stay valid."""
        if self._clock() - self._looked_at < _LOOK_EVERY_S:
            return self._ring
        self._looked_at = self._clock()
        try:
            version = self._stat()
            if version == self._version:
                return self._ring
            self._version = version
            self._ring = read_keys(self._path)
        except KeyFileError as error:
            logger.error("the former API keys stay valid: %s", error)
        else:
            logger.info("read %d API keys from %s", len(self._ring), self._path)
        return self._ring

    def _stat(self) -> tuple[int, int, int]:
        """Changes with the file; a mounted secret is replaced by a link to another file, so the inode counts too."""
        try:
            found = self._path.stat()
        except OSError as error:
            raise KeyFileError(f"{self._path}: cannot read the API keys: {error.strerror}") from None
        return found.st_mtime_ns, found.st_size, found.st_ino


def read_keys(path: Path) -> KeyRing:
    """Parse a key file. Raises KeyFileError."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no part of the first key
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise KeyFileError(f"{path}: cannot read the API keys: {reason}") from None
    keys = _from_yaml(path, text) if path.suffix in (".yaml", ".yml") else _from_lines(path, text)
    _check(path, keys)
    return KeyRing(keys)


def _from_lines(path: Path, text: str) -> list[ApiKey]:
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split(None, 1)
        if not words:
            continue
        secret, name = words[0], "".join(words[1:])
        hashed = secret
        if not is_hash(secret):
            if secret.startswith("sha256:"):
                raise KeyFileError(f"{path}:{number}: a hash is 'sha256:' and 64 hexadecimal digits, in lower case")
            if not MIN_KEY_CHARS <= len(secret) <= MAX_KEY_CHARS:
                raise KeyFileError(
                    f"{path}:{number}: a key has {MIN_KEY_CHARS} to {MAX_KEY_CHARS} characters, this one has "
                    f"{len(secret)}; make one with: divisi keys new"
                )
            hashed = hash_key(secret)
        keys.append(ApiKey(name.strip() or f"key-{number}", hashed))
    return keys


def _from_yaml(path: Path, text: str) -> list[ApiKey]:
    try:
        data: Any = yaml.safe_load(text)
        document = _Document.model_validate(data)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        # The error's own text would quote the line, and with it perhaps a key.
        raise KeyFileError(f"{path}: not valid YAML{f' in line {mark.line + 1}' if mark else ''}") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the document"
        raise KeyFileError(f"{path}: {place}: {first['msg']}") from None
    except ValueError:  # of a scalar that looks like a date and is none
        raise KeyFileError(f"{path}: not valid YAML: put names that look like dates in quotes") from None
    for entry in document.keys:
        if not is_hash(entry.hash):
            raise KeyFileError(
                f"{path}: the hash of {entry.name!r} is not 'sha256:' and 64 hexadecimal digits; "
                "make a key with: divisi keys new"
            )
    return [ApiKey(e.name, e.hash, e.max_concurrent, e.tokens_per_minute, e.admin) for e in document.keys]


def _check(path: Path, keys: Sequence[ApiKey]) -> None:
    if not keys:
        raise KeyFileError(f"{path}: holds no API key, so that nobody could call; make one with: divisi keys new")
    for what, values in (("name", [key.name for key in keys]), ("key", [key.hash for key in keys])):
        if len(set(values)) < len(values):
            again = next(name for name, value in zip((k.name for k in keys), values, strict=True)
                         if values.count(value) > 1)  # fmt: skip
            raise KeyFileError(f"{path}: two entries have the {what} of {again!r}; give each its own")
