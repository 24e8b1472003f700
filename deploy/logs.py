"""Where the log of a process goes, and in which form. Libraries only make loggers; processes call `configure_logs`."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler

from divisi.deploy.settings import LogSettings


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, process, logger, message, and the record's `fields`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """For people: the fields follow the message as `name=value`."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)-7s {process} %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line, and the lines of a trace after it."""
        fields = getattr(record, "fields", {})
        told = "".join(f" {name}={json.dumps(value, default=str)}" for name, value in fields.items())
        head, newline, rest = super().format(record).partition("\n")
        return head + told + newline + rest


def configure_logs(settings: LogSettings, process: str) -> None:
    """Send this process's `divisi` log where the settings say; `process` (`ingress`, `attention`) names it there.

    The log does not go to the root logger as well, whose handlers belong to Ray or uvicorn and would write it twice.
    """
    handler: logging.Handler
    if settings.file is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        settings.file.parent.mkdir(parents=True, exist_ok=True)
        # Opened for appending, and each line is one write: several processes may share the file. It may be rotated.
        handler = WatchedFileHandler(settings.file, encoding="utf-8")
    name = f"{process}:{os.getpid()}"
    handler.setFormatter(JsonFormatter(name) if settings.format == "json" else TextFormatter(name))
    log = logging.getLogger("divisi")
    for former in list(log.handlers):
        log.removeHandler(former)
        former.close()
    log.addHandler(handler)
    log.setLevel(settings.level.upper())
    log.propagate = False
