"""Asks a server now and then, and redraws the tables."""

from __future__ import annotations

import argparse
import time

import httpx
from rich.console import Console
from rich.live import Live

from divisi.deploy.cli.remote import RemoteError, connection
from divisi.deploy.cli.top.screen import screen
from divisi.deploy.cli.top.snapshot import Snapshot, read
from divisi.deploy.monitoring.prometheus import root_of


def top(args: argparse.Namespace) -> int:
    """Until Ctrl-C, or once; the exit status. Raises SettingsError and RemoteError."""
    options, console = connection(args), Console()
    server = root_of(options.pop("base_url"))
    with httpx.Client(**options) as client:
        first = read(client, server)
        if args.once or not console.is_terminal:
            time.sleep(args.every)  # rates are of the time between two looks
            console.print(screen(server, read(client, server), first))
            return 0
        _watch(client, server, first, console, args.every)
    return 0


def _watch(client: httpx.Client, server: str, first: Snapshot, console: Console, every_s: float) -> None:
    """A server that cannot be reached for a while may come back: what was last known stays, with the reason."""
    before, now = None, first
    with Live(screen(server, now, before), console=console, auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(every_s)  # what was asked for
            problem = ""
            try:
                before, now = now, read(client, server)
            except RemoteError as error:
                problem = str(error)
            live.update(screen(server, now, before, problem), refresh=True)
