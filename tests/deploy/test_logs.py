"""The form of log lines, and that several processes may share a file."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from divisi.deploy.logs import configure_logs
from divisi.deploy.settings import LogSettings


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    log = logging.getLogger("divisi")
    handlers, level, propagate = list(log.handlers), log.level, log.propagate
    yield
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    for handler in handlers:
        log.addHandler(handler)
    log.setLevel(level)
    log.propagate = propagate


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "divisi.jsonl"
    for process in ("ingress", "attention"):
        configure_logs(LogSettings(file=file), process)
        log = logging.getLogger("divisi.test")
        log.debug("not shown")
        log.info("request", extra={"fields": {"status": 200, "key": "t\n€"}})
    try:
        raise ValueError("no")
    except ValueError:
        log.exception("failed")
    first, second, third = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert (first["message"], first["status"], first["key"], first["level"]) == ("request", 200, "t\n€", "info")
    assert first["process"].startswith("ingress:")
    assert second["process"].startswith("attention:")
    assert "ValueError: no" in third["exception"]


def test_text_lines(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(LogSettings(format="text", level="warning"), "ingress")
    logging.getLogger("divisi.test").warning("slow", extra={"fields": {"status": 200}})
    logging.getLogger("divisi.test").info("not shown")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("divisi.test: slow status=200")
