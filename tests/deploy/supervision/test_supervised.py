"""The three processes, with drivers that know nothing of Ray: orders, deadlines, and what a killed process leaves."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

# `work` is what a test gives; it begins by naming its pid and starting a helper that leaves its session.
PROGRAM = """
import os, signal, subprocess, sys, threading, time
from divisi.deploy.supervision import deadlines, front, keeper, say
keeper._UNREACHABLE_S = 0.5
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, around the tests, is not what is judged
folder = sys.argv[1]
def note(text):
    with open(f"{folder}/notes", "a") as file:
        file.write(text + "\\n")
def begin():
    helper = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], start_new_session=True)
    note(f"pids {os.getppid()} {os.getpid()} {helper.pid}")
"""
OBEDIENT = """
def work(orders):
    orders.report(own=True)
    begin()
    orders.stop.wait()
    note("stop")
    if orders.at_once.wait(0.4):
        note("at once")
    return 0
"""
DEAF = """
deadlines.TAKE_DOWN_S = 0.5
def work(orders):
    orders.report(own=True)
    begin()
    threading.Event().wait()
"""
JOINED = """
def work(orders):
    orders.report(joined="127.0.0.1:9", deployed=True)
    begin()
    threading.Event().wait()
"""
TALKATIVE = """
def work(orders):
    orders.report(own=True)
    begin()
    orders.stop.wait()
    for _ in range(10):
        say("still here")
        time.sleep(0.05)
    note("ended whole")
    return 0
