"""What HAProxy may open and say: edits to the configuration that Ray Serve writes. Imports nothing heavy.

Ray's template has settings for most things; what it has none for is changed here, and a line that is not where it was
is an error, since HAProxy would do what nobody wants: listen on all interfaces, or answer in HTML.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

ERROR_STATUSES = (500, 502, 503, 504)
"""What HAProxy answers by itself to a request; what it cannot take for one gets 400 or 408 in HTML, unchangeably."""
_HEAD_S = 60
"""Longest wait for the head of a request: without it, connections that say nothing would be held for an hour."""
_OFF = ("frontend prometheus", "listen stats")
"""Sections that would listen on ports of all interfaces."""
_PLACE = "place.json"


class ConfigError(ValueError):
    """The configuration is not as this version of Ray writes it; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class Place:
    """What one HAProxy gets of the machine."""

    host: str
    """Address to listen on."""
    port: int
    folder: str
    """Its own; holds this, an answer for each of ERROR_STATUSES, and what Ray puts there."""
    cores: tuple[int, ...] = ()
    """Those that it keeps to; empty: all."""

    @property
    def bind(self) -> str:
        """The address as HAProxy writes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def error_file(self, status: int) -> Path:
        """The whole answer, from the status line on."""
        return Path(self.folder) / f"answer-{status}.http"

    def save(self) -> None:
        """Leave it in the folder for the program that starts HAProxy."""
        (Path(self.folder) / _PLACE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: str) -> Place:
        """What `save` left there."""
        values = json.loads((Path(folder) / _PLACE).read_text(encoding="utf-8"))
        return cls(**(values | {"cores": tuple(values["cores"])}))


def confine(config: str, place: Place) -> str:
    """The configuration with one listener, an admin socket of the user's own, no log, and answers in OpenAI's shape.

    The proxy that Ray keeps as a substitute for ingress replicas is left out: it would let requests wait for one
    without a limit. An HAProxy that is replaced closes idle connections: it knows only the replicas of its own time,
    and would send their next requests there. Before Ray has told a new one of any, it answers 503 to all, not 404.
    It adds who called it to X-Forwarded-For.
    Raises ConfigError.
    """
    sections = [section for section in _sections(config) if section[0] not in _OFF]
    edited = "\n".join("\n".join(_edit(section, place)) for section in sections) + "\n"
    if (binds := re.findall(r"^\s*bind\s+(.*)$", edited, re.M)) != [place.bind]:
        raise ConfigError(f"HAProxy would listen on {', '.join(binds) or 'nothing'}, not just on {place.bind}")
    return edited


def has_servers(config: str) -> bool:
    """Whether it names a replica."""
    return re.search(r"^\s*server ", config, re.M) is not None


def admin_socket(config: str) -> str:
    """Path of the admin socket. Raises ConfigError."""
    found = re.search(r"^\s*stats socket (\S+)", config, re.M)
    if found is None:
        raise ConfigError("no 'stats socket' in the configuration")
    return found[1]


def _sections(config: str) -> list[list[str]]:
    """Lines by section; the head of a section is not indented."""
    sections: list[list[str]] = []
    for line in config.splitlines():
        if line.strip() and not line[0].isspace():
            sections.append([])
        if not sections:
            raise ConfigError(f"{line!r} belongs to no section")
        sections[-1].append(line)
    return sections


def _edit(section: list[str], place: Place) -> list[str]:
    head = section[0]
    if head == "global":
        section = _replace(section, r"    log .*", [], head)
        return _replace(section, r"(    stats socket \S+) mode 666 (.*)", [r"\1 mode 600 \2"], head)
    if head == "defaults":
        section = _replace(section, r"    errorfile .*", [], head)
        section = _replace(section, r"    option idle-close-on-response", [], head)
        answers = [f"    errorfile {status} {place.error_file(status)}" for status in ERROR_STATUSES]
        return [*section, f"    timeout http-request {_HEAD_S}s", "    option forwardfor", *answers]
    if head == "frontend http_frontend":
        return _replace(section, r"    bind .*", [f"    bind {place.bind}"], head)
    if head == "backend default_backend":
        return _replace(section, r"    http-request return status 404 .*", [], head)
    return [line for line in section if not re.fullmatch(r"\s*server .* backup", line)]


def _replace(section: list[str], pattern: str, by: list[str], head: str) -> list[str]:
    """Put the lines of `by` in place of each line that matches. Raises ConfigError where none does."""
    matches = [(line, re.fullmatch(pattern, line)) for line in section]
    if not any(match for _, match in matches):
        raise ConfigError(f"no line like {pattern!r} in the section {head!r}")
    edited: list[str] = []
    for line, match in matches:
        edited += [line] if match is None else [match.expand(text) for text in by]
    return edited
