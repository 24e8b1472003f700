"""The shipped systemd unit fits what `divisi serve` does."""

from __future__ import annotations

from configparser import RawConfigParser
from importlib.resources import files

from divisi.deploy.cli.main import build_parser
from divisi.deploy.settings.groups import LimitSettings
from divisi.deploy.supervision.deadlines import KEEPER_S, TAKE_DOWN_S


def test_systemd_signals_one_process_and_waits_long_enough() -> None:
    unit = RawConfigParser()
    unit.read_string((files("divisi.deploy") / "examples" / "divisi.service").read_text())
    service = unit["Service"]
    assert service["KillMode"] == "mixed"
    assert service.getint("TimeoutStopSec") > LimitSettings().shutdown_grace_s + TAKE_DOWN_S + KEEPER_S + 1
    program, *arguments = service["ExecStart"].split()
    assert program.endswith("/bin/divisi")
    build_parser().parse_args(arguments)
