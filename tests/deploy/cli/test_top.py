"""`divisi top`: what a server tells becomes rows, growth becomes rates; a server that is away for a while is no end."""

from __future__ import annotations

import io
import time

import httpx
import pytest
from rich.console import Console

from divisi.deploy.cli import main
from divisi.deploy.cli.top import command
from divisi.deploy.cli.top.screen import screen
from divisi.deploy.cli.top.snapshot import Snapshot, parse
from tests.deploy.api.fake_engine import FakeEngine


def page(steps: int, tokens: int, refused: int, epoch: int = 7, workers: tuple[int, ...] = (0, 10)) -> str:
    lines = [
        "divisi_seats 12",
        f"divisi_seats_filled {len(workers) + 2}",
        f"divisi_epoch {epoch}",
        "divisi_epochs_total 3",
        "divisi_refused_tokens 640",
        f'divisi_http_requests_total{{path="/v1/completions",method="POST",status="429"}} {refused}',
        f'divisi_http_requests_total{{path="/v1/completions",method="POST",status="200"}} {2 * refused}',
        'divisi_seat_joins_total{seat="attention:10"} 2',
        'divisi_seat_joins_total{seat="expert:1"} 4',
        'divisi_expert_weight_bytes{shard="0"} 1048576',
        'divisi_expert_weight_bytes{shard="1"} 2097152',
        "python_info 1",
    ]
    for worker in workers:
        lines += [
            f'divisi_requests_running{{worker="{worker}"}} {worker + 1}',
            f'divisi_requests_waiting{{worker="{worker}"}} 0',
            f'divisi_queued_tokens{{worker="{worker}"}} 12345',
            f'divisi_kv_pages{{worker="{worker}"}} 100',
            f'divisi_kv_pages_free{{worker="{worker}"}} 25',
            f'divisi_steps_total{{worker="{worker}"}} {steps}',
            f'divisi_generated_tokens_total{{worker="{worker}"}} {tokens}',
        ]
    return "\n".join(lines) + "\n"


def shown(now: Snapshot, before: Snapshot | None, problem: str = "") -> list[str]:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(screen("http://here", now, before, problem))
    return [" ".join(line.split()) for line in console.export_text().splitlines()]


def test_growth_is_told_by_the_second() -> None:
    before, now = parse(page(100, 1000, 4), True, "", 10.0), parse(page(150, 3000, 8), True, "", 12.0)
    head, requests, columns, *rows = shown(now, before)
    assert head == "http://here ready seats 4 of 12 epoch 7, the 3. of this coordinator"
    assert "refused tokens 640 HTTP 6.0/s 429 2.0/s" in requests
    assert columns.startswith("seat runs waits queued tokens")
    assert rows == [
        "attention:0 1 0 12,345 75% - 1,000.0 25.0 - -",
        "attention:10 11 0 12,345 75% - 1,000.0 25.0 - 2",
        "expert:0 - 1.0",
        "expert:1 4 2.0",
    ]


def test_shards_and_what_waits_for_them_are_told() -> None:
    said = "divisi_expert_shards 2\ndivisi_expert_shards_wanted {}\ndivisi_expert_wait_ratio 0.625\n"
    for wanted, told in ((2, "expert shards 2, waited for"), (3, "expert shards 2, 3 wanted, waited for")):
        head = shown(parse(page(1, 1, 0) + said.format(wanted), True, "", 1.0), None)[0]
        assert head.endswith(f"{told} in 62% of steps' time")


def test_what_is_not_known_is_a_dash() -> None:
    now = parse(page(150, 3000, 8), False, "3 of 4 seats filled", 12.0)
    head, requests, _, row, *_ = shown(now, None)
    assert "not ready: 3 of 4 seats filled" in head
    assert "HTTP -/s 429 -/s" in requests
    assert row == "attention:0 1 0 12,345 75% - - - - -"
    other = parse(page(5, 10, 8), True, "", 13.0)
    assert "- - - - -" in shown(other, now)[3], "a counter that has fallen is another process's"
    assert other.rate(now, "steps_total") is None


def test_workers_come_and_go() -> None:
    one, two = parse(page(100, 0, 0, 7, (0,)), True, "", 0.0), parse(page(110, 0, 0, 8, (0, 1)), True, "", 1.0)
    assert [row.split()[0] for row in shown(two, one)[3:5]] == ["attention:0", "attention:1"]
    assert [row.split()[0] for row in shown(one, two)[3:5]] == ["attention:0", "expert:0"]


def test_once_beside_a_server(url: str, engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--base-url", f"{url}/v1", "--every", "0.01"]) == 0
    assert "ready" in capsys.readouterr().out


def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--base-url", "http://127.0.0.1:9/v1"]) == 1
    assert "no server answers" in capsys.readouterr().err


def test_a_server_that_is_away_for_a_while_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        if asked in (3, 4):
            raise httpx.ConnectError("refused")
        if asked > 8:
            raise KeyboardInterrupt
        body = {"status": "ready"} if request.url.path.endswith("ready") else None
        return httpx.Response(200, json=body) if body else httpx.Response(200, text=page(asked, asked, 0))

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    output = io.StringIO()
    console = Console(force_terminal=True, width=160, height=20, file=output)
    with httpx.Client(transport=httpx.MockTransport(answer)) as client:
        first = command.read(client, "http://s")
        with pytest.raises(KeyboardInterrupt):
            command._watch(client, "http://s", first, console, 0.0)
    assert "no server answers" in output.getvalue()
    assert output.getvalue().count("attention:0") >= 4
