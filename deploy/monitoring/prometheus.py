"""A Prometheus beside a running server: its configuration, and the command that runs it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from divisi.cluster.errors import DivisiError
from divisi.deploy.monitoring.alerts import rules


class NoPrometheus(DivisiError):
    """There is no Prometheus to run; the text says what to install."""


def config(server: str, rule_file: str, key_file: str | None = None, every_s: int = 5) -> str:
    """The configuration for the server at a URL without path; `key_file` holds an API key where it wants one."""
    discovery: dict[str, Any] = {"url": f"{server}/metrics/targets", "refresh_interval": f"{every_s}s"}
    if key_file is not None:
        discovery["authorization"] = {"credentials_file": key_file}
    scraped = {"job_name": "divisi", "http_sd_configs": [discovery]}
    interval = f"{every_s}s"
    written = {
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "rule_files": [rule_file],
        "scrape_configs": [scraped],
    }
    spelled: str = yaml.safe_dump(written, sort_keys=False)
    return spelled


def prepare(folder: Path, server: str, listen: str, key: str | None = None, every_s: int = 5) -> list[str]:
    """Write configuration and rules below `folder`, where the data will be too; returns the command to run.

    Raises NoPrometheus and OSError.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise NoPrometheus("there is no `prometheus` on the PATH; install it, on Debian: apt-get install prometheus")
    folder.mkdir(parents=True, exist_ok=True)
    key_file = None
    if key is not None:
        key_file = folder / "key"
        descriptor = os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(key)
    (folder / "alerts.yaml").write_text(rules(), encoding="utf-8")
    text = config(server, str(folder / "alerts.yaml"), None if key_file is None else str(key_file), every_s)
    (folder / "prometheus.yaml").write_text(text, encoding="utf-8")
    return [
        program, f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={listen}", "--log.level=warn",
    ]  # fmt: skip


def root_of(base_url: str) -> str:
    """The server's URL without the path of its API, which ends in /v1."""
    return base_url.rstrip("/").removesuffix("/v1")


def answer_of(text: str) -> list[Any]:
    """The result of a query, from what Prometheus has answered. Raises ValueError with its error."""
    answer = json.loads(text)
    if answer.get("status") != "success":
        raise ValueError(str(answer.get("error", text)))
    found: list[Any] = answer["data"]["result"]
    return found
