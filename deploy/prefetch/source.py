"""What files a model has, where they are, and what their contents must hash to."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

import httpx

from divisi.cluster.errors import DivisiError

_KEPT = {".json", ".safetensors", ".jinja", ".txt", ".model"}
_WEIGHTS = ".safetensors"


class FetchError(DivisiError, ValueError):
    """A model cannot be fetched; the text says from where, what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a model."""

    path: str
    """Relative to the model's folder."""
    url: str
    size: int | None
    """Bytes; None where the source does not say."""
    digest: str
    """Hexadecimal: 64 digits of SHA-256, or 40 of a git blob's SHA-1."""

    def hasher(self, size: int) -> Any:
        """To be fed the `size` bytes of the content; its hexdigest has to be `digest`."""
        if len(self.digest) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)  # git's own name of the content


class Source(Protocol):
    """Where a model comes from."""

    @property
    def name(self) -> str:
        """For people, and for the mark: the same name is the same content."""
        ...

    def files(self, client: httpx.Client) -> list[RemoteFile]:
        """All files of the model. Raises FetchError and httpx.HTTPError."""
        ...


@dataclass(frozen=True, slots=True)
class Hub:
    """A commit of a repository on a hub with Hugging Face's API."""

    endpoint: str
    repo: str
    revision: str

    @property
    def name(self) -> str:
        """See Source."""
        return f"{self.repo}@{self.revision}"

    def files(self, client: httpx.Client) -> list[RemoteFile]:
        """See Source."""
        if re.fullmatch(r"[0-9a-f]{40}", self.revision) is None:
            raise FetchError(f"revision {self.revision!r} is no commit; give its 40 hexadecimal digits")
        base = self.endpoint.rstrip("/")
        found = []
        for entry in self._tree(client, f"{base}/api/models/{self.repo}/tree/{self.revision}?recursive=true"):
            path = str(entry["path"])
            if entry["type"] == "file" and wanted(path):
                large = entry.get("lfs")
                digest = str(large["oid"] if large else entry["oid"]).removeprefix("sha256:")
                url = f"{base}/{self.repo}/resolve/{self.revision}/{path}"
                found.append(RemoteFile(path, url, int(entry["size"]), digest))
        return found

    def _tree(self, client: httpx.Client, url: str) -> Iterator[dict[str, Any]]:
        next_url: str | None = url
        while next_url is not None:
            reply = client.get(next_url)
            explain(reply)
            yield from reply.json()
            next_url = reply.links.get("next", {}).get("url")


@dataclass(frozen=True, slots=True)
class Plain:
    """A folder on an HTTP server with a file SHA256SUMS, as `sha256sum` writes one."""

    url: str

    @property
    def name(self) -> str:
        """See Source."""
        return self.url

    def files(self, client: httpx.Client) -> list[RemoteFile]:
        """See Source."""
        base = self.url.rstrip("/")
        reply = client.get(f"{base}/SHA256SUMS")
        explain(reply)
        found = []
        for line in filter(None, reply.text.splitlines()):
            match = re.fullmatch(r"([0-9a-f]{64}) [ *](?:\./)?(.+)", line)
            if match is None:
                raise FetchError(f"{base}/SHA256SUMS: {line!r} is no line of sha256sum's")
            if wanted(match[2]):
                found.append(RemoteFile(match[2], f"{base}/{match[2]}", None, match[1]))
        return found


def wanted(path: str) -> bool:
    """Whether a file is one that Divisi reads. Raises FetchError for a path that leads elsewhere."""
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts:
        raise FetchError(f"the source names a file {path!r} outside the model's folder")
    return not any(part.startswith(".") for part in parts) and PurePosixPath(path).suffix in _KEPT


def holds_weights(file: RemoteFile) -> bool:
    """Whether it is one of the large files that only ranks read."""
    return file.path.endswith(_WEIGHTS)


def explain(reply: httpx.Response) -> None:
    """Raise FetchError where another try would not help, httpx.HTTPStatusError where it may."""
    remedies = {
        401: "give a token (model.token)", 403: "give a token whose owner may read the model (model.token)",
        404: "check the repository and the commit, or the address",
    }  # fmt: skip
    if remedy := remedies.get(reply.status_code):
        raise FetchError(f"{reply.request.url}: {reply.status_code} {reply.reason_phrase}; {remedy}")
    reply.raise_for_status()
