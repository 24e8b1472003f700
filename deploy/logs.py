"""Where the log of a process goes, and in which form. Libraries only make loggers; processes call `configure_logs`."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sys
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path

from divisi.cluster.errors import DivisiError
from divisi.cluster.telemetry.context import LOG_IDS
from divisi.deploy.settings.groups import LogSettings

_DEFAULT_MAX_BYTES = 64 * 2**20


class LogFileError(DivisiError, ValueError):
    """The log file cannot be written; the text says why and what to do."""


def with_default_file(settings: LogSettings, state_home: Path, port: int) -> LogSettings:
    """The settings with a file: where none is given, `divisi/serve-PORT.log` below `state_home`, bounded.

    Raises LogFileError where that file cannot be written.
    """
    if settings.file is not None:
        return settings
    file = state_home / "divisi" / f"serve-{port}.log"
    check_log_file(file)
    return settings.model_copy(update={"file": file, "max_file_bytes": settings.max_file_bytes or _DEFAULT_MAX_BYTES})


def check_log_file(file: Path) -> None:
    """Raise LogFileError unless lines can be appended to the file; it is neither made nor changed."""
    nearest = next(path for path in (file, *file.parents) if os.path.exists(path))
    if os.path.isdir(file):
        reason = "it is a directory"
    elif nearest != file and not os.path.isdir(nearest):
        reason = f"{nearest} is no directory"
    elif not os.access(nearest, os.W_OK if nearest == file else os.W_OK | os.X_OK):
        reason = f"{nearest} cannot be written by this user"
    else:
        return
    raise LogFileError(f"log.file: {file}: {reason}; name another file with --log-file")


class BoundedFileHandler(WatchedFileHandler):
    """Appends to a file that several processes share, and moves it to `FILE.1` once it has `max_bytes`.

    The parent class notices when a file was moved, by whomever, and opens a new one.
    """

    def __init__(self, file: Path, max_bytes: int) -> None:
        super().__init__(file, encoding="utf-8")
        self._former = f"{file}.1"
        self._max_bytes = max_bytes

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, and move the file where that made it too long."""
        super().emit(record)
        try:
            if self.stream is not None and os.fstat(self.stream.fileno()).st_size >= self._max_bytes:
                self._move(self.stream.fileno())
        except OSError:
            self.handleError(record)

    def _move(self, file: int) -> None:
        """Of several processes that find the file too long, the first moves it: only that file, and only once."""
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(file), os.stat(self.baseFilename)):
                os.replace(self.baseFilename, self._former)
        except FileNotFoundError:
            pass  # moved by another program
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, process, logger, message, of which request, and the record's `fields`."""

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
            **LOG_IDS.get(),
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
        fields = {**LOG_IDS.get(), **getattr(record, "fields", {})}
        told = "".join(f" {name}={json.dumps(value, default=str)}" for name, value in fields.items())
        head, newline, rest = super().format(record).partition("\n")
        return head + told + newline + rest


def configure_logs(settings: LogSettings, process: str) -> None:
    """Send this process's `divisi` log where the settings say; `process` (`ingress`, `attention`, `gang`) names it.

    The log does not go to the root logger as well, whose handlers belong to Ray or uvicorn and would write it twice.
    """
    handler, trouble = _handler(settings)
    name = f"{process}:{os.getpid()}"
    handler.setFormatter(JsonFormatter(name) if settings.format == "json" else TextFormatter(name))
    log = logging.getLogger("divisi")
    for former in list(log.handlers):
        log.removeHandler(former)
        former.close()
    log.addHandler(handler)
    log.setLevel(settings.level.upper())
    log.propagate = False
    if trouble is not None:
        log.warning("the log goes to standard error: %s: %s", settings.file, trouble)


def _handler(settings: LogSettings) -> tuple[logging.Handler, str | None]:
    """Where lines go, and why not to the file: another node may lack its folder, which is no reason not to serve."""
    if settings.file is None:
        return logging.StreamHandler(sys.stderr), None
    try:
        settings.file.parent.mkdir(parents=True, exist_ok=True)
        # Opened for appending, and each line is one write: several processes may share the file. It may be rotated.
        if settings.max_file_bytes is None:
            return WatchedFileHandler(settings.file, encoding="utf-8"), None
        return BoundedFileHandler(settings.file, settings.max_file_bytes), None
    except OSError as error:
        return logging.StreamHandler(sys.stderr), error.strerror
