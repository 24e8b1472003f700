"""Waiting for several descriptors."""

from __future__ import annotations

import fcntl
import os

from divisi.deploy.supervision.signals import readable


def test_what_can_be_read_or_has_ended_is_told_whatever_its_number() -> None:
    silent, to_silent = os.pipe()
    told, to_told = os.pipe()
    ended, to_ended = os.pipe()
    beyond = fcntl.fcntl(told, fcntl.F_DUPFD, 1024)  # more than `select` takes
    try:
        assert readable([silent, beyond], 0.0) == []
        os.write(to_told, b".")
        os.close(to_ended)
        assert readable([silent, beyond, ended], 10.0) == [beyond, ended]
    finally:
        for fd in (silent, to_silent, told, to_told, ended, beyond):
            os.close(fd)
