"""The form of log lines, and that several processes may share a file."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from divisi.deploy.logs import LogFileError, check_log_file, configure_logs, with_default_file
from divisi.deploy.settings.groups import LogSettings


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
    for process in ("ingress", "gang"):
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
    assert second["process"].startswith("gang:")
    assert "ValueError: no" in third["exception"]


def test_text_lines(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(LogSettings(format="text", level="warning"), "ingress")
    logging.getLogger("divisi.test").warning("slow", extra={"fields": {"status": 200}})
    logging.getLogger("divisi.test").info("not shown")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("divisi.test: slow status=200")


def test_the_default_file_is_the_servers_and_bounded(tmp_path: Path) -> None:
    found = with_default_file(LogSettings(level="debug"), tmp_path, 8123)
    assert found.file == tmp_path / "divisi" / "serve-8123.log"
    assert found.max_file_bytes == 64 * 2**20
    assert found.level == "debug"
    assert list(tmp_path.iterdir()) == []
    given = LogSettings(file=tmp_path / "mine.log")
    assert with_default_file(given, tmp_path, 8123) == given


def test_files_that_cannot_be_written_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for file, words in (
        (tmp_path, "is a directory"),
        (tmp_path / "file" / "a" / "b", f"{tmp_path / 'file'} is no dir"),
    ):
        with pytest.raises(LogFileError, match=words):
            check_log_file(file)
    check_log_file(tmp_path / "a" / "b")
    check_log_file(tmp_path / "file")


def test_a_file_that_cannot_be_opened_is_no_reason_not_to_serve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    configure_logs(LogSettings(file=tmp_path / "file" / "divisi.log"), "ingress")
    logging.getLogger("divisi.test").info("request")
    trouble, line = map(json.loads, capsys.readouterr().err.splitlines())
    assert str(tmp_path / "file" / "divisi.log") in trouble["message"]
    assert line["message"] == "request"


WRITER = """
import logging, sys
from pathlib import Path
from divisi.deploy.logs import configure_logs
from divisi.deploy.settings.groups import LogSettings
name, file, lines = sys.argv[1:]
configure_logs(LogSettings(file=Path(file), max_file_bytes=2**16), name)
for number in range(int(lines)):
    logging.getLogger("divisi.test").info("request", extra={"fields": {"writer": name, "number": number}})
"""


def test_processes_that_share_a_file_keep_it_bounded_and_lose_no_line(tmp_path: Path) -> None:
    file, former = tmp_path / "divisi.log", tmp_path / "divisi.log.1"
    # About 170 bytes a line: the file is moved once in all, which nobody may do twice.
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, name, str(file), "180"]) for name in ("a", "b", "c")
    ]  # fmt: skip
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["divisi.log", "divisi.log.1"]
    assert 2**16 <= former.stat().st_size < 2**16 + 2000
    assert file.stat().st_size < 2**16
    lines = [json.loads(line) for path in (former, file) for line in path.read_text().splitlines()]
    seen = sorted((line["writer"], line["number"]) for line in lines)
    assert seen == [(name, number) for name in "abc" for number in range(180)]


def test_a_file_that_has_been_moved_is_replaced_at_each_bound(tmp_path: Path) -> None:
    configure_logs(LogSettings(file=tmp_path / "divisi.log", max_file_bytes=4096), "ingress")
    for number in range(100):
        logging.getLogger("divisi.test").info("request %d %s", number, "x" * 100)
    assert all(path.stat().st_size < 4096 + 300 for path in tmp_path.iterdir())
    last = (tmp_path / "divisi.log.1").read_text() + (tmp_path / "divisi.log").read_text()
    assert "request 99 " in last