"""
END = """
sys.exit(front.supervised(work, lambda address, keep_serve: note(f"undone {address} {keep_serve}"), grace_s=0.5))
"""


class Run:
    """A program under supervision."""

    def __init__(self, process: subprocess.Popen[bytes], notes: Path) -> None:
        self.process = process
        self._notes = notes
        wait_for(lambda: bool(self.notes))
        self.keeper, self.driver, self.helper = map(int, self.notes[0].split()[1:])

    @property
    def notes(self) -> list[str]:
        return self._notes.read_text().splitlines() if self._notes.exists() else []

    def all_gone(self) -> bool:
        return not any(map(lives, (self.process.pid, self.keeper, self.driver, self.helper)))


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(what: Callable[[], bool], within_s: float = 10.0) -> None:
    until = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < until, "did not come about"
        time.sleep(0.02)


@contextmanager
def running(folder: Path, work: str, **popen: object) -> Iterator[Run]:
    command = [sys.executable, "-c", PROGRAM + work + END, str(folder)]
    process = subprocess.Popen(command, start_new_session=True, **popen)  # type: ignore[call-overload]
    run = Run(process, folder / "notes")
    try:
        yield run
    finally:
        for pid in (process.pid, run.keeper, run.driver, run.helper):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_group_is_one_order_to_stop(tmp_path: Path, number: int) -> None:
    with running(tmp_path, OBEDIENT) as run:
        # As `timeout` does: to the program, and again to all of its group.
        os.kill(run.process.pid, number)
        time.sleep(0.05)
        os.killpg(run.process.pid, number)
        assert run.process.wait(10) == 0
        assert run.notes[1:] == ["stop"]
        assert run.all_gone()


def test_a_signal_to_every_process_is_one_order_to_stop(tmp_path: Path) -> None:
    with running(tmp_path, OBEDIENT) as run:
        for pid in (run.keeper, run.driver, run.process.pid):
            os.kill(pid, signal.SIGTERM)
        assert run.process.wait(10) == 0
        assert run.notes[1:] == ["stop"]
        assert run.all_gone()


def test_a_second_signal_is_another_order(tmp_path: Path) -> None:
    work = OBEDIENT.replace("wait(0.4)", "wait(5.0)")
    with running(tmp_path, work.replace("begin()", "orders.report(answers_open=True); begin()")) as run:
        os.kill(run.process.pid, signal.SIGTERM)
        time.sleep(0.5)
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.process.wait(10) == 0
        assert run.notes[1:] == ["stop", "at once"]


def test_a_second_signal_ends_a_driver_with_nothing_open_at_once(tmp_path: Path) -> None:
    with running(tmp_path, DEAF.replace("0.5", "60.0")) as run:
        os.kill(run.process.pid, signal.SIGTERM)
        time.sleep(0.5)
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.process.wait(5) == 0
        assert run.all_gone()


@pytest.mark.parametrize("answers_open", [True, False])
def test_a_driver_that_does_not_stop_is_killed_in_time(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], answers_open: bool
) -> None:
    work = DEAF.replace("begin()", f"begin(); orders.report(answers_open={answers_open})")
    with running(tmp_path, work) as run:
        begin = time.monotonic()
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.process.wait(10) == int(answers_open)
        assert time.monotonic() - begin < 3.0
        assert run.all_gone()
    assert ("did not stop in time" in capfd.readouterr().err) == answers_open


def test_a_driver_without_a_cluster_is_not_waited_for(tmp_path: Path) -> None:
    with running(tmp_path, DEAF.replace("own=True", "own=False").replace("0.5", "60.0")) as run:
        os.kill(run.process.pid, signal.SIGINT)
        assert run.process.wait(5) == 0
        assert run.all_gone()


@pytest.mark.parametrize("victim", ["front", "group of the front", "keeper", "driver"])
def test_whoever_is_killed_nothing_is_left(tmp_path: Path, victim: str) -> None:
    with running(tmp_path, DEAF) as run:
        match victim:
            case "front":
                os.kill(run.process.pid, signal.SIGKILL)
            case "group of the front":
                os.killpg(run.process.pid, signal.SIGKILL)
            case "keeper":
                os.kill(run.keeper, signal.SIGKILL)
            case "driver":
                os.kill(run.driver, signal.SIGKILL)
        assert run.process.wait(10) == (-signal.SIGKILL if "front" in victim else 1)
        wait_for(run.all_gone)


@pytest.mark.parametrize("victim", ["front", "driver", "nobody"])
def test_a_folder_that_the_driver_has_named_goes_with_it(tmp_path: Path, victim: str) -> None:
    folder = tmp_path / "own"
    (folder / "below").mkdir(parents=True)
    with running(tmp_path, OBEDIENT.replace("begin()", f"orders.report(folder={str(folder)!r}); begin()")) as run:
        pid = {"front": run.process.pid, "driver": run.driver, "nobody": run.process.pid}[victim]
        os.kill(pid, signal.SIGTERM if victim == "nobody" else signal.SIGKILL)
        wait_for(run.all_gone)
        wait_for(lambda: not folder.exists())


def test_a_stopped_helper_does_not_outlive_a_kill(tmp_path: Path) -> None:
    with running(tmp_path, DEAF) as run:
        os.kill(run.helper, signal.SIGSTOP)
        os.kill(run.process.pid, signal.SIGKILL)
        wait_for(run.all_gone)


def test_what_a_dead_driver_left_on_another_cluster_is_undone(tmp_path: Path) -> None:
    with running(tmp_path, JOINED) as run:
        os.kill(run.driver, signal.SIGKILL)
        assert run.process.wait(10) == 1
        assert run.notes[1:] == ["undone 127.0.0.1:9 False"]
        assert run.all_gone()


def test_a_serve_that_was_there_is_kept_also_where_the_driver_dies(tmp_path: Path) -> None:
    was_there = JOINED.replace("begin()", "orders.report(serve_was_there=True); begin()")
    with running(tmp_path, was_there) as run:
        os.kill(run.driver, signal.SIGKILL)
        assert run.process.wait(10) == 1
        assert run.notes[1:] == ["undone 127.0.0.1:9 True"]


def test_a_driver_that_dies_while_it_stops_has_not_removed_what_is_on_another_cluster(tmp_path: Path) -> None:
    with running(tmp_path, JOINED.replace("begin()", "orders.report(answers_open=True); begin()")) as run:
        os.kill(run.process.pid, signal.SIGTERM)
        os.kill(run.driver, signal.SIGKILL)
        assert run.process.wait(10) == 1
        assert run.notes[1:] == ["undone 127.0.0.1:9 False"]


def test_what_cannot_be_undone_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    failing = "\nnote_undone, note = note, lambda text: note_undone(text) if 'undone' not in text else 1 / 0\n"
    with running(tmp_path, failing + JOINED) as run:
        os.kill(run.driver, signal.SIGKILL)
        assert run.process.wait(10) == 1
    assert "the application is left on the cluster at 127.0.0.1:9; end it with `python -c" in capfd.readouterr().err


def test_a_cluster_that_nobody_can_reach_is_not_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with running(tmp_path, JOINED.replace("begin()", "orders.report(answers_open=True); begin()")) as run:
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.process.wait(6.5) == 0
    assert "127.0.0.1:9 cannot be reached" in capfd.readouterr().err


def test_a_closed_terminal_is_an_order_to_stop_and_output_into_it_no_failure(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    with running(tmp_path, TALKATIVE, stdin=slave, stdout=slave, stderr=slave) as run:
        os.close(slave)
        os.close(master)
        os.killpg(run.process.pid, signal.SIGHUP)  # the kernel's, were this the session's terminal
        assert run.process.wait(10) == 0
        assert run.notes[1:] == ["ended whole"]


def test_nohup_is_respected(tmp_path: Path) -> None:
    ignore = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    with running(tmp_path, ignore + OBEDIENT) as run:
        for pid in (run.process.pid, run.keeper, run.driver):
            os.kill(pid, signal.SIGHUP)
        time.sleep(0.3)
        assert run.notes[1:] == []
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.process.wait(10) == 0
        assert run.notes[1:] == ["stop"]
