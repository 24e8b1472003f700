"""Carries a load run out: probes, warm-up, load, report."""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from divisi.deploy.cli.bench.load import Load, Schedule
from divisi.deploy.cli.bench.outcome import Outcome
from divisi.deploy.cli.bench.view import table, watch
from divisi.deploy.cli.bench.workload import (
    PROBES,
    Length,
    Prompt,
    Request,
    cycle,
    random_prompts,
    read_prompts,
)
from divisi.deploy.cli.chat.conversation import Conversation, ParameterError
from divisi.deploy.cli.remote import RemoteError, connection, pick_model, stream_events
from divisi.deploy.settings import SettingsError

DEFAULT_REQUESTS = 64
DEFAULT_CONCURRENCY = 4


def bench(args: argparse.Namespace) -> int:
    """Run it; returns the exit status. Raises SettingsError and RemoteError."""
    if args.records and args.json is None:
        raise SettingsError("--records: needs --json FILE")
    if args.json not in (None, "-") and not Path(args.json).absolute().parent.is_dir():
        raise SettingsError(f"--json: {args.json}: there is no such folder")  # said before the run, not after it
    options = connection(args)
    params = _params(args)
    prompts = None if args.prompts is None else read_prompts(Path(args.prompts), args.endpoint)
    if prompts and args.endpoint == "completions" and not all(isinstance(prompt, str) for prompt in prompts):
        raise SettingsError("--prompts: messages need --endpoint chat")
    with httpx.Client(**options) as client:
        request = Request(args.endpoint, pick_model(client, args.model), args.output_tokens, params)
        source = _prompts(client, request, args, prompts)
    console = Console(stderr=args.json == "-")
    load, interrupted = asyncio.run(_measure(options, request, source, args, console))
    return _report(load, request, args, console, interrupted=interrupted)


def _params(args: argparse.Namespace) -> dict[str, Any]:
    fields = Conversation(model="")
    try:
        for assignment in args.param:
            fields.set(assignment)
    except ParameterError as error:
        raise SettingsError(f"--param: {error}") from None
    return ({} if args.no_ignore_eos else {"ignore_eos": True}) | fields.params


def _prompts(
    client: httpx.Client, request: Request, args: argparse.Namespace, prompts: list[Prompt] | None
) -> Iterator[Prompt]:
    if prompts is not None:
        return cycle(prompts, args.seed)
    short, long = (_probe(client, request, prompt) for prompt in PROBES)
    return random_prompts(args.seed, Length.from_probes(short, long).words(args.input_tokens))


def _probe(client: httpx.Client, request: Request, prompt: str) -> int:
    """How many tokens the server makes of a prompt. Raises RemoteError."""
    outcome = Outcome(0.0)
    try:
        for event in stream_events(client, request.path, request.body(prompt, 1)):
            outcome.take(event, 0.0)
    except RemoteError as error:
        hint = "; this server may want --no-ignore-eos" if "ignore_eos" in str(error) else ""
        raise RemoteError(f"a first request failed: {error}{hint}", error.status) from None
    if outcome.input_tokens is None:
        raise RemoteError("the server does not count tokens (no usage in its stream); use --prompts FILE")
    return outcome.input_tokens


async def _measure(
    options: dict[str, Any], request: Request, prompts: Iterator[Prompt], args: argparse.Namespace, console: Console
) -> tuple[Load, bool]:
    """The finished run, and whether Ctrl-C ended it."""
    requests = args.requests if args.requests is not None or args.duration is not None else DEFAULT_REQUESTS
    concurrency = None if args.rate is not None else args.concurrency or DEFAULT_CONCURRENCY
    schedule = Schedule(request.path, requests, args.duration, concurrency, args.rate, args.seed)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(**options, limits=limits) as client:

        def source() -> dict[str, Any]:
            return request.body(next(prompts))

        warmup = Schedule(request.path, max(0, args.warmup), None, concurrency=max(1, args.warmup))
        load = Load(client, source, schedule, time.perf_counter)
        viewer = None
        try:
            await Load(client, source, warmup, time.perf_counter).run()
            if console.is_terminal and not args.quiet:
                viewer = asyncio.create_task(watch(console, load.summary))
            await load.run()
        except asyncio.CancelledError:
            return load, True
        finally:
            if viewer is not None:
                viewer.cancel()
                with suppress(asyncio.CancelledError):
                    await viewer
    return load, False


def _report(load: Load, request: Request, args: argparse.Namespace, console: Console, *, interrupted: bool) -> int:
    summary = load.summary()
    console.print(table(summary))
    if args.json is not None:
        text = json.dumps(_record(load, request, args, interrupted=interrupted), indent=2) + "\n"
        _write(args.json, text)
    if interrupted:
        return 130
    failed = summary.counts["error"] + summary.counts["aborted"]
    return 1 if failed or not summary.counts["ok"] else 0


def _record(load: Load, request: Request, args: argparse.Namespace, *, interrupted: bool) -> dict[str, Any]:
    flags = ("base_url", "endpoint", "concurrency", "rate", "requests", "duration", "warmup", "prompts", "seed")
    asked = {name: getattr(args, name) for name in flags}
    lengths = {"input_tokens": None if args.prompts else args.input_tokens, "output_tokens": args.output_tokens}
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "divisi": version("divisi"),
        "client": f"{platform.machine()}, {platform.system()} {platform.release()}",
        "model": request.model,
        "asked": asked | lengths | {"params": request.params},
        "interrupted": interrupted,
        **load.summary().record(),
    }
    if args.records:
        record["records"] = [outcome.record(load.begin) for outcome in load.outcomes]
    return record


def _write(target: str, text: str) -> None:
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"--json: {target}: cannot be written: {error.strerror}") from None
