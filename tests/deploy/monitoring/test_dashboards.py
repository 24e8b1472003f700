"""Dashboards: the copies are what the code says, and their queries are valid and name metrics that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from divisi.deploy.monitoring.__main__ import files
from divisi.deploy.monitoring.panels import DASHBOARDS
from tests.support.metric_names import shown_names
from tests.support.promtool import needs_promtool, promtool

FOLDER = Path(__file__).parents[3] / "k8s" / "monitoring"


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    return files()


def queries() -> list[tuple[str, str]]:
    return [
        (f"{board.uid}: {panel.title}", q) for board in DASHBOARDS for panel in board.panels for q, _ in panel.queries
    ]


def test_the_copies_are_what_the_code_says(written: dict[str, str]) -> None:
    found = {str(path.relative_to(FOLDER)): path.read_text() for path in FOLDER.rglob("*") if path.is_file()}
    found.pop("README.md", None)
    assert found == written, "run `make monitoring`"


def test_grafana_can_tell_the_panels_apart(written: dict[str, str]) -> None:
    for name, text in written.items():
        if name.endswith(".json"):
            board: dict[str, Any] = json.loads(text)
            places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
            assert len(set(places)) == len(places), name
            assert all(panel["targets"] for panel in board["panels"])


@needs_promtool
def test_every_query_is_valid(tmp_path: Path) -> None:
    rules = [
        {"record": f"q:{place}", "expr": query.replace("$__rate_interval", "1m")}
        for place, (_, query) in enumerate(queries())
    ]
    file = tmp_path / "queries.yaml"
    file.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
    done = promtool("check", "rules", str(file))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("where", "query"), queries(), ids=lambda text: text.partition(" (")[0][:60])
def test_every_query_names_metrics_that_there_are(where: str, query: str) -> None:
    names = set(re.findall(r"\b(?:divisi|process)_\w+", query))
    assert names, where
    assert names <= shown_names(), where
