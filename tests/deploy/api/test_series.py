"""Nothing that a client writes becomes a label: however many keys, models, paths and ids there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from divisi.cluster.telemetry.process import Telemetry
from divisi.cluster.telemetry.spec import TelemetrySpec
from divisi.deploy.api import build_app
from divisi.deploy.limits import KeyFile
from divisi.model.text import TextCodec
from tests.deploy.api.conftest import MODEL, SETTINGS
from tests.deploy.api.fake_engine import FakeEngine

MOST = 600
"""Series of an ingress process, histograms of three slices included."""


def series(telemetry: Telemetry) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    page = generate_latest(telemetry.metrics.registry).decode()
    families = text_string_to_metric_families(page)
    return {(s.name, tuple(sorted(s.labels.items()))) for family in families for s in family.samples}


async def test_a_thousand_of_each_are_no_more_series_than_one(
    text: TextCodec, tmp_path: Path, full_tier: bool, record_result: Callable[[str, object], None]
) -> None:
    count = 1000 if full_tier else 150
    keys = [f"sk-{number:064d}" for number in range(count)]
    file = tmp_path / "keys"
    file.write_text("".join(f"{key} team-{number}\n" for number, key in enumerate(keys)))
    telemetry = Telemetry(TelemetrySpec(scraped=False), "ingress")
    app = build_app(FakeEngine(text.tokenizer), text, SETTINGS, keys=KeyFile(file), telemetry=telemetry)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:

        async def ask(number: int) -> None:
            headers = {"Authorization": f"Bearer {keys[number]}", "X-Request-Id": f"id-{number}"}
            body = {"model": MODEL, "prompt": f"prompt {number}", "max_tokens": 2}
            assert (await client.post("/v1/completions", json=body, headers=headers)).status_code == 200
            other = await client.post("/v1/completions", json=body | {"model": f"m{number}"}, headers=headers)
            assert other.status_code == 404
            for path in (f"/nowhere/{number}", f"/v1/models/m{number}"):
                assert (await client.get(path, headers=headers)).status_code == 404
            wrong = await client.request(f"VERB{number}", "/v1/models", headers=headers)
            assert wrong.status_code == 405

        await ask(0)
        first = series(telemetry)
        for number in range(1, count):
            await ask(number)
        last = series(telemetry)
    record_result(f"series of an ingress after {count} keys, models, paths and ids", len(last))
    assert last == first
    assert len(last) <= MOST
