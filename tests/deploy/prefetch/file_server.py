"""An HTTP server with a model's files, as a hub and as a plain folder; it can be slow, break off, and lie."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Files:
    """What is served, and how."""

    contents: dict[str, bytes]
    ranges: bool = True
    pause_s: float = 0.0
    """After each 64 KiB."""
    token: str | None = None
    break_after: dict[str, int] = field(default_factory=dict)
    """Bytes after which a connection ends, once."""
    replaced: dict[str, bytes] = field(default_factory=dict)
    """Other contents than those whose digests are told."""
    sent: dict[str, int] = field(default_factory=dict)
    """Bytes of each file that were written to clients."""
    flowing: threading.Event = field(default_factory=threading.Event)
    """Set once a megabyte has been sent."""
    url: str = ""

    def tree(self) -> list[dict[str, object]]:
        """As a hub lists a commit: SHA-256 of the large ones, git's SHA-1 of the others."""
        entries: list[dict[str, object]] = [{"type": "directory", "path": "folder", "oid": "0" * 40, "size": 0}]
        for path, content in self.contents.items():
            oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry: dict[str, object] = {"type": "file", "path": path, "oid": oid, "size": len(content)}
            if path.endswith(".safetensors"):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
            entries.append(entry)
        return entries

    def sums(self) -> bytes:
        """As `sha256sum *` writes them."""
        lines = [f"{hashlib.sha256(content).hexdigest()}  {path}\n" for path, content in self.contents.items()]
        return "".join(lines).encode()


@contextmanager
def serving(files: Files) -> Iterator[Files]:
    """On a port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(files))
    files.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)  # how often it looks for its end
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def _handler(files: Files) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if files.token is not None and self.headers["Authorization"] != f"Bearer {files.token}":
                self._reply(401, b"")
            elif path == f"/api/models/owner/name/tree/{REVISION}":
                self._reply(200, json.dumps(files.tree()).encode())
            elif path == "/plain/SHA256SUMS":
                self._reply(200, files.sums())
            else:
                name = path.removeprefix(f"/owner/name/resolve/{REVISION}/").removeprefix("/plain/")
                content = files.replaced.get(name, files.contents.get(name))
                if content is None:
                    self._reply(404, b"")
                else:
                    self._send(name, content)

        def _reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _send(self, name: str, content: bytes) -> None:
            first = 0
            if files.ranges and (asked := self.headers["Range"]):
                first = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(content) - first))
            self.end_headers()
            limit = files.break_after.pop(name, None)
            for start in range(first, len(content), 2**16):
                if limit is not None and start - first >= limit:
                    self.close_connection = True
                    return
                piece = content[start : start + 2**16]
                try:
                    self.wfile.write(piece)
                except OSError:
                    return
                files.sent[name] = files.sent.get(name, 0) + len(piece)
                if sum(files.sent.values()) > 2**20:
                    files.flowing.set()
                if files.pause_s:
                    time.sleep(files.pause_s)  # a slow line

    return Handler
